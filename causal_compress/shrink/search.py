"""The smallest network within an accuracy budget: tighten while validation allows it, back off when it does not."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

from causal_compress.errors import BudgetError
from causal_compress.recipe import BudgetSection, SearchSection
from causal_compress.results import Pareto, SearchPoint
from causal_compress.understand.statistics import paired_drop

logger = logging.getLogger(__name__)

Attempt = Callable[[float], SearchPoint | None]
_FIRST = 0.5
_NEAR = 1.1
"""Shares whose ratio is below this are not worth another point: validation inputs don't tell such drops apart."""
_SMALLEST = 1e-4
_WITHIN_REACH = 4.0
"""A drop of up to so many limits says where between two sizes the limit lies; a larger one says only that it does."""
_HOPE = 2.0 * _WITHIN_REACH
"""A drop of more limits than this after a short recovery is beyond hope: no full recovery is spent on it."""
_LEAST_STEP = 0.1
_TRUSTED = 2.0
"""What heals was measured at one drop, and is taken to heal of drops up to so many times as large."""


def searches(budget: BudgetSection) -> bool:
    """Whether a budget leaves the size open: a limit on the drop of accuracy, and none on a cost."""
    costs = (budget.macs, budget.params, budget.size_bytes, budget.latency_ms)
    return budget.max_accuracy_drop is not None and all(cost is None for cost in costs)


@dataclass
class _Size:
    """One share of MACs: what a short recovery left of it and, where that was tried, what a full one did.

    A size without a short recovery was only recovered in full. One that can't be carried out has no points.
    """

    share: float
    short: SearchPoint | None = None
    whole: SearchPoint | None = None
    impossible: bool = False

    @property
    def reached(self) -> float:
        """Its share or, where few plans exist and far fewer MACs are left, theirs: between both is the same network."""
        found = self.whole or self.short
        return self.share if found is None or found.macs * _NEAR > self.share else _rounded(found.macs)

    def points(self, known: Sequence[_Size]) -> list[SearchPoint]:
        """Its points, the short one with the drop that is expected in the end; the last of them is what counts."""
        short, whole = self.short, self.whole
        if self.impossible:
            return []
        if whole is not None:
            return ([replace(short, expected_drop_pp=whole.drop_pp)] if short else []) + [whole]
        assert short is not None
        expected = _expected(short.drop_pp, known)
        return [short if expected is None else replace(short, expected_drop_pp=expected)]


def search(
    attempt: Attempt, section: SearchSection, *, limit_pp: float, least: float, in_full: Attempt | None = None
) -> Pareto:
    """Close in on the limit, between a share that holds and one that fails, by the drop that each should end with.

    The next share is where a straight line between both drops, over the logarithm of the share, meets the limit. Drops
    rise faster and faster as networks shrink, so that share should hold, and few points are needed. Where a drop is far
    beyond the limit, or not known, the interval is halved.

    The first point whose drop after a short recovery exceeds the limit, but isn't beyond hope (eight limits; networks
    that were not trained at all may be), is recovered in full as well. What is left of its drop then, as a share, is
    expected to be left of other points' drops too, up to twice that drop; what exceeds this is expected to stay.
    Nothing is chosen on such an expectation, or after a short recovery: the smallest point that should hold is
    recovered in full. If less has healed there than thought, its share counts from then on.

    What is known in full then says more than what was expected. As long as fewer than `section.full` sizes have been
    recovered in full, the next lies between the smallest that holds in full and the largest below it that doesn't,
    again by the straight line, and is recovered in full only. Where this would go on, `reason` says so.

    Args:
        attempt: Compresses to a share of the teacher's MACs, recovers briefly, and measures on validation data; None
            where that can't be done, which counts as too small.
        section: How many sizes at most, how many of them in full, and how sure the search has to be that the drop
            holds.
        limit_pp: Largest drop of accuracy [pp].
        least: Smallest share of MACs that any plan can reach.
        in_full: As `attempt`, recovered for all of the recipe's epochs; None: the short recovery is all there is.

    Returns:
        Every point, the Pareto front among the last points of all sizes, and the smallest point within the limit; where
        there is none, the one that lost least. Before that is said, the largest size has been recovered in full.

    Raises:
        BudgetError: nothing that was tried could be carried out.

    Limits: takes the drop to rise as the share falls; noise of a small validation split can mislead it by a step. Of
    sizes beyond hope it isn't known what they could have healed.
    """
    looking = _Search(attempt, section, limit_pp, _least(least), in_full)
    looking.go_briefly()
    if in_full is not None:
        looking.go_in_full(in_full)
    return looking.judged()


