"""A finished run measured, packaged and judged later: with its own data, its INT8 form and its own limits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_runs import table_recipe, train

from causal_compress import afterwards
from causal_compress.cli import main
from causal_compress.deploy.bundle import Wish
from causal_compress.deploy.gate import Limits
from causal_compress.errors import RunFolderError, UsageError
from causal_compress.pipeline import compress
from causal_compress.recipe import BenchmarkSection

QUICK = BenchmarkSection(batches=[1], repeats=10, seconds=0.05, runtimes=["onnxruntime"])
QUANTIZED = {"families": ["cpu"], "methods": ["minmax"], "scored": 32, "repeats": 10, "seconds": 0.05}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run without a benchmark on a table of its own, which tests may change."""
    folder = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((600, 6))
    labels = (rows[:, 0] + rows[:, 1] > 0).astype(int)
    lines = [
        "a,b,c,d,e,f,y",
        *(",".join(f"{v:.4f}" for v in row) + f",{y}" for row, y in zip(rows, labels, strict=True)),
    ]
    (folder / "data.csv").write_text("\n".join(lines) + "\n")
    sections = {
        "data": {"source": f"csv:{folder / 'data.csv'}", "target": "y"},
        "distill": None,
        "benchmark": None,
        "quantize": QUANTIZED,
        "budget": {"params": 0.8, "max_accuracy_drop": 50.0},
    }
    plain = table_recipe(None, **sections)
    model = plain.model.model_copy(update={"args": {"inputs": 6, "hidden": [16, 16]}})
    weights = train(plain.model_copy(update={"model": model}), folder / "w.safetensors", epochs=2)
    recipe = plain.model_copy(update={"model": model.model_copy(update={"weights": str(weights)})})
    compress(recipe, folder / "run")
    return folder / "run"


def test_int8_is_measured_again_too(finished, monkeypatch):
    given = {}
    monkeypatch.setattr(afterwards, "benchmark", lambda *_, int8=None: given.update(int8=int8))
    monkeypatch.setattr(afterwards, "chosen_int8", lambda quantized, folder: folder / quantized.files[0].onnx)
    afterwards.rebenchmark(finished, QUICK)
    assert given["int8"] == finished / "model.int8.onnx"


def test_int8_reaches_a_package_with_its_figures(finished, tmp_path):
    written = afterwards.export_run(finished, Wish("int8"), tmp_path / "out")
    note = next(model.note for model in written.models if model.precision == "int8")
    assert "max_accuracy_drop" in note


def test_the_gate_of_a_run_that_measured_nothing_says_so(finished):
    with pytest.raises(UsageError, match="nothing was measured"):
        afterwards.gate_run(finished, Limits(max_drop_pp=1.0))


@pytest.fixture
def other_data(finished):
    """The run's data, changed behind its back for the time of a test."""
    path = finished.parent / "data.csv"
    before = path.read_text()
    path.write_text(before.replace("\n0.", "\n1.", 1))
    yield
    path.write_text(before)


@pytest.mark.usefixtures("other_data")
def test_other_data_than_the_runs_are_refused(finished, tmp_path):
    calls = (
        lambda: afterwards.rebenchmark(finished, QUICK),
        lambda: afterwards.export_run(finished, Wish("onnx"), tmp_path / "out"),
        lambda: afterwards.benchmark_targets([finished], QUICK, runtimes=["onnxruntime"]),
    )
    for call in calls:
        with pytest.raises(RunFolderError, match="the data of"):
            call()


def test_data_given_for_a_run_are_prepared_as_its_own(finished, capsys, monkeypatch):
    seen = []

    def keep(targets, section, *, data, **rest):
        seen.append(data)
        raise UsageError("enough", remedy="none")

    monkeypatch.setattr(afterwards, "benchmark_targets", keep)
    assert main(["benchmark", str(finished), "--data", "csv:new.csv", "-q"]) == 2
    capsys.readouterr()
    assert (seen[0].data.source, seen[0].data.target, seen[0].data.calibration) == ("csv:new.csv", "y", 150)


def test_benchmark_settings_are_the_benchmarks(finished, monkeypatch):
    seen = []

    def keep(run, section):
        seen.append(section)
        raise UsageError("enough", remedy="none")

    monkeypatch.setattr(afterwards, "rebenchmark", keep)
    command = ["benchmark", str(finished), "--set", "benchmark.repeats=500", "--batch", "4", "-q"]
    assert main(command) == 2
    assert seen[0].model_dump(exclude_unset=True) == {"repeats": 500, "batches": [4]}
    assert main([*command, "--set", "benchmark.repeat=1"]) == 2


@pytest.mark.parametrize("name", ["m.plan", "m.trt", "m.engine"])
def test_engines_are_no_runs(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"engine")
    assert main(["benchmark", str(tmp_path / name), "-q"]) != 0
    assert "can't use the engine" in capsys.readouterr().err


def test_a_later_audit_leaves_the_runs_own(finished, tmp_path):
    assert afterwards.audit_file(finished).name == "audit.json"
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    record = json.loads((run / "run.json").read_text())
    record["stages"].append(record["stages"][-1] | {"stage": "audit"})
    (run / "run.json").write_text(json.dumps(record))
    assert afterwards.audit_file(run).name == "audit-later.json"
