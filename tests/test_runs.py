import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from causal_compress import files, runs
from causal_compress.errors import RunFolderError
from causal_compress.files import atomic_write_bytes, sha256_of_file, sha256_of_json
from causal_compress.provenance import machine, peak_memory
from causal_compress.recipe import PlanSection, Recipe
from causal_compress.recipe_file import recipe_sha256
from causal_compress.results import Accuracy, Skip
from causal_compress.runs import open_run, read_provenance, read_result

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Recipe()
RESULT = Skip(what="conv1", reason="protected")


def opened(folder, recipe=RECIPE, **options):
    return open_run(folder, recipe, command=["causal-compress", "compress"], **options)


class Work:
    """A stage's work that counts its calls and leaves a weights file."""

    def __init__(self, result=RESULT, content=b"weights"):
        self.result, self.content, self.calls = result, content, 0

    def __call__(self, scratch):
        assert list(scratch.iterdir()) == []
        self.calls += 1
        (scratch / "rewrite.safetensors").write_bytes(self.content)
        return self.result


def run_once(folder, work, depends=None, **options):
    with opened(folder, **options) as run:
        return run.stage("rewrite", Skip, work, depends=depends or {"data": "d1"})


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_stage_is_computed_once_and_read_back(tmp_path, caplog):
    work = Work()
    assert run_once(tmp_path / "run", work) == RESULT
    with caplog.at_level("INFO"):
        assert run_once(tmp_path / "run", work) == RESULT
    assert work.calls == 1
    assert "rewrite: reused" in caplog.text
    assert (tmp_path / "run" / "rewrite.safetensors").read_bytes() == b"weights"
    assert not list((tmp_path / "run").glob(".partial-*"))


def test_run_json_tells_where_the_numbers_come_from(tmp_path):
    with opened(tmp_path) as run:
        run.note_inputs(checkpoint_sha256="c" * 64, data_sha256="d" * 64)
        run.stage("rewrite", Skip, Work(), depends={})
    provenance = read_provenance(tmp_path)
    (record,) = provenance.stages
    assert (provenance.checkpoint_sha256, provenance.data_sha256, provenance.seed) == ("c" * 64, "d" * 64, 0)
    assert provenance.command == ("causal-compress", "compress")
    assert {"python", "torch", "numpy"} <= provenance.versions.keys()
    assert provenance.machine["memory_bytes"] > 2**28
    assert set(record.files) == {"rewrite.json", "rewrite.safetensors"}
    assert record.files["rewrite.safetensors"] == sha256_of_file(tmp_path / "rewrite.safetensors")
    assert record.peak_memory_bytes > 10 * 2**20
    assert (tmp_path / "recipe.resolved.yaml").exists()


def test_another_dependency_computes_anew(tmp_path):
    work = Work()
    run_once(tmp_path, work, {"section": PlanSection()})
    run_once(tmp_path, work, {"section": PlanSection()})
    run_once(tmp_path, work, {"section": PlanSection(align=16)})
    assert work.calls == 2
    assert len(read_provenance(tmp_path).stages) == 1


def test_keys_of_earlier_stages_are_at_hand(tmp_path):
    with opened(tmp_path) as run:
        run.stage("plan", Skip, lambda _: RESULT, depends={"a": 1})
        first = run.key_of("plan")
    with opened(tmp_path) as run:
        run.stage("plan", Skip, lambda _: RESULT, depends={"a": 2})
        assert run.key_of("plan") != first


def test_files_that_a_new_result_no_longer_has_are_removed(tmp_path):
    run_once(tmp_path, Work(), {"a": 1})
    with opened(tmp_path) as run:
        run.stage("rewrite", Skip, lambda _: RESULT, depends={"a": 2})
    assert not (tmp_path / "rewrite.safetensors").exists()


def test_files_in_subfolders_are_kept(tmp_path):
    def work(scratch):
        (scratch / "weights").mkdir()
        (scratch / "weights" / "a.bin").write_bytes(b"a")
        return RESULT

    with opened(tmp_path) as run:
        run.stage("rewrite", Skip, work, depends={})
    assert (tmp_path / "weights" / "a.bin").read_bytes() == b"a"
    assert read_result(tmp_path, "rewrite", Skip) == RESULT


def test_a_stage_may_not_overwrite_another_ones_files(tmp_path):
    def thief(scratch):
        (scratch / "rewrite.json").write_text("{}")
        return RESULT

    with opened(tmp_path) as run:
        run.stage("rewrite", Skip, Work(), depends={})
        with pytest.raises(AssertionError, match=r"overwrite rewrite\.json"):
            run.stage("prune", Skip, thief, depends={})


def test_numbers_come_back_bit_for_bit(tmp_path):
    values = Accuracy(pct=0.1 + 0.2, n=7, low_pct=float("inf"), high_pct=1e-320)
    for _ in range(2):
        with opened(tmp_path) as run:
            assert run.stage("teacher", Accuracy, lambda _: values, depends={}) == values


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("rewrite.json", lambda content: content[:-9]),
        ("rewrite.json", lambda _: b""),
        ("rewrite.json", lambda content: content.replace(b"conv1", b"conv2")),
        ("rewrite.safetensors", lambda content: bytes([content[0] ^ 1]) + content[1:]),
        ("rewrite.safetensors", None),
    ],
    ids=["truncated", "empty", "edited", "flipped bit", "missing"],
)
def test_a_damaged_result_is_computed_again(tmp_path, caplog, file, damage):
    work = Work()
    run_once(tmp_path, work)
    whole = snapshot(tmp_path)[file]
    if damage is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(damage(whole))
    assert run_once(tmp_path, work) == RESULT
    assert work.calls == 2
    assert "can't be used" in caplog.text
    assert (tmp_path / file).read_bytes() == whole