@dataclass
class _Search:
    attempt: Attempt
    section: SearchSection
    limit_pp: float
    least: float
    in_full: Attempt | None
    sizes: list[_Size] = field(default_factory=list)

    def go_briefly(self) -> None:
        """Short recoveries, and a full one of the first that fails."""
        fails, holds = self.least, 1.0
        share = first_share(self.least)
        for _ in range(self.section.points):
            fails, holds = (fails, self.sizes[-1].reached) if self._try_briefly(share) else (share, holds)
            if fails >= holds:  # nothing lies between: not even the largest size holds, or it is the only one
                break
            lost = {1.0: 0.0}
            for size in self.sizes:
                lost |= dict.fromkeys((size.share, size.reached), self._lost(size))
            share = _between((fails, holds), (lost.get(fails, math.inf), lost[holds]), self.limit_pp)
            if min(holds / fails, (holds / share) ** 2) < _NEAR:  # halving reaches both at once
                break

    def _try_briefly(self, share: float) -> bool:
        found = self.attempt(share)
        size = _Size(share, short=found, impossible=found is None)
        self.sizes.append(size)
        learnt = any(_remains(other) is not None for other in self.sizes)
        if self.in_full and found and not learnt and found.drop_pp > 0 and not self._holds(size) and self._hopes(size):
            self._recover(size, self.in_full)
        else:
            self._tell(size)
        return self._holds(size)

    def go_in_full(self, in_full: Attempt) -> None:
        """Full recoveries of what should hold, until it does, and between what is known, as many as are asked for."""
        while (share := self._next_in_full()) is not None:
            size = next((size for size in self.sizes if size.share == share), None)
            if size is None:
                size = _Size(share)
                self.sizes.append(size)
            self._recover(size, in_full)

    def _recover(self, size: _Size, in_full: Attempt) -> None:
        """A size that can't be recovered in full could not be delivered: it has no points from then on."""
        size.whole = in_full(size.share)
        size.impossible = size.whole is None
        self._tell(size)

    def _next_in_full(self) -> float | None:
        """The share that is to be recovered in full; None: the search is at its end."""
        able = [size for size in self.sizes if not size.impossible]
        if not able:
            return None
        holding = [size for size in able if self._holds(size)]
        best = (
            min(holding, key=lambda size: self._last(size).macs) if holding else max(able, key=lambda size: size.share)
        )
        spent = sum(size.whole is not None for size in able) >= self.section.full
        if best.whole is None and not (spent and any(size.whole is not None for size in holding)):
            return best.share
        return None if spent else self._further()

    def _ends(self) -> tuple[_Size, _Size | None]:
        """The smallest size that holds in full, or the teacher, and the largest below it that is known to fail."""
        teacher = _Size(1.0)
        proven = [size for size in self.sizes if size.whole is not None and self._holds(size)]
        holds = min(proven, key=lambda size: size.share, default=teacher)
        failing = [
            size
            for size in self.sizes
            if size.share < holds.share and (size.impossible or size.whole is not None or not self._hopes(size))
        ]
        return holds, max(failing, key=lambda size: size.share, default=None)

    def _further(self) -> float | None:
        """The share at which one more full recovery tells most; None where it would tell next to nothing.

        Where nothing is known of the drop at the lower end, a size between whose short recovery is there already.
        """
        holds, fails = self._ends()
        low = self.least if fails is None else fails.share
        upper = holds.reached
        if upper / low < _NEAR:
            return None
        worst = math.inf if fails is None else self._lost(fails)
        share = _between((low, upper), (worst, self._lost(holds)), self.limit_pp)
        if worst > _WITHIN_REACH * self.limit_pp:
            there = [size.share for size in self.sizes if low * _NEAR <= size.share <= upper / _NEAR]
            if fails is None and not there:  # nothing smaller has failed
                return None
            share = min(there, key=lambda other: abs(math.log(other / share)), default=share)
        return share if (upper / share) ** 2 >= _NEAR else None

    def _last(self, size: _Size) -> SearchPoint:
        return size.points(self.sizes)[-1]

    def _lost(self, size: _Size) -> float:
        """The drop [pp] that is feared for a size; none for the teacher, which was not tried."""
        if size.impossible:
            return math.inf
        return 0.0 if size.short is None and size.whole is None else self._feared(self._last(size))

    def _feared(self, point: SearchPoint) -> float:
        """With this confidence the drop is no larger, as far as chance of validation inputs goes."""
        return point.judged_pp + _scaled(point.drop_ci_pp, self.section.confidence)

    def _holds(self, size: _Size) -> bool:
        return self._lost(size) <= self.limit_pp

    def _hopes(self, size: _Size) -> bool:
        """Whether a full recovery might bring a size within the limit."""
        short = size.short
        return short is None or short.epochs == 0 or short.drop_pp <= _HOPE * self.limit_pp

    def _tell(self, size: _Size) -> None:
        for point in size.points(self.sizes)[-1:]:
            logger.info(
                "search: %.3f of the MACs: drop %.2f pp (95 %% interval %.2f to %.2f, n = %d) after %d epochs%s, %s",
                point.macs,
                point.drop_pp,
                *point.drop_ci_pp,
                point.n,
                point.epochs,
                "" if point.expected_drop_pp is None else f", {point.expected_drop_pp:.2f} pp expected after all",
                "holds" if self._holds(size) else "too much",
            )

    def judged(self) -> Pareto:
        """The smallest size within the limit, by its last point; the one that lost least, where none is."""
        able = [size for size in self.sizes if not size.impossible]
        if not able:
            raise self._nothing()
        points = [point for size in able for point in size.points(self.sizes)]
        last = [index for index, point in enumerate(points) if point.asked_macs not in _asked(points[index + 1 :])]
        sure = [index for index, size in zip(last, able, strict=True) if self.in_full is None or size.whole is not None]
        within = [index for index in sure if self._feared(points[index]) <= self.limit_pp]
        if within:
            chosen = min(within, key=lambda index: points[index].macs)
        else:
            chosen = min(sure, key=lambda index: (self._feared(points[index]), -points[index].macs))
        return Pareto(
            points=tuple(points),
            front=tuple(last[position] for position in front_of([points[index] for index in last])),
            chosen=chosen,
            met=bool(within),
            limit_pp=self.limit_pp,
            reason=self._reason(points[chosen], len(able), met=bool(within)),
            remains=max((share for size in self.sizes if (share := _remains(size)) is not None), default=None),
        )

    def _reason(self, best: SearchPoint, sizes: int, *, met: bool) -> str:
        text = f"{best.macs:.3f} of the MACs, validation drop {best.drop_pp:.2f} pp (n = {best.n:,})"
        if self._feared(best) > best.drop_pp:
            text += f", with the confidence asked for at most {self._feared(best):.2f} pp"
        said = (
            f"smallest of {sizes} sizes within {self.limit_pp:g} pp: {text}"
            if met
            else f"none of {sizes} sizes stays within {self.limit_pp:g} pp; the best, {text}, is kept"
        )
        return said if self.in_full is None or self._further() is None else f"{said}; {self._untried()}"

    def _untried(self) -> str:
        """Between which sizes the limit lies, as far as full recoveries tell, and what would look there."""
        holds, fails = self._ends()
        low = self.least if fails is None else fails.share
        between = any(low < size.share < holds.share for size in self.sizes)
        lower, upper = f"{low:.3f}", "1" if holds.whole is None else f"{holds.whole.macs:.3f}"
        if fails is not None and not fails.impossible:
            point, how = self._last(fails), "in full" if fails.whole else "after a short recovery"
            lower = f"{point.macs:.3f} ({point.drop_pp:.2f} pp {how})"
        tried = "recovered in full" if between else "tried"
        return f"sizes between {lower} and {upper} were not {tried}: a larger search.full looks there"

    def _nothing(self) -> BudgetError:
        return BudgetError(
            "no size could be carried out",
            found=f"{sum(size.short is not None for size in self.sizes)} of {len(self.sizes)} shares of MACs could be "
            "cut out, and none of them recovered in full",
            remedy="do what the warnings above advise: each of them names what was in the way of one size",
        )


