"""What commands say at their end and in their remedies: it can be done as it is written."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import numpy as np
import pytest
from audit_sample import audit_of, pair_of
from test_cli import scorecard

from causal_compress.cli import main
from causal_compress.commands import finished
from causal_compress.commands.shared import refuse_several_processes
from causal_compress.deploy.gate import Limits
from causal_compress.errors import RunFolderError
from causal_compress.explain.paired import by_group
from causal_compress.recipe import RuntimeName
from causal_compress.results import Accuracy, Bisection, Estimate, Undone

ACCURACY = Accuracy(pct=90.0, n=100, low_pct=83.0, high_pct=95.0)
UNDONE = Undone(
    node="layer1",
    kind="merge",
    what=(),
    ledger_harm_kl=None,
    harm_removed_kl=Estimate(value=0.1, low=0.0, high=0.2, n=64),
    heldout_kl=0.1,
    accuracy=ACCURACY,
    accuracy_gained_pp=1.0,
    accuracy_gained_ci_pp=(0.0, 2.0),
    macs_given_back=10,
    params_given_back=10,
)
BISECTION = Bisection(
    undone=(UNDONE,),
    skipped=(),
    notes=(),
    heldout_kl=0.2,
    heldout=64,
    accuracy=ACCURACY,
    macs=100,
    params=100,
    distilled=False,
    refit_inputs=64,
    seconds=1.0,
)


@pytest.fixture
def afterwards(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands in for what is done with finished runs."""
    module = ModuleType("causal_compress.afterwards")
    monkeypatch.setitem(sys.modules, "causal_compress.afterwards", module)
    return module


def test_the_runtimes_that_help_names_are_those_that_can_be_asked_for() -> None:
    assert tuple(finished._RUNTIMES.replace(" or ", ", ").split(", ")) == get_args(RuntimeName)


@pytest.mark.parametrize(
    ("wrong", "told", "untold"),
    [
        (["--runtime", "torch cpu"], "torch-compiled, onnxruntime", "--batch"),
        (["--batch", "x"], "--batch 1,64", "--runtime"),
        (["--threads", "0"], "--threads 1,2", "--batch"),
        (["--repeats", "0"], "--repeats 100", "--threads"),
        (["--runtime", "caffe", "--batch", "x"], "--batch 1,64, and as --runtime torch,", "--repeats"),
    ],
)
def test_a_wrong_flag_is_answered_with_that_flag(
    wrong: list[str], told: str, untold: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", "run", *wrong]) == 2
    remedy = capsys.readouterr().err.split("remedy: ")[1]
    assert told in remedy
    assert untold not in remedy


def test_a_benchmark_shows_no_report_that_it_did_not_write(
    afterwards: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    afterwards.rebenchmark = lambda *_: scorecard()  # type: ignore[attr-defined]
    assert main(["benchmark", "run"]) == 0
    shown = capsys.readouterr().out
    assert "verdict: PASS" in shown
    assert "report" not in shown


def test_the_file_that_holds_all_classes_is_the_one_that_was_written(
    afterwards: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = pair_of([0, 1] * 50, [0, 1] * 50, [0, 1] * 25 + [1, 0] * 25)
    (row,) = by_group(pair, [("0", np.arange(100))])
    found = dataclasses.replace(
        audit_of(pair), per_class=tuple(dataclasses.replace(row, name=str(i)) for i in range(20))
    )
    afterwards.audit_run = lambda *_, apart: found  # type: ignore[attr-defined]
    afterwards.audit_file = lambda run: run / "audit-later.json"  # type: ignore[attr-defined]
    assert main(["audit", "run"]) == 0
    shown = capsys.readouterr().out
    assert "all in audit-later.json" in shown
    assert "all in audit.json" not in shown


def test_a_change_is_left_out_in_a_folder_of_its_own(
    afterwards: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    afterwards.bisect_run = lambda *_, **__: BISECTION  # type: ignore[attr-defined]
    assert main(["bisect", "runs/x"]) == 0
    assert "compress ... --undo layer1 --out NEW --reuse runs/x" in " ".join(capsys.readouterr().out.split())


def test_a_file_that_is_no_scorecard_is_answered_with_what_prints_one(tmp_path: Path) -> None:
    from causal_compress.afterwards import gate_run

    (tmp_path / "table.json").write_text('{"targets": []}', encoding="utf-8")
    with pytest.raises(RunFolderError) as refusal:
        gate_run(tmp_path / "table.json", Limits())
    wanted = "benchmark RUN --json prints for one run without --precision, --data, --recipe and settings other than"
    assert wanted in refusal.value.remedy


@pytest.mark.parametrize("command", ["compress", "analyze"])
def test_several_processes_are_refused_before_they_fight_for_the_folder(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = ["--arch", "torchvision:resnet18", "--data", "sklearn:digits", "--out", str(tmp_path / "run")]
    assert main([command, *given]) == 2
    assert "WORLD_SIZE=2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_several_processes()
