"""What several stages speak of, and how all results are declared."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
"""Of every result: unknown fields are refused, infinities and NaN survive JSON."""

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]


@dataclass(frozen=True, kw_only=True, config=config)
class Skip:
    """Something that was not done, and why; reasons are for the user."""

    what: str
    reason: str


@dataclass(frozen=True, kw_only=True, config=config)
class Accuracy:
    """Share of correct answers [percent] with a 95 % Wilson interval."""

    pct: float
    n: int
    low_pct: float
    high_pct: float