def _asked(points: Sequence[SearchPoint]) -> set[float]:
    return {point.asked_macs for point in points}


def _scaled(interval: tuple[float, float], confidence: float) -> float:
    """What a drop can exceed its estimate by with one-sided confidence, from its 95 % interval (normal)."""
    usual = NormalDist()
    return (interval[1] - interval[0]) / 2 * usual.inv_cdf(confidence) / usual.inv_cdf(0.975)


def refuse_unsure(section: SearchSection, *, limit_pp: float, n: int) -> None:
    """Refuses a search in which not even a student that answers exactly as the teacher does could hold the limit.

    Args:
        section: How sure the search has to be.
        limit_pp: Largest drop of accuracy [pp].
        n: Number of validation inputs.

    Raises:
        BudgetError: so few inputs leave more to chance than the limit allows.
    """
    chance = _scaled(paired_drop(0, 0, n)[1], section.confidence)
    if chance <= limit_pp:
        return
    enough = (
        f"at least {math.ceil((n + 2) * chance / limit_pp - 2):,} validation inputs"
        if limit_pp > 0
        else "a limit above 0"
    )
    raise BudgetError(
        "search.confidence asks for more than so few validation inputs can tell",
        found=f"{n:,} validation inputs: with a confidence of {section.confidence:g} a student that answers exactly "
        f"as the teacher does loses at most {chance:.2f} pp, and budget.max_accuracy_drop is {limit_pp:g} pp",
        wanted=enough,
        remedy="raise data.validation, lower search.confidence, or raise budget.max_accuracy_drop",
    )


