"""What a search for the smallest network within an accuracy budget tried, and what it chose."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from causal_compress.results.common import config


@dataclass(frozen=True, kw_only=True, config=config)
class SearchPoint:
    """One budget that was tried: shares of the teacher's MACs and parameters that were kept, and what it cost.

    The drop of accuracy is measured on the validation split, paired with the teacher, after `epochs` of recovery;
    `expected_drop_pp` is what is thought to be left of it after all epochs of the recipe.
    """

    asked_macs: float
    macs: float
    params: float
    heldout_kl: float
    drop_pp: float
    drop_ci_pp: tuple[float, float]
    n: int
    epochs: int
    seconds: float
    expected_drop_pp: float | None = None

    @property
    def judged_pp(self) -> float:
        """The drop that counts: the expected one where there is one."""
        return self.drop_pp if self.expected_drop_pp is None else self.expected_drop_pp


@dataclass(frozen=True, kw_only=True, config=config)
class Pareto:
    """All points, size by size in the order in which sizes were tried; `front` and `chosen` are positions among them.

    A size has a point after its short recovery, one after a full one, or both; the last of them counts, and only such
    are in `front`. `met` says whether the chosen point's drop lies within the limit; if none's does, the one that lost
    least is chosen. `remains` is the share of a short recovery's drop that was left after all epochs, at the size that
    healed least; None where none was recovered both ways.
    """

    points: tuple[SearchPoint, ...]
    front: tuple[int, ...]
    chosen: int
    met: bool
    limit_pp: float
    reason: str
    remains: float | None = None

    @property
    def sizes(self) -> int:
        """How many sizes were tried."""
        return len({point.asked_macs for point in self.points})

    @property
    def in_full(self) -> int:
        """How many of them were recovered in full as well; 0 where a short recovery is all that there was."""
        fewest = min((point.epochs for point in self.points), default=0)
        return sum(point.epochs > fewest for point in self.points)
