"""The whole way on small real data: what lies in the run folder, what is reused, and how a run may end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import digits_recipe, table_recipe, train

from causal_compress import analyze, compress, planning, stages
from causal_compress.afterwards import rebuild_report
from causal_compress.cli import main
from causal_compress.deploy.quantize import quantize
from causal_compress.errors import BudgetError, RunFolderError, TeacherError
from causal_compress.recipe_file import recipe_yaml

FILES = {
    "recipe.resolved.yaml",
    "run.json",
    "teacher.json",
    "intervene.json",
    "group.json",
    "candidates.json",
    "plan.json",
    "rewrite.json",
    "rewrite.safetensors",
    "prune.json",
    "prune.safetensors",
    "distill.json",
    "distill.safetensors",
    "export.json",
    "model.onnx",
    "model.pt2",
    "teacher.onnx",
    "teacher.pt2",
    "student.safetensors",
    "surgery.json",
    "benchmark.json",
    "examples.json",
    "scorecard.json",
    "scorecard.csv",
    "scorecard.md",
    "report.json",
    "report.html",
}
STAGES = ["teacher", "intervene", "group", "candidates", "plan", "rewrite", "prune", "distill", "export", "benchmark"]
ROW = {
    "model": str,
    "runtime": str,
    "precision": str,
    "batch": int,
    "accuracy_pct": float,
    "n": int,
    "drop_pp": float,
    "drop_ci_pp": list,
    "params": int,
    "macs": int,
    "size_bytes": int,
    "latency_ms_p50": float,
    "latency_ms_p95": float,
    "latency_ms_p99": float,
    "throughput_per_s": float,
    "peak_memory_bytes": int,
}
"""The columns that were promised to programs that read scorecard.json."""
WORK = ("intervene", "group", "measure", "plan_and_compare", "rewrite", "prune", "distill", "export", "benchmark")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(digits_recipe(None), tmp_path_factory.mktemp("digits") / "teacher.safetensors")


@pytest.fixture(scope="module")
def finished(weights: Path) -> Path:
    folder = weights.parent / "run"
    outcome = compress(digits_recipe(weights), folder, command=("causal-compress", "compress"))
    assert outcome.folder == folder.absolute()
    return folder


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """The work of these stages must not be done again."""

    def again(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage was computed again")

    for name in names:
        monkeypatch.setattr(planning if name == "plan_and_compare" else stages, name, again)


def read(folder: Path, name: str) -> dict:  # type: ignore[type-arg]
    return json.loads((folder / name).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_the_run_folder_holds_what_was_promised_and_no_leftovers(finished: Path) -> None:
    found = {path.name for path in finished.iterdir()}
    assert found - {".lock"} == FILES
    run = read(finished, "run.json")
    assert {stage["stage"] for stage in run["stages"]} >= set(STAGES)  # a stage that was done again stands last
    assert all(stage["seconds"] >= 0 and stage["peak_memory_bytes"] > 10**7 for stage in run["stages"])
    assert len(run["checkpoint_sha256"]) == len(run["data_sha256"]) == len(run["recipe_sha256"]) == 64


def test_the_scorecard_has_the_promised_columns(finished: Path) -> None:
    scorecard = read(finished, "scorecard.json")
    assert scorecard["schema"] == 1
    assert scorecard["verdict"] == "PASS"
    assert [(row["model"], row["runtime"]) for row in scorecard["rows"]] == [
        ("teacher", "torch"),
        ("student", "torch"),
        ("teacher", "onnxruntime"),
        ("student", "onnxruntime"),
    ]
    for row in scorecard["rows"]:
        assert {key: type(row[key]) for key in ROW} == ROW
        assert set(row) - set(ROW) == {"threads", "speedup", "speedup_ci", "rounds"}


def test_the_student_is_as_small_as_the_plan_said_and_the_ledger_answers_for_it(finished: Path) -> None:
    plan, pruned, scorecard = (read(finished, f"{name}.json") for name in ("plan", "prune", "scorecard"))
    teacher, student = scorecard["rows"][:2]
    assert student["macs"] <= 0.5 * teacher["macs"]
    assert student["macs"] == pytest.approx(plan["macs"] * teacher["macs"], rel=0.01)
    assert student["params"] == pruned["params"]
    changed = [decision for decision in plan["decisions"] if decision["kind"] != "keep"]
    told = {change["node"] for name in ("rewrite", "prune") for change in read(finished, f"{name}.json")["changes"]}
    assert changed
    assert {decision["node"] for decision in changed} <= told


def test_the_same_command_again_computes_nothing(
    finished: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(finished, "run.json")["stages"]
    kept = {path.name: path.stat().st_mtime_ns for path in finished.glob("*.safetensors")}
    forbid(monkeypatch, *WORK)
    outcome = compress(digits_recipe(weights), finished)
    assert read(finished, "run.json")["stages"] == before
    assert {path.name: path.stat().st_mtime_ns for path in finished.glob("*.safetensors")} == kept
    assert outcome.scorecard.verdict == "PASS"


def test_what_is_missing_is_computed_again_to_the_same_bits(finished: Path, weights: Path) -> None:
    wanted = load_file(finished / "prune.safetensors")
    (finished / "prune.safetensors").unlink()
    compress(digits_recipe(weights), finished)
    found = load_file(finished / "prune.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_another_budget_shares_the_analysis(
    finished: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "intervene", "measure", "group")
    smaller = digits_recipe(weights, budget={"macs": 0.3})
    plan = analyze(smaller, tmp_path / "run", reuse=finished)
    assert plan.macs <= 0.3 < read(finished, "plan.json")["macs"]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "plan.json" in names
    assert not names & {"rewrite.json", "student.safetensors", "scorecard.json"}


def test_another_limit_shares_all_work_and_gets_a_verdict_of_its_own(
    finished: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, *(name for name in WORK if name != "benchmark"))
    recipe = digits_recipe(weights, budget={"max_accuracy_drop": 0.0})
    outcome = compress(recipe, tmp_path / "run", reuse=finished)
    assert read(finished, "scorecard.json")["verdict"] == "PASS"
    assert outcome.scorecard.verdict != "PASS"
    assert read(tmp_path / "run", "plan.json") == read(finished, "plan.json")


def test_a_folder_from_when_the_plan_hung_on_the_limit_goes_on(
    finished: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders whose plan was recorded under the whole budget: as they were written before."""
    whole = digits_recipe(weights)
    old = tmp_path / "old"
    with monkeypatch.context() as patch:
        patch.setattr(planning, "_costs_of", lambda budget: budget)
        compress(whole, old, reuse=finished)
    before = read(old, "run.json")["stages"]
    keys = [
        {stage["stage"]: stage["key"] for stage in read(folder, "run.json")["stages"]} for folder in (old, finished)
    ]
    assert keys[0]["plan"] != keys[1]["plan"]
    forbid(monkeypatch, *WORK)
    compress(whole, old)
    assert read(old, "run.json")["stages"] == before