def first_share(least: float) -> float:
    """The share of MACs that a search begins with: half of them, or more where no plan can reach that.

    Args:
        least: Smallest share of MACs that any plan can reach.
    """
    return _rounded(max(_FIRST, math.sqrt(_least(least))))


def _least(share: float) -> float:
    return min(max(share, _SMALLEST), 1.0)


def _between(ends: tuple[float, float], lost: tuple[float, float], limit_pp: float) -> float:
    """The share between one that fails and one that holds at which the drop should reach the limit."""
    (fails, holds), (worst, best), part = ends, lost, 0.5
    if limit_pp < worst <= _WITHIN_REACH * limit_pp:
        part = min(max((worst - limit_pp) / (worst - best), _LEAST_STEP), 1.0 - _LEAST_STEP)
    return _rounded(fails * math.pow(holds / fails, part))


def _rounded(share: float) -> float:
    """Upwards to four digits: a share names a folder."""
    return min(math.ceil(1e4 * share) / 1e4, 1.0)


def _remains(size: _Size) -> float | None:
    """The share of a short recovery's drop that a full one left."""
    if size.whole is None or size.short is None or size.short.drop_pp <= 0:
        return None
    return min(max(size.whole.drop_pp / size.short.drop_pp, 0.0), 1.0)


def _expected(drop_pp: float, known: Sequence[_Size]) -> float | None:
    """What full recoveries at other sizes say will be left of a drop after a short one; None where they say nothing.

    Each is trusted with drops up to twice its own, and the one that healed least counts. Of a larger drop what exceeds
    the largest of them is expected to stay: large drops may have other reasons, which no epochs mend.
    """
    told = [
        (_TRUSTED * size.short.drop_pp, left) for size in known if size.short and (left := _remains(size)) is not None
    ]
    if not told or drop_pp <= 0:
        return None
    if trusted := [left for reach, left in told if drop_pp <= reach]:
        return max(trusted) * drop_pp
    reach, left = max(told)
    return left * reach + (drop_pp - reach)


def front_of(points: Sequence[SearchPoint]) -> tuple[int, ...]:
    """Positions of the points that no other beats in both MACs and drop, from the smallest network to the largest."""
    order = sorted(range(len(points)), key=lambda index: (points[index].macs, points[index].judged_pp))
    front: list[int] = []
    for index in order:
        if not front or points[index].judged_pp < points[front[-1]].judged_pp:
            front.append(index)
    return tuple(front)
