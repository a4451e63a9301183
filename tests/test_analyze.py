"""The plan of a budget that leaves the size open: before its search, after it, and where half is out of reach."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_runs import digits_recipe, train

from causal_compress import analyze, compress, planning, stages
from causal_compress.afterwards import bisect_run
from causal_compress.errors import RunFolderError
from causal_compress.recipe import Recipe


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(digits_recipe(None), tmp_path_factory.mktemp("digits") / "teacher.safetensors")


def read(folder: Path, name: str) -> dict:  # type: ignore[type-arg]
    return json.loads((folder / name).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def left_open(weights: Path, **sections: object) -> Recipe:
    budget = {"macs": None, "max_accuracy_drop": 30.0}
    return digits_recipe(
        weights, budget=budget, search={"points": 2, "epochs": 0}, distill=None, benchmark=None, **sections
    )


@pytest.fixture(scope="module")
def searched(weights: Path) -> Path:
    folder = weights.parent / "searched"
    compress(left_open(weights), folder)
    return folder


def test_an_analysis_after_a_search_keeps_the_plan_that_it_chose(
    searched: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in searched.iterdir() if path.name != "run.json" and path.is_file()}
    plan, pareto = read(searched, "plan.json"), read(searched, "pareto.json")
    share = pareto["points"][pareto["chosen"]]["asked_macs"]
    assert share < 0.5
    for name in ("intervene", "measure", "group", "rewrite"):
        monkeypatch.setattr(stages, name, lambda *_, **__: pytest.fail("a finished stage was computed again"))
    monkeypatch.setattr(planning, "plan_and_compare", lambda *_: pytest.fail("another plan was made"))
    with caplog.at_level("INFO"):
        assert analyze(left_open(weights), searched).macs == plan["macs"]
        assert analyze(left_open(weights), tmp_path / "run", reuse=searched).macs == plan["macs"]
    assert {path.name: path.read_bytes() for path in searched.iterdir() if path.name in before} == before
    assert f"the search that lies there chose {share:g} of the MACs" in caplog.text
    monkeypatch.undo()
    assert bisect_run(searched, inputs=64, top=1).undone


def test_an_analysis_does_not_search(
    searched: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where nothing was searched for, nor where what lies there was a search under other settings."""
    monkeypatch.setattr("causal_compress.searching.attempt", lambda *_: pytest.fail("a size was tried"))
    other = left_open(weights).model_copy(update={"search": left_open(weights).search.model_copy(update={"points": 3})})
    with caplog.at_level("INFO"):
        for name, reuse in (("without", None), ("of another", searched)):
            assert 0.4 < analyze(other, tmp_path / name, reuse=reuse).macs <= 0.5
            assert not (tmp_path / name / "search.json").exists()
        assert "search: begins" not in caplog.text
        damaged = Path(shutil.copytree(searched, tmp_path / "damaged"))
        (damaged / "search.json").write_text("{}")
        assert 0.4 < analyze(left_open(weights), damaged).macs <= 0.5
    assert caplog.text.count("the budget leaves the size open: here 0.5 of the MACs are planned for") == 3
    with pytest.raises(RunFolderError, match="not the plan that its student was made by"):
        bisect_run(damaged)


def test_where_half_is_out_of_reach_an_analysis_plans_for_what_a_search_begins_with(
    searched: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = left_open(weights, plan={"width": False, "low_rank": False})
    with caplog.at_level("INFO"):
        plan = analyze(recipe, tmp_path / "run", reuse=searched)
    assert 0.5 < plan.macs < 1.0
    planned = next(line for line in caplog.messages if "leaves the size open" in line)
    assert plan.macs <= float(planned.split("here ")[1].split()[0]) < 1.0
