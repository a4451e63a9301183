"""What a budget that can't be met is told."""

from __future__ import annotations

import math

import pytest

from causal_compress.recipe import PlanSection
from causal_compress.shrink.costs import FileCosts
from causal_compress.shrink.refusal import impossible, rounded_up


@pytest.mark.parametrize("share", [1.0, 0.16561, 0.1656, 0.300, 0.010004, 0.00999, 0.0054321, 6e-5, 1.2345e-7])
def test_asking_for_what_is_shown_can_be_met(share: float) -> None:
    shown = float(rounded_up(share))
    assert share <= shown * (1 + 1e-9)
    assert shown - share <= max(0.001, 0.01 * share)
    assert math.isclose(float(rounded_up(shown)), shown)  # nothing is added to what is round already


def test_what_the_recipe_has_switched_off_comes_first() -> None:
    section = PlanSection(low_rank=False, depth=False, align=8)
    error = impossible({"macs": 0.1}, {"macs": 0.16561, "params": 0.2}, section, None)
    assert error.found == "the smallest possible plans keep 0.166 of the MACs, 0.200 of the parameters"
    assert error.wanted == "budget.macs: 0.1"
    assert error.remedy.startswith("raise the budget, set plan.depth: true or plan.low_rank: true")
    assert "plan.align (now 8)" in error.remedy


def test_nothing_is_proposed_that_is_so_already() -> None:
    error = impossible({"macs": 0.1}, {"macs": 0.3}, PlanSection(), None)
    assert ": true" not in error.remedy
    assert "plan.align" not in error.remedy


def test_a_limit_on_the_file_is_told_in_bytes() -> None:
    costs = FileCosts(whole=2_000, layer=0.0, each=4, graph=())
    error = impossible({"bytes": 0.1}, {"bytes": 0.25, "macs": 0.2, "params": 0.3}, PlanSection(), costs)
    assert error.found == "the smallest possible plans keep about 500 bytes, 0.200 of the MACs, 0.300 of the parameters"
    assert error.wanted == "budget.size_bytes: 200"