def test_a_result_of_an_older_shape_is_computed_again(tmp_path):
    run_once(tmp_path, Work())
    with opened(tmp_path) as run:
        result = run.stage("rewrite", Accuracy, lambda _: ACCURACY, depends={"data": "d1"})
    assert result == ACCURACY


ACCURACY = Accuracy(pct=50.0, n=2, low_pct=1.0, high_pct=99.0)


def test_reuse_copies_equal_stages_only(tmp_path, caplog):
    old, new, work = tmp_path / "old", tmp_path / "new", Work()
    run_once(old, work)
    before = snapshot(old)
    other = Recipe.model_validate({"budget": {"macs": 0.3}})
    with caplog.at_level("INFO"):
        assert run_once(new, work, recipe=other, reuse=old) == RESULT
    assert work.calls == 1
    assert "copied from" in caplog.text
    assert snapshot(old) == before
    assert snapshot(new)["rewrite.safetensors"] == b"weights"
    assert read_provenance(new).stages == read_provenance(old).stages
    run_once(tmp_path / "third", work, {"data": "d2"}, reuse=old)
    assert work.calls == 2


def test_reuse_of_a_damaged_or_absent_run(tmp_path):
    old, work = tmp_path / "old", Work()
    run_once(old, work)
    (old / "rewrite.safetensors").write_bytes(b"other")
    run_once(tmp_path / "new", work, reuse=old)
    assert work.calls == 2
    with pytest.raises(RunFolderError, match="not a run folder"):
        run_once(tmp_path / "next", work, reuse=tmp_path / "absent")


def test_reuse_of_itself_is_a_resume(tmp_path):
    work = Work()
    run_once(tmp_path, work)
    run_once(tmp_path, work, reuse=tmp_path)
    assert work.calls == 1


def test_progress_survives_a_failure_and_is_tied_to_the_key(tmp_path):
    def step(run, fail):
        def work(_):
            done = run.progress("distill") / "done"
            seen = int(done.read_text()) if done.exists() else 0
            done.write_text(str(seen + 1))
            if fail:
                raise ZeroDivisionError
            return Skip(what="epochs", reason=str(seen + 1))

        return work

    for _ in range(2):
        with pytest.raises(ZeroDivisionError), opened(tmp_path) as run:
            run.stage("distill", Skip, step(run, fail=True), depends={"a": 1})
    with opened(tmp_path) as run:
        assert run.stage("distill", Skip, step(run, fail=False), depends={"a": 1}).reason == "3"
        assert not (tmp_path / ".progress-distill").exists()
    with pytest.raises(ZeroDivisionError), opened(tmp_path) as run:
        run.stage("distill", Skip, step(run, fail=True), depends={"a": 2})
    with opened(tmp_path) as run:
        assert run.stage("distill", Skip, step(run, fail=False), depends={"a": 3}).reason == "1"


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


def test_a_folder_made_before_a_recipe_key_existed_goes_on(tmp_path):
    work = Work()
    run_once(tmp_path, work)
    written = yaml.safe_load((tmp_path / "recipe.resolved.yaml").read_text())
    del written["distill"]["views"]
    (tmp_path / "recipe.resolved.yaml").write_text(yaml.safe_dump(written))
    told = json.loads((tmp_path / "run.json").read_text()) | {"recipe_sha256": "of the recipe without it"}
    (tmp_path / "run.json").write_text(json.dumps(told))
    before = snapshot(tmp_path)
    other = Recipe.model_validate({"distill": {"views": 4}})
    with pytest.raises(RunFolderError, match="views is None there, 4 now"), opened(tmp_path, other):
        pytest.fail("the key does not have its default now")
    assert snapshot(tmp_path) == before
    run_once(tmp_path, work)
    assert work.calls == 1
    assert read_provenance(tmp_path).recipe_sha256 == recipe_sha256(RECIPE)


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


def test_texts_and_json_are_written_whole(tmp_path):
    with opened(tmp_path) as run:
        run.write_text("scorecard.md", "ä\n")
        run.write_json("scorecard.json", RESULT)
    assert (tmp_path / "scorecard.md").read_text(encoding="utf-8") == "ä\n"
    assert json.loads((tmp_path / "scorecard.json").read_text()) == {"what": "conv1", "reason": "protected"}


def test_results_are_read_without_opening(tmp_path):
    run_once(tmp_path, Work())
    assert read_result(tmp_path, "rewrite", Skip) == RESULT
    with pytest.raises(RunFolderError, match="no finished stage 'prune'"):
        read_result(tmp_path, "prune", Skip)
    (tmp_path / "rewrite.safetensors").write_bytes(b"x")
    with pytest.raises(RunFolderError, match="damaged or changed"):
        read_result(tmp_path, "rewrite", Skip)


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic_write_bytes(path, b"old")

    def refuse(_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(OSError, match="full"):
        atomic_write_bytes(path, b"new")
    assert snapshot(tmp_path) == {"a.json": b"old"}


def test_fingerprints():
    assert sha256_of_json({"a": 1, "b": [2.5, None]}) == sha256_of_json({"b": (2.5, None), "a": 1})
    assert sha256_of_json({"a": 1}) != sha256_of_json({"a": 2})
    assert sha256_of_json(PlanSection()) != sha256_of_json(PlanSection(align=2))


def test_peak_memory_sees_a_large_array():
    with peak_memory() as small:
        pass
    with peak_memory() as large:
        block = np.ones(40_000_000)
        time.sleep(0.12)
        del block
    assert large.size_bytes - small.size_bytes > 250e6


def test_machine_is_plain_data():
    assert json.loads(json.dumps(machine())) == machine()
    assert runs.machine is machine
