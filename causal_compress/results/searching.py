"""What a search for the smallest network within an accuracy budget tried, and what it chose."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from causal_compress.results.common import config


@dataclass(frozen=True, kw_only=True, config=config)
class SearchPoint:
    """One budget that was tried: shares of the teacher's MACs and parameters that were kept, and what it cost.

    The drop of accuracy is measured on the validation split, after a short recovery, paired with the teacher.
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


@dataclass(frozen=True, kw_only=True, config=config)
class Pareto:
    """All points in the order in which they were tried; `front` and `chosen` are positions among them.

    `met` says whether the chosen point's drop lies within the limit; if none's does, the one that lost least is chosen.
    """

    points: tuple[SearchPoint, ...]
    front: tuple[int, ...]
    chosen: int
    met: bool
    limit_pp: float
    reason: str
