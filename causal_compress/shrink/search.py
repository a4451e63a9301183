"""The smallest network within an accuracy budget: tighten while validation allows it, back off when it does not."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from causal_compress.errors import BudgetError
from causal_compress.recipe import BudgetSection, SearchSection
from causal_compress.results import Pareto, SearchPoint

logger = logging.getLogger(__name__)

_FIRST = 0.5
_NEAR = 1.06
"""Shares whose ratio is below this are not worth another point."""


def searches(budget: BudgetSection) -> bool:
    """Whether a budget leaves the size open: a limit on the drop of accuracy, and none on a cost."""
    costs = (budget.macs, budget.params, budget.latency_ms)
    return budget.max_accuracy_drop is not None and all(cost is None for cost in costs)


def search(
    attempt: Callable[[float], SearchPoint | None], section: SearchSection, *, limit_pp: float, least: float
) -> Pareto:
    """Bisect the share of MACs, on a logarithmic scale, by the drop that each point is measured to cost.

    Args:
        attempt: Compresses to a share of the teacher's MACs, recovers briefly, and measures on validation data; None
            where that can't be done, which counts as too small.
        section: How many points at most.
        limit_pp: Largest drop of accuracy [pp].
        least: Smallest share of MACs that any plan can reach.

    Returns:
        Every point, the Pareto front among them, and the smallest point within the limit; where there is none, the one
        that lost least.

    Raises:
        BudgetError: nothing that was tried could be carried out.

    Limits: takes the drop to rise as the share falls; noise of a small validation split can mislead it by a step.
    """
    points: list[SearchPoint] = []
    fails, holds = min(least, 1.0), 1.0
    share = max(_FIRST, math.sqrt(fails))
    for _ in range(section.points):
        point = attempt(share)
        within = point is not None and point.drop_pp <= limit_pp
        if point is not None:
            points.append(point)
            logger.info(
                "search: %.3f of the MACs: drop %.2f pp (95 %% interval %.2f to %.2f, n = %d), %s",
                point.macs,
                point.drop_pp,
                *point.drop_ci_pp,
                point.n,
                "tighter next" if within else "back off",
            )
        fails, holds = (fails, share) if within else (share, holds)
        if holds / fails < _NEAR:
            break
        share = math.sqrt(fails * holds)
    if not points:
        raise BudgetError(
            "no size could be carried out",
            found=f"{section.points} shares of MACs tried, the largest {share:.3f}",
            remedy="set budget.macs to a larger share, or look at the warnings above",
        )
    return _judged(points, limit_pp)


def _judged(points: Sequence[SearchPoint], limit_pp: float) -> Pareto:
    within = [index for index, point in enumerate(points) if point.drop_pp <= limit_pp]
    chosen = min(
        within or range(len(points)),
        key=lambda index: points[index].macs if within else (points[index].drop_pp, points[index].macs),
    )
    best = points[chosen]
    text = f"{best.macs:.3f} of the MACs at a validation drop of {best.drop_pp:.2f} pp (n = {best.n:,})"
    return Pareto(
        points=tuple(points),
        front=front_of(points),
        chosen=chosen,
        met=bool(within),
        limit_pp=limit_pp,
        reason=f"smallest of {len(points)} points within {limit_pp:g} pp: {text}"
        if within
        else f"none of {len(points)} points stays within {limit_pp:g} pp; the best, {text}, is kept",
    )


def front_of(points: Sequence[SearchPoint]) -> tuple[int, ...]:
    """Positions of the points that no other beats in both MACs and drop, from the smallest network to the largest."""
    order = sorted(range(len(points)), key=lambda index: (points[index].macs, points[index].drop_pp))
    front: list[int] = []
    for index in order:
        if not front or points[index].drop_pp < points[front[-1]].drop_pp:
            front.append(index)
    return tuple(front)
