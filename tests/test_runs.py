"""Stages of a run: computed once, read back whole, copied from another run, computed again where damaged."""

import json
import time

import numpy as np
import pytest
from counted_work import RESULT, Work, opened, run_once, snapshot

from causal_compress import runs
from causal_compress.errors import RunFolderError
from causal_compress.files import sha256_of_file, sha256_of_json
from causal_compress.provenance import machine, peak_memory
from causal_compress.recipe import PlanSection, Recipe
from causal_compress.results import Accuracy, Distilled, Epoch, Skip
from causal_compress.runs import read_provenance, read_result


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


@pytest.mark.parametrize(("seconds", "epochs"), [(3600.0, 2), (0.0, 1)])
def test_time_spent_before_a_run_was_cut_off_counts(tmp_path, seconds, epochs):
    trained = Distilled(
        epochs=tuple(
            Epoch(epoch=number, loss=1.0, learning_rate=0.1, validation_pct=50.0, seconds=seconds)
            for number in range(1, epochs + 1)
        ),
        validation=Accuracy(pct=50.0, n=2, low_pct=1.0, high_pct=99.0),
        images_per_second=1.0,
        precision="fp32",
        averaged=True,
        device="cpu",
        processes=1,
        compiled=False,
    )
    with opened(tmp_path) as run:
        assert run.stage("distill", Distilled, lambda _: trained, depends={}) == trained
    (record,) = read_provenance(tmp_path).stages
    assert (7200.0 if seconds else 0.0) <= record.seconds <= (7200.0 if seconds else 60.0)


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


def carry_out(folder, **depends):
    """A run through so many stages, each of which depends on what is given for it alone."""
    with opened(folder) as run:
        for name, value in depends.items():
            run.stage(name, Accuracy, lambda _: ACCURACY, depends={"on": value})


def test_what_an_earlier_run_left_is_not_read_as_the_new_ones(tmp_path):
    carry_out(tmp_path, teacher=1, export=1, benchmark=1)
    carry_out(tmp_path, teacher=2)  # and then it was interrupted
    assert read_result(tmp_path, "teacher", Accuracy) == ACCURACY
    for stage in ("export", "benchmark"):
        with pytest.raises(RunFolderError, match=f"'{stage}'.*is of an earlier run") as refusal:
            read_result(tmp_path, stage, Accuracy)
        assert "'teacher' was made anew" in refusal.value.found
    carry_out(tmp_path, teacher=2, export=1)  # the same student as before, as it turned out
    for stage in ("export", "benchmark"):
        assert read_result(tmp_path, stage, Accuracy) == ACCURACY


def test_a_look_ahead_leaves_what_is_finished(tmp_path):
    carry_out(tmp_path, candidates=1, latency=1, search=1, plan=1, export=1)
    carry_out(tmp_path, candidates=1, latency=2, plan=2)
    assert read_result(tmp_path, "export", Accuracy) == ACCURACY


def test_a_folder_from_before_stages_named_the_one_before_is_read(tmp_path):
    carry_out(tmp_path, teacher=1, export=1)
    record = json.loads((tmp_path / "run.json").read_text())
    for stage in record["stages"]:
        assert stage.pop("after", "absent") != "absent"
    (tmp_path / "run.json").write_text(json.dumps(record))
    carry_out(tmp_path, teacher=2)
    assert read_result(tmp_path, "export", Accuracy) == ACCURACY


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
