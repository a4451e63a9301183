"""Every bad input of benchmarks/bad_inputs.py: the right exit code, one clear message, no traceback, nothing lost."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # its scripts are no package

import bad_inputs  # noqa: E402

CASES = bad_inputs.cases()
NAMES = [f"{group}: {case.title}" for group, case in CASES]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return bad_inputs.prepare(tmp_path_factory.mktemp("bad") / "sound")


@pytest.mark.parametrize(("group", "case"), CASES, ids=NAMES)
def test_a_bad_input_gets_a_clear_answer_and_costs_nothing(group, case, sound, tmp_path):
    row = bad_inputs.run_case(group, case, tmp_path / "case", sound, quick=True)
    assert not row.faults, row.message
    assert not row.lost, row.message
    assert row.exit_code in (1, 2, 3)
    assert 1 < row.lines <= bad_inputs.MOST_LINES
    assert not row.traceback


def test_there_are_enough_cases_and_none_twice():
    assert len(set(NAMES)) == len(NAMES) >= 25
    assert sum(case.child for _, case in CASES) >= 5


def test_a_wrong_answer_is_seen(sound, tmp_path):
    group, case = next(pair for pair in CASES if pair[1].title == "0 bytes")
    wrong = replace(case, says=("all is well",), code=3)
    row = bad_inputs.run_case(group, wrong, tmp_path / "case", sound, quick=True)
    assert row.faults == ("exit code 1, wanted 3", "it does not say 'all is well'")


def test_a_loss_is_seen(tmp_path):
    for name in ("kept", "changed", "removed"):
        (tmp_path / name).write_text("before")
    before = bad_inputs.fingerprints(tmp_path)
    (tmp_path / "changed").write_text("after")
    (tmp_path / "removed").unlink()
    for name in ("new", ".run.json.1-2.tmp", "PICKLE-WAS-RUN"):
        (tmp_path / name).touch()
    assert sorted(bad_inputs.losses(tmp_path, before)) == [
        ".run.json.1-2.tmp was left behind",
        "changed was changed",
        "code from the input was run",
        "removed was removed",
    ]


def test_a_half_written_stage_is_seen(sound, tmp_path):
    (tmp_path / "run").mkdir()
    record = (sound / "run" / "run.json").read_bytes()
    (tmp_path / "run" / "run.json").write_bytes(record)
    stages = [stage["stage"] for stage in json.loads(record)["stages"]]
    found = list(bad_inputs.losses(tmp_path, {}))
    assert f"run/teacher.json is not as {stages[0]} recorded it" in found
    assert len(found) >= len(stages)


def test_the_document_is_made_of_the_results():
    rows = json.loads(bad_inputs.RESULT.read_text(encoding="utf-8"))["rows"]
    assert [f"{row['group']}: {row['input']}" for row in rows] == NAMES, "run python benchmarks/bad_inputs.py"
    assert bad_inputs.DOCUMENT.read_text(encoding="utf-8") == bad_inputs.document(rows)
    assert not [row["input"] for row in rows if row["faults"] or row["lost"] or row["traceback"]]
    assert sum(row["process"] == "own" for row in rows) >= 5


def test_the_document_names_no_folder_of_the_machine_it_was_made_on():
    text = bad_inputs.DOCUMENT.read_text(encoding="utf-8")
    assert not re.findall(r"(?:/tmp|/home|/root|/work|site-packages)\S*", text)
