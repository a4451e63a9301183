"""Faults that are told of what is not there, of numbers that look like text, and of text that is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from causal_compress.cli import main
from causal_compress.errors import RecipeError
from causal_compress.recipe_file import load_recipe

MISSING = (
    "budget.latency_ms.keep is missing; it must be a number in (0, 1] (largest share of the teacher's latency; "
    "10th percentiles, of undisturbed calls). Add it."
)


def told(path: Path | None, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_a_missing_key_is_told_with_the_override_that_lacks_it() -> None:
    for override in ("budget.latency_ms.batch=8", "budget.latency_ms={batch: 8}", "budget={latency_ms: {batch: 8}}"):
        assert f"--set {override}: {MISSING}" in told(None, override)


def test_a_missing_key_is_told_with_its_section_s_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("budget:\n  macs: 0.5\n  latency_ms:\n    batch: 8\n")
    assert f"recipe.yaml:3: {MISSING}" in told(path)
    path.write_text("budget:\n  latency_ms: null\n")
    assert told(path, "budget.latency_ms.batch=8").startswith("--set budget.latency_ms.batch=8: ")


@pytest.mark.parametrize(
    ("ranges", "wanted"),
    [
        ("{a: [1]}", "counterfactual.ranges.a must be a list of 2 (a number, a number), got [1]."),
        ("{a: []}", "counterfactual.ranges.a must be a list of 2 (a number, a number), got []."),
        ("{a: [1, 2, 3]}", "counterfactual.ranges.a must be a list of 2 (a number, a number), got [1, 2, 3]."),
        ("{a: [1, x]}", "counterfactual.ranges.a[1] must be a number, got 'x'."),
    ],
)
def test_a_list_of_the_wrong_length_is_told(ranges: str, wanted: str) -> None:
    assert wanted in told(None, f"counterfactual.ranges={ranges}")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("010", "got '010'. Write 10, without leading zeros."),
        ("'10'", "got '10'. Remove the quotes."),
        ("1_0.0", "got '1_0.0'."),
        ("inf", "got 'inf'."),
    ],
)
def test_quotes_are_spoken_of_only_where_there_are_some(value: str, hint: str) -> None:
    assert told(None, f"distill.epochs={value}").splitlines()[0].endswith(hint)


def test_a_path_that_is_no_utf_8_is_told_by_its_key(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = os.fsdecode(b"csv:t\xff.csv")
    assert main(["analyze", "--arch", "m.py:build", "--data", path, "--out", "absent"]) == 2
    said = capsys.readouterr().err
    assert "data.source must be UTF-8 text, got 'csv:t\\udcff.csv'. Rename the file" in said
    assert "must be a mapping" not in said
    assert "a key must be plain text" in told(None, 'model.args={"\\udcff": 1}')


def test_what_lies_beyond_the_first_plane_is_text() -> None:
    assert load_recipe(None, ['data.source="npz:\\ud83d\\ude00.npz"']).data.source == "npz:\U0001f600.npz"
