"""The smallest network within an accuracy budget: tighten while validation allows it, back off when it does not."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from statistics import NormalDist

from causal_compress.errors import BudgetError
from causal_compress.recipe import BudgetSection, SearchSection
from causal_compress.results import Pareto, SearchPoint

logger = logging.getLogger(__name__)

Attempt = Callable[[float], SearchPoint | None]
Feared = Callable[[SearchPoint], float]
"""The drop [pp] that a point may not exceed: its own, or more, where the search has to be surer than that."""

_FIRST = 0.5
_NEAR = 1.1
"""Shares whose ratio is below this are not worth another point: validation inputs don't tell such drops apart."""
_SMALLEST = 1e-4
_WITHIN_REACH = 4.0
"""A drop of up to so many limits says where between two sizes the limit lies; a larger one says only that it does."""
_LEAST_STEP = 0.1


def searches(budget: BudgetSection) -> bool:
    """Whether a budget leaves the size open: a limit on the drop of accuracy, and none on a cost."""
    costs = (budget.macs, budget.params, budget.size_bytes, budget.latency_ms)
    return budget.max_accuracy_drop is not None and all(cost is None for cost in costs)


@dataclass
class _Size:
    """One share of MACs: what a short recovery left of it and, where that was tried, what a full one did."""

    short: SearchPoint
    whole: SearchPoint | None = None
    impossible: bool = False

    def recover(self, in_full: Attempt) -> None:
        """A size that can't be recovered in full could not be delivered: it has no points from then on."""
        self.whole = in_full(self.short.asked_macs)
        self.impossible = self.whole is None

    def points(self, remains: float | None) -> list[SearchPoint]:
        """Its points, the short one with the drop that is expected in the end; the last of them is what counts."""
        short, whole = self.short, self.whole
        if self.impossible:
            return []
        if whole is not None:
            return [replace(short, expected_drop_pp=whole.drop_pp), whole]
        if remains is None or short.drop_pp <= 0:
            return [short]
        return [replace(short, expected_drop_pp=remains * short.drop_pp)]


def search(
    attempt: Attempt, section: SearchSection, *, limit_pp: float, least: float, in_full: Attempt | None = None
) -> Pareto:
    """Close in on the limit, between a share that holds and one that fails, by the drop that each should end with.

    The next share is where a straight line between both drops, over the logarithm of the share, meets the limit. Drops
    rise faster and faster as networks shrink, so that share should hold, and few points are needed. Where a drop is far
    beyond the limit, or not known, the interval is halved.

    The first point whose drop after a short recovery exceeds the limit is recovered in full as well. What is left of
    its drop then, as a share, is expected to be left of the other points' drops too. Nothing is chosen on such an
    expectation alone: the smallest point that should hold is recovered in full, and if less has healed there than
    thought, its share counts from then on.

    Args:
        attempt: Compresses to a share of the teacher's MACs, recovers briefly, and measures on validation data; None
            where that can't be done, which counts as too small.
        section: How many sizes at most, and how sure the search has to be that the drop holds.
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
    sizes: list[_Size] = []
    feared = partial(_feared, confidence=section.confidence)
    fails, holds = _least(least), 1.0
    share = first_share(least)
    for _ in range(section.points):
        found = attempt(share)
        within = False
        if found is not None:
            sizes.append(_Size(found))
            if in_full and _remains(sizes) is None and found.drop_pp > 0 and feared(found) > limit_pp:
                sizes[-1].recover(in_full)
            for judged in sizes[-1].points(_remains(sizes))[-1:]:
                within = feared(judged) <= limit_pp
                _tell(judged, within=within)
        fails, holds = (fails, share) if within else (share, holds)
        if fails >= holds:  # nothing lies between: not even the largest size holds, or it is the only one
            break
        share = _rounded(_next(sizes, (fails, holds), limit_pp, feared))
        if min(holds / fails, (holds / share) ** 2) < _NEAR:  # halving reaches both at once
            break
    return _settled(sizes, limit_pp, in_full, feared)


def first_share(least: float) -> float:
    """The share of MACs that a search begins with: half of them, or more where no plan can reach that.

    Args:
        least: Smallest share of MACs that any plan can reach.
    """
    return _rounded(max(_FIRST, math.sqrt(_least(least))))


def _least(share: float) -> float:
    return min(max(share, _SMALLEST), 1.0)


def _feared(point: SearchPoint, confidence: float) -> float:
    """With this confidence the drop is no larger, as far as chance of validation inputs goes (normal)."""
    low, high = point.drop_ci_pp
    usual = NormalDist()
    return point.judged_pp + (high - low) / 2 * usual.inv_cdf(confidence) / usual.inv_cdf(0.975)


def _next(sizes: Sequence[_Size], ends: tuple[float, float], limit_pp: float, feared: Feared) -> float:
    """The share between one that fails and one that holds at which the drop should reach the limit."""
    fails, holds = ends
    remains = _remains(sizes)
    known = {size.short.asked_macs: size.points(remains) for size in sizes}
    lost = {1.0: 0.0} | {share: feared(points[-1]) for share, points in known.items() if points}
    worst, part = lost.get(fails, math.inf), 0.5
    if limit_pp < worst <= _WITHIN_REACH * limit_pp:
        part = min(max((worst - limit_pp) / (worst - lost[holds]), _LEAST_STEP), 1.0 - _LEAST_STEP)
    return fails * math.pow(holds / fails, part)


def _rounded(share: float) -> float:
    """Upwards to four digits: a share names a folder."""
    return min(math.ceil(1e4 * share) / 1e4, 1.0)


def _remains(sizes: Sequence[_Size]) -> float | None:
    """The share of a short recovery's drop that a full one leaves, by the size that healed least."""
    shares = [
        min(max(size.whole.drop_pp / size.short.drop_pp, 0.0), 1.0)
        for size in sizes
        if size.whole is not None and size.short.drop_pp > 0
    ]
    return max(shares, default=None)


