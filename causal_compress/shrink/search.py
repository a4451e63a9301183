"""The smallest network within an accuracy budget: tighten while validation allows it, back off when it does not."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from causal_compress.errors import BudgetError
from causal_compress.recipe import BudgetSection, SearchSection
from causal_compress.results import Pareto, SearchPoint

logger = logging.getLogger(__name__)

Attempt = Callable[[float], SearchPoint | None]

_FIRST = 0.5
_NEAR = 1.06
"""Shares whose ratio is below this are not worth another point."""


def searches(budget: BudgetSection) -> bool:
    """Whether a budget leaves the size open: a limit on the drop of accuracy, and none on a cost."""
    costs = (budget.macs, budget.params, budget.latency_ms)
    return budget.max_accuracy_drop is not None and all(cost is None for cost in costs)


def search(
    attempt: Attempt, section: SearchSection, *, limit_pp: float, least: float, in_full: Attempt | None = None
) -> Pareto:
    """Bisect the share of MACs, on a logarithmic scale, by the drop that each point is expected to cost in the end.

    The first point whose drop after a short recovery exceeds the limit is recovered in full as well. What is left of
    its drop then, as a share, is expected to be left of the other points' drops too.

    Args:
        attempt: Compresses to a share of the teacher's MACs, recovers briefly, and measures on validation data; None
            where that can't be done, which counts as too small.
        section: How many points at most.
        limit_pp: Largest drop of accuracy [pp].
        least: Smallest share of MACs that any plan can reach.
        in_full: As `attempt`, recovered for all of the recipe's epochs; None: the short recovery is all there is.

    Returns:
        Every point, the Pareto front among them, and the smallest point within the limit; where there is none, the one
        that lost least.

    Raises:
        BudgetError: nothing that was tried could be carried out.

    Limits: takes the drop to rise as the share falls; noise of a small validation split can mislead it by a step.
    """
    points: list[SearchPoint] = []
    remains: float | None = None
    fails, holds = min(least, 1.0), 1.0
    share = max(_FIRST, math.sqrt(fails))
    for _ in range(section.points):
        found = attempt(share)
        if found is not None:
            whole = in_full(share) if in_full and remains is None and found.drop_pp > limit_pp else None
            remains = remains if whole is None else min(max(whole.drop_pp / found.drop_pp, 0.0), 1.0)
            points += [found] if whole is None else [found, whole]
        within = found is not None and _expected(points[-1], points, remains).judged_pp <= limit_pp
        if found is not None:
            _tell(_expected(points[-1], points, remains), within=within)
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
    return _judged([_expected(point, points, remains) for point in points], limit_pp, remains)


def _expected(point: SearchPoint, points: Sequence[SearchPoint], remains: float | None) -> SearchPoint:
    """The point with the drop that is expected of it: that of its own full recovery, or a share of its short one's."""
    if remains is None:
        return point
    whole = max(points, key=lambda other: (other.asked_macs == point.asked_macs, other.epochs))
    expected = whole.drop_pp if whole.asked_macs == point.asked_macs and whole.epochs > point.epochs else None
    if expected is None and point.epochs < max(other.epochs for other in points) and point.drop_pp > 0:
        expected = remains * point.drop_pp
    return point if expected is None else replace(point, expected_drop_pp=expected)


def _tell(point: SearchPoint, *, within: bool) -> None:
    logger.info(
        "search: %.3f of the MACs: drop %.2f pp (95 %% interval %.2f to %.2f, n = %d) after %d epochs%s, %s",
        point.macs,
        point.drop_pp,
        *point.drop_ci_pp,
        point.n,
        point.epochs,
        "" if point.expected_drop_pp is None else f", {point.expected_drop_pp:.2f} pp expected after all",
        "tighter next" if within else "back off",
    )


def _judged(points: Sequence[SearchPoint], limit_pp: float, remains: float | None) -> Pareto:
    within = [index for index, point in enumerate(points) if point.judged_pp <= limit_pp]
    chosen = min(
        within or range(len(points)),
        key=lambda index: points[index].macs if within else (points[index].judged_pp, points[index].macs),
    )
    best = points[chosen]
    kind = "validation drop" if best.expected_drop_pp is None else "expected drop"
    text = f"{best.macs:.3f} of the MACs at a {kind} of {best.judged_pp:.2f} pp (n = {best.n:,})"
    return Pareto(
        points=tuple(points),
        front=front_of(points),
        chosen=chosen,
        met=bool(within),
        limit_pp=limit_pp,
        reason=f"smallest of {len(points)} points within {limit_pp:g} pp: {text}"
        if within
        else f"none of {len(points)} points stays within {limit_pp:g} pp; the best, {text}, is kept",
        remains=remains,
    )


def front_of(points: Sequence[SearchPoint]) -> tuple[int, ...]:
    """Positions of the points that no other beats in both MACs and drop, from the smallest network to the largest."""
    order = sorted(range(len(points)), key=lambda index: (points[index].macs, points[index].judged_pp))
    front: list[int] = []
    for index in order:
        if not front or points[index].judged_pp < points[front[-1]].judged_pp:
            front.append(index)
    return tuple(front)
