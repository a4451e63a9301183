"""Channel counts that are tried."""

from __future__ import annotations

import pytest

from causal_compress.recipe import PlanSection
from causal_compress.shrink.widths import aligned


@pytest.mark.parametrize(
    ("align", "least", "wanted"), [(16, 20, [32, 32, 32]), (16, 4, [16, 16, 32]), (1, 20, [20, 20, 32])]
)
def test_counts_are_multiples_also_where_the_least_count_is_none(align: int, least: int, wanted: list[int]) -> None:
    section = PlanSection(align=align, min_channels=least)
    assert [aligned(64, share, section) for share in (0.125, 0.25, 0.5)] == wanted
    assert aligned(18, 0.5, section) <= 18