def _settled(sizes: Sequence[_Size], limit_pp: float, in_full: Attempt | None, feared: Feared) -> Pareto:
    """The smallest size that holds; one that is only expected to is recovered in full before it counts."""
    while any(not size.impossible for size in sizes):
        remains = _remains(sizes)
        pareto = _judged([found for size in sizes if (found := size.points(remains))], limit_pp, remains, feared)
        chosen = pareto.points[pareto.chosen]
        size = next(size for size in sizes if size.short.asked_macs == chosen.asked_macs)
        if in_full is None or remains is None or not pareto.met or size.whole is not None:
            return pareto
        size.recover(in_full)
        for judged in size.points(remains)[-1:]:
            _tell(judged, within=feared(judged) <= limit_pp)
    raise BudgetError(
        "no size could be carried out",
        found=f"{len(sizes)} shares of MACs could be cut out, and none of them recovered in full",
        remedy="set budget.macs to a larger share, or look at the warnings above",
    )


def _tell(point: SearchPoint, *, within: bool) -> None:
    logger.info(
        "search: %.3f of the MACs: drop %.2f pp (95 %% interval %.2f to %.2f, n = %d) after %d epochs%s, %s",
        point.macs,
        point.drop_pp,
        *point.drop_ci_pp,
        point.n,
        point.epochs,
        "" if point.expected_drop_pp is None else f", {point.expected_drop_pp:.2f} pp expected after all",
        "holds" if within else "too much",
    )


def _judged(sizes: Sequence[Sequence[SearchPoint]], limit_pp: float, remains: float | None, feared: Feared) -> Pareto:
    """The smallest size within the limit, by its last point; the one that lost least, where none is."""
    points = [point for size in sizes for point in size]
    last = [end - 1 for end in accumulate(map(len, sizes))]
    within = [index for index in last if feared(points[index]) <= limit_pp]
    if within:
        chosen = min(within, key=lambda index: points[index].macs)
    else:
        chosen = min(last, key=lambda index: (feared(points[index]), -points[index].macs))
    best = points[chosen]
    kind = "validation drop" if best.expected_drop_pp is None else "expected drop"
    text = f"{best.macs:.3f} of the MACs, {kind} {best.judged_pp:.2f} pp (n = {best.n:,})"
    if feared(best) > best.judged_pp:
        text += f", with the confidence asked for at most {feared(best):.2f} pp"
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
