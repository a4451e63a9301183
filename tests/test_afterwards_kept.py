"""What is found about a finished run later: of which student, kept only where it can be written, as what JSON."""

import json
import math
import shutil
from pathlib import Path

import pytest
from report_sample_later import audit
from small_runs import table_recipe, train

from causal_compress import afterwards
from causal_compress.cli import main
from causal_compress.commands.shared import as_json_text
from causal_compress.errors import RunFolderError
from causal_compress.explain.report import audited_later, bisected
from causal_compress.explanations import Explained, write_explanations
from causal_compress.files import sha256_of_file, sha256_of_json
from causal_compress.pipeline import compress
from causal_compress.recipe import BenchmarkSection
from causal_compress.recipe_file import load_recipe, recipe_yaml
from causal_compress.results import Estimate
from causal_compress.stages import student_mark


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run and its recipe."""
    folder = tmp_path_factory.mktemp("kept")
    plain = table_recipe(None, distill=None, benchmark=None)
    recipe = table_recipe(train(plain, folder / "w.safetensors", epochs=2), distill=None, benchmark=None)
    compress(recipe, folder / "run")
    return folder / "run", recipe


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made[0], tmp_path / "run"))


def report_of(run):
    return json.loads((run / "report.json").read_text())


def another_student(run):
    """The run as if its student had been made anew from other data."""
    told = json.loads((run / "run.json").read_text())
    for record in told["stages"]:
        if record["stage"] == "export":
            record["key"] = "of other data"
    (run / "run.json").write_text(json.dumps(told))


def test_an_audit_of_an_earlier_student_is_not_told(made, run, caplog):
    asked = {"map_inputs": 0, "attribution_inputs": 0, "corruption_inputs": 0, "resamples": 20}
    afterwards.audit_run(run, asked)
    afterwards.bisect_run(run, top=1)
    compress(made[1], run)
    assert report_of(run)["audit"]["n"] > 0
    assert report_of(run)["bisection"]["undone"]
    another_student(run)
    compress(made[1], run)  # exports again, under another key
    assert report_of(run)["audit"]["n"] > 0, "the same student after all"
    mark = student_mark(run)
    another_student(run)
    assert student_mark(run) != mark
    assert audited_later(run, student_mark(run)) is bisected(run, student_mark(run)) is None
    assert "ask again" in caplog.text
    assert audited_later(run, mark) is not None


def test_other_weights_are_another_student(run):
    mark = student_mark(run)
    told = json.loads((run / "run.json").read_text())
    record = next(record for record in told["stages"] if record["stage"] == "export")
    record["files"]["student.safetensors"] = "0" * 64
    (run / "run.json").write_text(json.dumps(told))
    assert student_mark(run) != mark


def test_the_runs_own_audit_is_no_later_one(run, caplog):
    (run / "audit.json").write_text(as_json_text(audit()))
    assert audited_later(run, student_mark(run)) is None
    assert caplog.text == ""


@pytest.mark.parametrize("ask", [lambda run: afterwards.audit_run(run, {}), afterwards.bisect_run])
def test_a_run_that_cant_be_written_is_refused_before_the_work(run, monkeypatch, ask):
    def refuse(folder):
        raise RunFolderError(f"can't write into {folder}", remedy="give another --out")

    monkeypatch.setattr(afterwards, "make_folder", refuse)
    monkeypatch.setattr(afterwards, "reopen", lambda *_: pytest.fail("work was done before"))
    with pytest.raises(RunFolderError, match="can't write into") as caught:
        ask(run)
    assert "--out" not in str(caught.value)
    assert "copy" in caught.value.remedy


@pytest.mark.parametrize("what", ["other measurements", "another decision"])
def test_a_plan_that_is_not_the_students_is_not_bisected(run, monkeypatch, what):
    """As an analysis of other data, or of a size left open, could have put it there."""
    told = json.loads((run / "run.json").read_text())
    records = {record["stage"]: record for record in told["stages"]}
    if what == "other measurements":
        records["candidates"]["key"] = "of other data"
    else:
        plan = json.loads((run / "plan.json").read_text())
        plan["decisions"][0]["candidate"]["harm_kl"] += 1.0
        (run / "plan.json").write_text(json.dumps(plan))
        records["plan"]["files"]["plan.json"] = sha256_of_file(run / "plan.json")
    (run / "run.json").write_text(json.dumps(told))
    monkeypatch.setattr(afterwards, "reopen", lambda *_: pytest.fail("work was done before"))
    why = "is of an earlier run" if what == "other measurements" else "not the plan that its student was made by"
    with pytest.raises(RunFolderError, match=why) as caught:
        afterwards.bisect_run(run)
    assert "compress" in caught.value.remedy


def test_surgery_of_an_earlier_version_counts(run):
    """It went by the plan's key, whatever was decided."""
    told = json.loads((run / "run.json").read_text())
    records = {record["stage"]: record | {"after": None} for record in told["stages"]}
    told["stages"] = list(records.values())
    recipe = load_recipe(run / "recipe.resolved.yaml")
    depends = {"plan": records["plan"]["key"], "rewrite": recipe.rewrite}
    records["rewrite"]["key"] = sha256_of_json(["rewrite", depends, told["versions"]["causal-compress"]])
    (run / "run.json").write_text(json.dumps(told))
    assert afterwards.bisect_run(run, top=1).undone


