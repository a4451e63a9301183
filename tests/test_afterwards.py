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
from causal_compress.deploy.package_folder import package_folder
from causal_compress.errors import RunFolderError, UsageError
from causal_compress.inputs.data import load_data
from causal_compress.pipeline import compress
from causal_compress.recipe import BenchmarkSection
from causal_compress.recipe_file import load_recipe, recipe_yaml

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


# ---- targets that want their inputs prepared otherwise


@pytest.fixture(scope="module")
def otherwise(finished):
    """A copy of the run that was made, so it says, with inputs shifted far away."""
    run = Path(shutil.copytree(finished, finished.parent / "otherwise"))
    recipe = load_recipe(
        run / afterwards.RECIPE, ["data.normalize.mean=[9,9,9,9,9,9]", "data.normalize.std=[1,1,1,1,1,1]"]
    )
    (run / afterwards.RECIPE).write_text(recipe_yaml(recipe))
    record = json.loads((run / "run.json").read_text())
    record["data_sha256"] = load_data(recipe.data, seed=recipe.seed).fingerprint
    (run / "run.json").write_text(json.dumps(record))
    return run


def measured(*targets, **options):
    """Accuracy and drop of each target, and the notes on them."""
    table = afterwards.benchmark_targets(targets, QUICK, runtimes=["onnxruntime"], precisions=["fp32"], **options)
    told = [note for note in table.notes if "accuracy" in note]
    return {row.target: (row.accuracy and row.accuracy.pct, row.drop_pp) for row in table.rows}, told


def test_a_run_is_measured_on_inputs_prepared_as_its_own(finished, otherwise):
    together, told = measured(finished, otherwise)
    alone = {**measured(finished)[0], **measured(otherwise)[0]}
    assert {name: accuracy for name, (accuracy, _) in together.items()} == {n: a for n, (a, _) in alone.items()}
    assert together["run teacher"][0] > together["otherwise teacher"][0] + 10
    assert together["run student"][1] is not None
    assert together["otherwise teacher"][1] is together["otherwise student"][1] is None
    assert len(told) == 1
    assert "otherwise teacher, otherwise student" in told[0]
    assert "no drop" in told[0]
    assert measured(finished, otherwise / "model.onnx")[0]["model.onnx"] == (together["otherwise student"][0], None)


def test_runs_of_the_same_inputs_are_compared(finished, tmp_path):
    again = Path(shutil.copytree(finished, tmp_path / "again"))
    rows, told = measured(finished, again)
    assert rows["again teacher"] == (rows["run teacher"][0], 0.0)
    assert told == []


def test_packages_are_measured_on_inputs_prepared_as_their_own(finished, otherwise, tmp_path):
    for run in (finished, otherwise):
        afterwards.export_run(run, Wish("onnx"), tmp_path / f"of-{run.name}")
    rows, told = measured(tmp_path / "of-run", tmp_path / "of-otherwise", finished)
    assert rows["of-run teacher"][0] == rows["run teacher"][0] > rows["of-otherwise teacher"][0] + 10
    assert rows["run teacher"][1] == 0.0  # a package's inputs are its run's
    assert rows["of-otherwise teacher"][1] is None
    assert ["of-otherwise" in note for note in told] == [False, True]
    assert told[0] == "accuracy: on the package's own inputs, from the validation split"


def test_given_data_measure_no_run_that_wants_them_otherwise(finished, otherwise):
    recipe = load_recipe(finished / afterwards.RECIPE)
    rows, told = measured(finished, otherwise, data=recipe)
    assert rows["run student"][1] is not None
    assert rows["otherwise teacher"] == rows["otherwise student"] == (None, None)
    assert "mean=[9.0" in told[-1]


