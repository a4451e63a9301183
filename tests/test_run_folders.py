"""Folders of runs: killed, busy, of another recipe, of something else, on disks that are full or read-only."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from counted_work import RECIPE, RESULT, Work, opened, run_once, snapshot

from causal_compress import files
from causal_compress.errors import RunFolderError
from causal_compress.files import atomic_write_bytes
from causal_compress.recipe import Recipe
from causal_compress.recipe_file import recipe_sha256
from causal_compress.results import Skip
from causal_compress.runs import read_provenance

ROOT = Path(__file__).resolve().parent.parent
KILLED = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from causal_compress.recipe import Recipe
    from causal_compress.results import Skip
    from causal_compress.runs import open_run

    def second(scratch):
        (scratch / "model.safetensors").write_bytes(b"half")
        if len(sys.argv) > 2:
            (run.progress("second") / "epoch").write_text("1")
            print("ready", flush=True)
            time.sleep(60)
        (scratch / "model.safetensors").write_bytes(b"half and half")
        return Skip(what="second", reason="done")

    def first(scratch):
        return Skip(what="first", reason="done")

    with open_run(Path(sys.argv[1]), Recipe(), command=["test"]) as run:
        run.stage("first", Skip, first, depends={"a": 1})
        run.stage("second", Skip, second, depends={"first": run.key_of("first")})
    """
)