def test_a_run_of_an_older_version_is_bisected(run, monkeypatch):
    """Keys hold the version that wrote them, which run.json names."""
    monkeypatch.setattr("causal_compress.planning.package_version", lambda: "7.0")
    assert afterwards.bisect_run(run, top=1).undone


def test_a_report_that_cant_be_written_names_no_flag_that_isnt_there(run, monkeypatch, capsys):
    def refuse(path, text):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(afterwards, "atomic_write_text", refuse)
    assert main(["report", str(run), "-q"]) == 1
    said = capsys.readouterr().err
    assert "--out" not in said
    assert "copy" in said


@pytest.mark.parametrize("command", ["audit", "bisect"])
def test_what_is_no_run_is_not_made_one(command, tmp_path, capsys):
    assert main([command, str(tmp_path / "absent"), "-q"]) == 1
    assert "is not a run folder" in capsys.readouterr().err
    assert not (tmp_path / "absent").exists()


# ---- measured again


def test_what_the_budget_asks_about_is_measured_again_too(run, monkeypatch):
    recipe = load_recipe(
        run / afterwards.RECIPE, ["budget.latency_ms={keep: 0.9, batch: 8, threads: 2}", "budget.size_bytes=99999"]
    )
    (run / afterwards.RECIPE).write_text(recipe_yaml(recipe))
    seen = []
    monkeypatch.setattr(afterwards, "benchmark", lambda *given, **_: seen.append(given[3]))
    afterwards.rebenchmark(run, BenchmarkSection(runtimes=["torch"], batches=[1], repeats=10))
    (section,) = seen
    assert section.runtimes == ["torch", "onnxruntime"]
    assert (section.batches, section.threads, section.repeats) == ([1, 8], [1, 2], 10)


# ---- JSON has no NaN


def refuse_constant(name):
    pytest.fail(f"bare {name}")


def test_json_for_others_holds_no_bare_nan():
    text = as_json_text({"estimate": Estimate(value=math.nan, low=-math.inf, high=1.0, n=3), "ä": (1, None)})
    found = json.loads(text, parse_constant=refuse_constant)
    assert found == {"estimate": {"value": "nan", "low": "-inf", "high": 1.0, "n": 3}, "ä": [1, None]}


def test_an_explanation_without_an_interval_is_written_as_json(tmp_path):
    told = Estimate(value=0.5, low=math.nan, high=math.nan, n=1)  # as of occlusion, which draws nothing at random
    write_explanations(Explained("a title", (told,), (None,)), tmp_path / "told.json")
    found = json.loads((tmp_path / "told.json").read_text(), parse_constant=refuse_constant)
    assert found["explanations"] == [{"value": 0.5, "low": "nan", "high": "nan", "n": 1}]