def test_a_folder_of_another_recipe_is_refused_and_left_alone(finished: Path, weights: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    with pytest.raises(RunFolderError, match=r"budget\.macs is 0\.5 there, 0\.3 now"):
        analyze(digits_recipe(weights, budget={"macs": 0.3}), finished)
    assert {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before


def test_skipped_stages_leave_a_whole_run(finished: Path, weights: Path, tmp_path: Path) -> None:
    recipe = digits_recipe(weights, distill=None, benchmark=None)
    outcome = compress(recipe, tmp_path / "run", reuse=finished)
    assert outcome.scorecard.verdict == "INCONCLUSIVE"
    assert outcome.scorecard.rows == ()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert FILES - names == {"distill.json", "distill.safetensors", "benchmark.json"}
    pruned, student = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("prune", "student"))
    assert all(torch.equal(pruned[name], student[name]) for name in pruned)


@pytest.mark.parametrize(
    ("settings", "code", "verdict"),
    [
        (["budget={macs: 0.2, max_accuracy_drop: 0.1}"], 3, "FAIL"),
        (["budget={macs: 0.5, max_accuracy_drop: 50}", "benchmark=null"], 4, "INCONCLUSIVE"),
    ],
)
def test_the_command_ends_with_the_verdicts_code(
    settings: list[str], code: int, verdict: str, finished: Path, weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(recipe_yaml(digits_recipe(weights)))
    more = [*settings, "distill=null", "benchmark.runtimes=[torch]"] if code == 3 else [*settings, "distill=null"]
    words = [word for text in more for word in ("--set", text)]
    out = ["--out", str(tmp_path / "run"), "--reuse", str(finished)]
    assert main(["compress", "-q", "--recipe", str(tmp_path / "r.yaml"), *words, *out]) == code
    assert read(tmp_path / "run", "scorecard.json")["verdict"] == verdict


def test_a_teacher_near_chance_is_refused_unless_forced(tmp_path: Path) -> None:
    untrained = digits_recipe(None)
    with pytest.raises(TeacherError, match="wrong preprocessing"):
        analyze(untrained, tmp_path / "run")
    assert not (tmp_path / "run" / "intervene.json").exists()
    assert analyze(untrained, tmp_path / "run", force=True).macs <= 0.5


def test_what_a_refusal_says_can_be_done(weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(tmp_path / "run")
    wrong = digits_recipe(weights, data={"normalize": {"mean": [30.0], "std": [0.1]}})
    with pytest.raises(TeacherError, match=r"check data\.normalize"):
        analyze(wrong, folder)
    with pytest.raises(BudgetError) as refusal:
        compress(digits_recipe(weights, budget={"macs": 0.001}), folder)
    assert refusal.value.remedy.startswith("raise the budget")
    assert f"give another --out (with --reuse {folder} it takes over" in refusal.value.remedy
    caplog.clear()
    with caplog.at_level("INFO"):
        analyze(digits_recipe(weights, budget={"macs": None}), str(tmp_path / "next"), reuse=folder)
    assert "candidates: copied from" in caplog.text
    assert "the budget leaves the size open: here 0.5 of the MACs are planned for" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        analyze(digits_recipe(weights), str(tmp_path / "sized"), reuse=folder)
    assert "leaves the size open" not in caplog.text


def test_the_report_is_rebuilt_from_what_lies_there(finished: Path, tmp_path: Path) -> None:
    report = (finished / "report.html").read_bytes()
    (finished / "report.html").unlink()
    assert rebuild_report(finished).read_bytes() == report
    with pytest.raises(RunFolderError, match="not a run folder"):
        rebuild_report(tmp_path)


def test_the_onnx_file_answers_as_the_scorecard_says(finished: Path, weights: Path) -> None:
    import onnxruntime

    from causal_compress.inputs.data import load_data

    session = onnxruntime.InferenceSession(finished / "model.onnx", providers=["CPUExecutionProvider"])
    test = load_data(digits_recipe(weights).data, seed=0).test
    x, y = test.take(np.arange(len(test)))
    right = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0].argmax(1) == y.numpy()
    rows = read(finished, "scorecard.json")["rows"]
    row = next(row for row in rows if (row["model"], row["runtime"]) == ("student", "onnxruntime"))
    assert row["n"] == len(test)
    assert row["accuracy_pct"] == pytest.approx(100 * right.mean())


def test_a_table_goes_the_whole_way(tmp_path: Path) -> None:
    recipe = table_recipe(train(table_recipe(None), tmp_path / "teacher.safetensors"))
    teacher, student = compress(recipe, tmp_path / "run").scorecard.rows
    assert teacher.accuracy_pct > 90
    assert student.params <= 0.1 * teacher.params
    assert student.drop_pp <= 5
    effects = read(tmp_path / "run", "intervene.json")
    assert len(effects["features"]) == 30
    assert "mean radius" in effects["features"]


def test_int8_and_the_harm_audit_are_stages_where_asked_for(weights: Path, tmp_path: Path) -> None:
    recipe = digits_recipe(
        weights,
        distill=None,
        quantize={"inputs": 64, "scored": 64, "repeats": 10, "seconds": 0.2, "max_accuracy_drop": 20.0},
        audit={"inputs": 100, "corruption_inputs": 40, "attribution_inputs": 4, "masks": 32, "map_inputs": 32},
        benchmark={"runtimes": ["onnxruntime"], "batches": [1], "repeats": 10, "seconds": 0.1},
    )
    outcome = compress(recipe, tmp_path / "run")
    stages_of_run = [stage["stage"] for stage in read(tmp_path / "run", "run.json")["stages"]]
    assert stages_of_run.index("export") < stages_of_run.index("quantize") < stages_of_run.index("benchmark")
    assert "audit" in stages_of_run
    chosen = read(tmp_path / "run", "quantize.json")["chosen"]
    precisions = [(row.model, row.precision) for row in outcome.scorecard.rows]
    eight = [("student", "int8")] if chosen == "int8" else []
    assert precisions == [("teacher", "fp32"), ("student", "fp32"), *eight]
    told = read(tmp_path / "run", "report.json")
    assert told["quantized"]["chosen"] == chosen
    assert told["audit"]["n"] == 100
    assert (tmp_path / "run" / "model.int8.onnx").stat().st_size < (tmp_path / "run" / "model.onnx").stat().st_size


def test_threads_are_those_of_the_recipe_else_pytorchs_own(weights: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as OMP_NUM_THREADS, or a process that may use one core, would have it
        with stages.numerics(digits_recipe(weights).model_copy(update={"threads": None})):
            assert torch.get_num_threads() == 1
        with stages.numerics(digits_recipe(weights).model_copy(update={"threads": 2})):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_accuracy_budget_reaches_the_choice_of_precision(
    finished: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(*given: object, **named: object) -> object:
        made = quantize(*given, **named)  # type: ignore[arg-type]
        bad = replace(made.files[0].accuracy, pct=made.fp32.pct - 10.0)
        return replace(made, files=(replace(made.files[0], accuracy=bad),), chosen="int8", reason="INT8 is faster")

    monkeypatch.setattr(stages, "quantize", worse)
    section = {"families": ["cpu"], "methods": ["minmax"], "inputs": 64, "scored": 64, "repeats": 5, "seconds": 0.1}
    chosen = {}
    for limit in (None, 5.0, 50.0):
        budget = {"macs": 0.5, "max_accuracy_drop": limit}
        recipe = digits_recipe(weights, budget=budget, quantize=section, benchmark=None)
        compress(recipe, tmp_path / f"run{limit}", reuse=finished)
        made = read(tmp_path / f"run{limit}", "quantize.json")
        chosen[limit] = made["chosen"]
        assert ("against the teacher" in made["reason"]) == (limit is not None)
    assert chosen == {None: "int8", 5.0: "fp32", 50.0: "int8"}
