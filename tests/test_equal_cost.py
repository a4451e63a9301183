"""Students at equal cost (benchmarks/equal_cost.py): how they are kept, which rows of several runs stay together."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import fx, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # its scripts are no package

import equal_cost
from equal_cost import Contest, Made, Teacher, student_of
from equal_cost_tables import together


def row(
    method: str, seed: int, accuracy: float, epochs: int = 15, hits: NDArray[np.bool_] | None = None
) -> dict[str, Any]:
    return {
        "arch": "resnet20",
        "equal": "macs",
        "method": method,
        "recovery_epochs": epochs,
        "seed": seed,
        "macs_kept": 0.5,
        "accuracy_pct": accuracy,
        "n": None if hits is None else len(hits),
        "recovered_on": None,
        "hits": hits,
    }


def answered(method: str, seed: int, right: str, epochs: int = 15) -> dict[str, Any]:
    """A row whose answers are spelt out: 1 for each test input that was answered rightly."""
    hits = np.array([letter == "1" for letter in right])
    return row(method, seed, 100.0 * float(hits.mean()), epochs, hits)


def stored(rows: list[dict[str, Any]], over_seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """A results file of before answers were kept."""
    return {"rows": [{k: v for k, v in row.items() if k != "hits"} for row in rows], "over_seeds": over_seeds}


def mean(method: str, seeds: int, accuracy: float) -> dict[str, Any]:
    return {**{k: v for k, v in row(method, 0, accuracy).items() if k not in ("seed", "hits", "n")}, "seeds": seeds}


def test_rows_of_other_runs_stay_and_those_of_the_same_student_are_replaced() -> None:
    before = stored([row("ours", 0, 91.0), row("random", 0, 90.0), row("ours", 0, 88.0, epochs=0)], [])
    found = together(before, [row("random", 0, 89.5), row("random", 1, 89.0)])["rows"]
    said = [(r["recovery_epochs"], r["seed"], r["method"], r["accuracy_pct"]) for r in found]
    assert said == [
        (0, 0, "ours", 88.0),
        (15, 0, "ours", 91.0),
        (15, 0, "random", 89.5),
        (15, 1, "random", 89.0),
    ]
    assert not any("hits" in r for r in found)


def test_a_mean_gives_way_to_one_of_as_many_seeds_only() -> None:
    before = stored([], [mean("ours", 3, 91.0), mean("Taylor", 1, 90.0)])
    new = [answered("ours", 0, "1110"), answered("Taylor", 0, "1010"), answered("random", 0, "1000")]
    found = together(before, new)["over_seeds"]
    assert [(r["method"], r["seeds"], r["accuracy_pct"]) for r in found] == [
        ("ours", 3, 91.0),
        ("Taylor", 1, 50.0),
        ("random", 1, 25.0),
    ]


def test_the_first_run_has_nothing_beside_it() -> None:
    assert [r["method"] for r in together({}, [row("random", 0, 89.0), row("ours", 0, 91.0)])["rows"]] == [
        "ours",
        "random",
    ]


def test_rows_from_before_latency_could_be_equal_are_of_equal_macs() -> None:
    old = [{key: value for key, value in row("ours", 0, 88.0, epochs=0).items() if key not in ("equal", "hits")}]
    found = together({"rows": old}, [row("ours", 0, 91.0)])["rows"]
    assert [(r["equal"], r["recovery_epochs"], r["accuracy_pct"]) for r in found] == [
        ("macs", 0, 88.0),
        ("macs", 15, 91.0),
    ]


def test_sittings_are_paired_by_the_answers_in_the_results() -> None:
    rows = [
        answered("ours", 0, "1111011100"),
        answered("Taylor", 0, "1101011000"),
        answered("ours", 1, "1111111100"),
        answered("Taylor", 1, "0111011101"),
    ]
    whole = together({}, rows)
    at_last = json.loads(json.dumps(together({}, rows[:1])))
    for later in rows[1:]:
        at_last = json.loads(json.dumps(together(at_last, [later])))
    assert at_last == json.loads(json.dumps(whole))
    distances = {(r["method"], r["seed"]): r["behind_ours_pp"] for r in at_last["rows"]}
    assert distances == {("ours", 0): None, ("Taylor", 0): 20.0, ("ours", 1): None, ("Taylor", 1): 10.0}
    both = next(r for r in at_last["over_seeds"] if r["method"] == "Taylor")
    assert (both["seeds"], both["accuracy_pct"], both["behind_ours_pp"]) == (2, 60.0, 15.0)


def test_a_row_without_answers_keeps_the_distance_it_was_written_with() -> None:
    old = stored([{**row("Taylor", 0, 90.7), "behind_ours_pp": 0.4, "behind_ours_ci_pp": [0.1, 0.7]}], [])
    found = together(old, [answered("ours", 0, "1110")])["rows"]
    assert [(r["method"], r["behind_ours_pp"], r["behind_ours_ci_pp"]) for r in found] == [
        ("ours", None, None),
        ("Taylor", 0.4, [0.1, 0.7]),
    ]


def test_students_of_another_teacher_are_not_compared() -> None:
    other = {**answered("ours", 0, "1111"), "arch": "resnet56"}
    found = together({}, [other, answered("Taylor", 0, "1010")])
    assert [r["behind_ours_pp"] for r in found["rows"]] == [None, None]
    assert [r["behind_ours_pp"] for r in found["over_seeds"]] == [None, None]


def contest(work: Path, settings: list[str]) -> Contest:
    given = argparse.Namespace(work=work, arch="resnet20", settings=settings)
    teacher = SimpleNamespace(equal="macs", limit=0.5, recipe=SimpleNamespace(seed=3))
    return Contest(given, cast(Teacher, teacher), cast(Any, lambda: SimpleNamespace(recipe=None)))


@pytest.fixture
def makings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the methods that made a student; each makes a graph that calls its nodes as a tracer would not."""
    names: list[str] = []

    def make(case: Any, name: str, method: Any) -> Made:
        names.append(name)
        graph = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        for node in graph.graph.nodes:
            node.name = f"own_{node.name}"
        graph.recompile()
        return Made(graph, [("own__1", "theirs")], {"params": 23})

    monkeypatch.setattr(equal_cost, "make", make)
    monkeypatch.setattr(equal_cost, "replace", lambda case, **changes: case)
    return names


def test_a_student_read_back_answers_alike_and_calls_its_nodes_as_before(tmp_path: Path, makings: list[str]) -> None:
    first = student_of(contest(tmp_path, []), "ours", cast(Any, None))
    again = student_of(contest(tmp_path, []), "ours", cast(Any, None))
    assert makings == ["ours"]
    assert isinstance(again.model, fx.GraphModule)
    assert "own__1" in [node.name for node in again.model.graph.nodes]
    assert (again.pairs, again.about) == ([("own__1", "theirs")], {"params": 23})
    x = torch.randn(5, 4)
    assert first.model is not None
    assert torch.equal(first.model(x), again.model(x))


def test_students_of_other_settings_and_methods_are_others(tmp_path: Path, makings: list[str]) -> None:
    for settings, name in (([], "ours"), (["plan.low_rank=false"], "ours"), ([], "no refit"), ([], "ours")):
        student_of(contest(tmp_path, settings), name, cast(Any, None))
    assert makings == ["ours", "ours", "no refit"]