def start(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_killed_run_resumes_to_the_same_files(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with start(killed, "wait") as process:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(RunFolderError, match=f"busy.*\n.*process {process.pid} on"), opened(killed):
            pytest.fail("a busy folder was opened")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (killed / ".partial-second").exists()
    assert not (killed / "second.json").exists()
    first = (killed / "first.json").stat().st_mtime_ns
    for folder in (killed, whole):
        with start(folder) as process:
            assert process.wait() == 0
    assert (killed / "first.json").stat().st_mtime_ns == first
    names = {path.name for path in killed.iterdir()}
    assert names == {path.name for path in whole.iterdir()}
    assert names == {".lock", "first.json", "model.safetensors", "recipe.resolved.yaml", "run.json", "second.json"}
    for name in ("first.json", "second.json", "model.safetensors", "recipe.resolved.yaml"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_a_second_run_in_the_same_process_is_refused(tmp_path):
    with opened(tmp_path), pytest.raises(RunFolderError, match="busy"), opened(tmp_path):
        pytest.fail("a busy folder was opened")
    with opened(tmp_path):
        pass


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    run_once(tmp_path, Work())
    before = snapshot(tmp_path)
    other = Recipe.model_validate({"plan": {"align": 16}, "distill": None})
    with pytest.raises(RunFolderError, match="another recipe") as refusal, opened(tmp_path, other):
        pytest.fail("a folder of another recipe was opened")
    assert "found: distill is given there, None now; plan.align is 1 there, 16 now\n" in str(refusal.value)
    assert "distill" in str(refusal.value)
    assert "--reuse" in str(refusal.value)
    assert snapshot(tmp_path) == before


def test_a_run_goes_on_with_other_threads_and_another_device(tmp_path):
    work = Work()
    run_once(tmp_path, work)
    elsewhere = RECIPE.model_copy(update={"threads": 7, "device": "cpu"})
    assert elsewhere != RECIPE
    with opened(tmp_path, elsewhere):
        pass
    assert yaml.safe_load((tmp_path / "recipe.resolved.yaml").read_text())["threads"] == 7
    assert read_provenance(tmp_path).recipe_sha256 == recipe_sha256(elsewhere)
    run_once(tmp_path, work)
    assert work.calls == 1  # what was finished is kept each time


def test_a_folder_in_which_nothing_was_finished_takes_another_recipe(tmp_path):
    mistyped = Recipe.model_validate({"model": {"weights": "nope.pt"}, "seed": 3})
    with pytest.raises(FileNotFoundError), opened(tmp_path, mistyped) as run:
        run.stage("plan", Skip, lambda _: Path("nope.pt").read_text(), depends={})
    work = Work()
    run_once(tmp_path, work)
    assert work.calls == 1
    told = read_provenance(tmp_path)
    assert (told.recipe_sha256, told.seed) == (recipe_sha256(RECIPE), RECIPE.seed)
    assert yaml.safe_load((tmp_path / "recipe.resolved.yaml").read_text())["model"]["weights"] is None
    with pytest.raises(RunFolderError, match="another recipe"), opened(tmp_path, mistyped):
        pytest.fail("the folder holds a result of the right recipe now")


def test_a_folder_with_no_more_than_the_teachers_score_takes_another_recipe(tmp_path):
    calls = []

    def score(folder, recipe, stages=("teacher",)):
        with opened(folder, recipe) as run:
            for name in stages:
                run.stage(name, Skip, lambda _, name=name: calls.append(name) or RESULT, depends={"weights": "w"})

    score(tmp_path, Recipe.model_validate({"seed": 3}))
    score(tmp_path, RECIPE, ("teacher", "intervene"))
    assert calls == ["teacher", "intervene"]  # the score's own key decided that it still holds
    assert read_provenance(tmp_path).recipe_sha256 == recipe_sha256(RECIPE)
    with pytest.raises(RunFolderError, match="another recipe"):
        score(tmp_path, Recipe.model_validate({"seed": 3}))


def forget(folder, key):
    """The run folder as it was before a key of `distill` existed."""
    recipe, told = folder / "recipe.resolved.yaml", folder / "run.json"
    written = yaml.safe_load(recipe.read_text())
    del written["distill"][key]
    recipe.write_text(yaml.safe_dump(written))
    told.write_text(json.dumps(json.loads(told.read_text()) | {"recipe_sha256": "of the recipe without it"}))


def test_a_folder_made_before_a_recipe_key_existed_goes_on(tmp_path):
    work = Work()
    run_once(tmp_path, work)
    forget(tmp_path, "views")
    before = snapshot(tmp_path)
    other = Recipe.model_validate({"distill": {"views": 4}})
    with pytest.raises(RunFolderError, match="views is None there, 4 now"), opened(tmp_path, other):
        pytest.fail("the key does not have its default now")
    assert snapshot(tmp_path) == before
    run_once(tmp_path, work)
    assert work.calls == 1
    assert read_provenance(tmp_path).recipe_sha256 == recipe_sha256(RECIPE)


def test_a_folder_from_before_muon_was_trained_by_sgd(tmp_path):
    run_once(tmp_path, Work())
    forget(tmp_path, "optimizer")
    with pytest.raises(RunFolderError, match="optimizer is 'sgd' there, 'muon' now"), opened(tmp_path, RECIPE):
        pytest.fail("the student was trained by SGD")
    with opened(tmp_path, Recipe.model_validate({"distill": {"optimizer": "sgd"}})):
        pass


def test_only_what_differs_is_told_and_an_edited_recipe_does_no_harm(tmp_path):
    run_once(tmp_path, Work())
    file = tmp_path / "recipe.resolved.yaml"
    written = yaml.safe_load(file.read_text())
    del written["distill"]["views"]
    file.write_text(yaml.safe_dump(written))
    other = Recipe.model_validate({"seed": 3})
    with pytest.raises(RunFolderError, match=r"found: seed is 0 there, 3 now\n"), opened(tmp_path, other):
        pytest.fail("a folder of another recipe was opened")
    file.write_text(yaml.safe_dump({**written, 7: "seven"}))
    with pytest.raises(RunFolderError, match="7 is 'seven' there"), opened(tmp_path, other):
        pytest.fail("a folder of another recipe was opened")


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(RunFolderError, match=r"holiday\.jpg"), opened(tmp_path):
        pytest.fail("a foreign folder was opened")
    assert snapshot(tmp_path) == {"holiday.jpg": b"x"}


def test_a_run_killed_while_it_opened_its_folder_can_go_on(tmp_path):
    run_once(tmp_path / "whole", Work())
    young = tmp_path / "young"
    (young / ".partial-rewrite").mkdir(parents=True)
    (young / ".run.json.1-00000000.tmp").write_text("{")
    (young / ".lock").write_text("")
    shutil.copy(tmp_path / "whole" / "recipe.resolved.yaml", young)
    run_once(young, Work())
    assert {path.name for path in young.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_a_damaged_run_json_is_said(tmp_path):
    run_once(tmp_path, Work())
    (tmp_path / "run.json").write_bytes((tmp_path / "run.json").read_bytes()[:50])
    before = snapshot(tmp_path)
    with pytest.raises(RunFolderError, match="damaged"), opened(tmp_path):
        pytest.fail("a damaged folder was opened")
    assert snapshot(tmp_path) == before


def test_paths_that_can_be_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunFolderError, match="can't be a folder"), opened(path):
            pytest.fail("a file was opened as a folder")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EROFS, "can't be written"), (errno.EACCES, "can't be written"), (errno.ENOSPC, "no space left")],
)
def test_a_read_only_or_full_disk_at_the_start(tmp_path, monkeypatch, number, words):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), "the file")

    monkeypatch.setattr("causal_compress.runfolder.os.open", refuse)
    with pytest.raises(RunFolderError, match=words) as refusal, opened(tmp_path / "run"):
        pytest.fail("it was opened")
    assert refusal.value.remedy


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    with opened(tmp_path) as run:
        run.stage("plan", Skip, lambda _: RESULT, depends={})
    before = {name: content for name, content in snapshot(tmp_path).items() if name != ".lock"}

    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(tmp_path) as run:
        monkeypatch.setattr(files.os, "fsync", refuse)
        with pytest.raises(RunFolderError, match="no space left"):
            run.stage("rewrite", Skip, Work(), depends={})
        monkeypatch.undo()
    after = snapshot(tmp_path)
    assert {name: after[name] for name in ("plan.json", "recipe.resolved.yaml")} == {
        name: before[name] for name in ("plan.json", "recipe.resolved.yaml")
    }
    assert [record.stage for record in read_provenance(tmp_path).stages] == ["plan"]
    assert not [name for name in after if name.endswith(".tmp")]
    work = Work()
    run_once(tmp_path, work)
    assert work.calls == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_a_disk_that_fills_inside_a_stage(tmp_path, error):
    def work(_):
        raise error

    with opened(tmp_path) as run, pytest.raises(RunFolderError, match="no space left"):
        run.stage("rewrite", Skip, work, depends={})
    assert not list(tmp_path.glob(".partial-*"))


def test_other_errors_of_a_stage_are_not_touched(tmp_path):
    def work(scratch):
        return (scratch / "absent").read_text()

    with opened(tmp_path) as run, pytest.raises(FileNotFoundError):
        run.stage("rewrite", Skip, work, depends={})


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic_write_bytes(path, b"old")

    def refuse(_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(OSError, match="full"):
        atomic_write_bytes(path, b"new")
    assert snapshot(tmp_path) == {"a.json": b"old"}