def test_rows_in_another_encoding_measure_no_run(finished, tmp_path):
    """Means and standard deviations come from the training rows of whatever table is given."""
    lines = (finished.parent / "data.csv").read_text().splitlines()
    (tmp_path / "new.csv").write_text("\n".join([lines[0], *lines[300:]]) + "\n")
    recipe = load_recipe(finished / afterwards.RECIPE, [f"data.source=csv:{tmp_path / 'new.csv'}"])
    afterwards.export_run(finished, Wish("onnx"), tmp_path / "package")
    rows, told = measured(finished, tmp_path / "package", data=recipe)
    assert {accuracy for accuracy, _ in rows.values()} == {None}
    assert ["come from other rows than in" in note for note in told] == [True, True]
    rows, told = measured(finished, tmp_path / "package", data=load_recipe(finished / afterwards.RECIPE))
    assert rows["run student"][1] is not None
    assert rows["teacher"][0] == rows["run teacher"][0]
    assert told == ["accuracy: on 120 inputs, the test split of the given data"]


def test_a_folder_in_which_a_later_run_was_cut_off_is_refused(finished, tmp_path):
    def cut_off(after):
        """A copy in which a run of another teacher came so far, as its record would say."""
        run = Path(shutil.copytree(finished, tmp_path / after))
        record = json.loads((run / "run.json").read_text())
        changed = {stage["stage"]: f"{stage['key'][:-4]}beef" for stage in record["stages"]}
        for stage in record["stages"]:
            name = stage["stage"]
            stage["key"] = changed[name]
            stage["after"] = stage["after"] and [stage["after"][0], changed[stage["after"][0]]]
            if name == after:
                break
        (run / "run.json").write_text(json.dumps(record))
        return run

    early = cut_off("teacher")
    for ask in (
        lambda: afterwards.rebuild_report(early),
        lambda: afterwards.rebenchmark(early, QUICK),
        lambda: afterwards.export_run(early, Wish("onnx"), tmp_path / "out"),
        lambda: measured(early),
        lambda: measured(early, data=load_recipe(finished / afterwards.RECIPE)),
        lambda: afterwards.audit_run(early, {}),
    ):
        with pytest.raises(RunFolderError, match=r"'export'.*is of an earlier run"):
            ask()
    late = cut_off("export")
    for ask in (lambda: afterwards.rebuild_report(late), lambda: afterwards.bisect_run(late)):
        with pytest.raises(RunFolderError, match=r"report\.json.*about an earlier student"):
            ask()
    for ask in (lambda: afterwards.rebenchmark(late, QUICK), lambda: measured(late)):
        with pytest.raises(RunFolderError, match=r"'quantize'.*is of an earlier run"):
            ask()


def test_a_second_run_without_its_data_is_timed_without_accuracy(finished, otherwise, tmp_path):
    broken = Path(shutil.copytree(otherwise, tmp_path / "broken"))
    (broken / "run.json").write_text((finished / "run.json").read_text())
    rows, told = measured(finished, broken)
    assert rows["broken teacher"] == (None, None)
    assert "the data of" in told[0]


# ---- where results are written


@pytest.mark.parametrize("place", ["file", "file/x"])
def test_a_package_is_not_begun_where_it_cant_be_written(finished, tmp_path, place, monkeypatch):
    monkeypatch.setattr(afterwards, "load", lambda _: pytest.fail("work was done before"))
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="can't write into the folder") as caught:
        afterwards.export_run(finished, Wish("onnx"), tmp_path / place)
    assert "another --out" in caught.value.remedy


@pytest.mark.parametrize(
    ("command", "out", "words"),
    [
        (["counterfactual", "train"], "file", "can't write into"),
        (["explain"], "file/x.html", "can't write into"),
        (["explain"], "dir.html", "a folder of that name"),
    ],
)
def test_where_nothing_can_be_written_no_work_is_done(tmp_path, monkeypatch, capsys, command, out, words):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("dir.html").mkdir()
    given = ["--arch", "absent.py:build", "--data", "npz:absent.npz", "--out", out, "-q"]
    assert main([*command, *given]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "another --out" in said
    assert "absent" not in said


def test_two_exports_do_not_share_a_folder(tmp_path):
    with package_folder(tmp_path / "p") as (scratch, _):
        (scratch / "model.onnx").touch()
        with pytest.raises(RunFolderError, match="busy"), package_folder(tmp_path / "p"):
            pytest.fail("the second was let in")
        assert (scratch / "model.onnx").is_file()
    with package_folder(tmp_path / "p") as (scratch, _):
        assert list(scratch.iterdir()) == []


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
