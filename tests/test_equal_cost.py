"""Tables of several runs put together (benchmarks/equal_cost.py): which rows stay, and which means."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # its scripts are no package

from equal_cost import together


def row(method: str, seed: int, accuracy: float, epochs: int = 15) -> dict[str, Any]:
    return {
        "arch": "resnet20",
        "equal": "macs",
        "method": method,
        "recovery_epochs": epochs,
        "seed": seed,
        "accuracy_pct": accuracy,
    }


def mean(method: str, seeds: int, accuracy: float) -> dict[str, Any]:
    return {**{k: v for k, v in row(method, 0, accuracy).items() if k != "seed"}, "seeds": seeds}


def test_rows_of_other_runs_stay_and_those_of_the_same_student_are_replaced() -> None:
    before = {"rows": [row("ours", 0, 91.0), row("random", 0, 90.0), row("ours", 0, 88.0, epochs=0)]}
    found = together(before, [row("random", 0, 89.5), row("random", 1, 89.0)], [])["rows"]
    said = [(r["recovery_epochs"], r["seed"], r["method"], r["accuracy_pct"]) for r in found]
    assert said == [
        (0, 0, "ours", 88.0),
        (15, 0, "ours", 91.0),
        (15, 0, "random", 89.5),
        (15, 1, "random", 89.0),
    ]
    assert ["cpu" in r for r in found] == [False, False, True, True]  # only of what was measured here


def test_a_mean_gives_way_to_one_of_as_many_seeds_only() -> None:
    before = {"over_seeds": [mean("ours", 3, 91.0), mean("Taylor", 2, 90.0)]}
    found = together(before, [], [mean("ours", 1, 92.0), mean("Taylor", 2, 90.5), mean("random", 1, 89.0)])
    assert [(r["method"], r["seeds"], r["accuracy_pct"]) for r in found["over_seeds"]] == [
        ("ours", 3, 91.0),
        ("Taylor", 2, 90.5),
        ("random", 1, 89.0),
    ]


def test_the_first_run_has_nothing_beside_it() -> None:
    assert [r["method"] for r in together({}, [row("random", 0, 89.0), row("ours", 0, 91.0)], [])["rows"]] == [
        "ours",
        "random",
    ]


def test_rows_from_before_latency_could_be_equal_are_of_equal_macs() -> None:
    old = [{key: value for key, value in row("ours", 0, 88.0, epochs=0).items() if key != "equal"}]
    found = together({"rows": old}, [row("ours", 0, 91.0)], [])["rows"]
    assert [(r["equal"], r["recovery_epochs"], r["accuracy_pct"]) for r in found] == [
        ("macs", 0, 88.0),
        ("macs", 15, 91.0),
    ]
