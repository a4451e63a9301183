"""What is said when no plan meets a budget: the least that is possible, and what in the recipe stands in the way."""

from __future__ import annotations

import math
from collections.abc import Mapping

from causal_compress.errors import BudgetError
from causal_compress.recipe import PlanSection
from causal_compress.shrink.costs import FileCosts

_WORDS = {"macs": "MACs", "params": "parameters", "bytes": "file", "latency": "latency"}
_KEYS = {"macs": "budget.macs", "params": "budget.params", "latency": "budget.latency_ms.keep"}
_SWITCHES = ("depth", "width", "low_rank", "borrow")
_DIGITS = 3


def impossible(
    limits: Mapping[str, float], least: Mapping[str, float], section: PlanSection, file: FileCosts | None
) -> BudgetError:
    """The error for a budget that no plan can meet.

    Args:
        limits: Largest share of each cost that is limited.
        least: Smallest share of each cost that any plan reaches, of one cost at a time.
        section: What plans may be made of.
        file: What an ONNX file consists of; needed where `limits` has `bytes`.
    """
    smallest = [f"{rounded_up(share)} of the {_WORDS[kind]}" for kind, share in least.items() if kind != "bytes"]
    asked = [f"{_KEYS[kind]}: {limit:g}" for kind, limit in limits.items() if kind != "bytes"]
    if file is not None and "bytes" in limits:
        smallest.insert(list(least).index("bytes"), f"about {least['bytes'] * file.whole:,.0f} bytes")
        asked.append(f"budget.size_bytes: {limits['bytes'] * file.whole:,.0f}")
    return BudgetError(
        "no plan can meet the budget",
        found=f"the smallest possible plans keep {', '.join(smallest)}",
        wanted=", ".join(asked),
        remedy=_remedy(section),
    )


def rounded_up(share: float) -> str:
    """A share such that asking for what is shown can be met: three decimals, or three digits of a small one."""
    digits = _DIGITS if share >= 0.01 else _DIGITS - 1 - math.floor(math.log10(max(share, 1e-12)))
    up = math.ceil(share * 10**digits * (1 - 1e-9)) / 10**digits
    return f"{up:.3f}" if share >= 0.01 else f"{up:.3g}"


def _remedy(section: PlanSection) -> str:
    """What can be done, first what this recipe has switched off."""
    off = [f"plan.{name}: true" for name in _SWITCHES if not getattr(section, name)]
    ways = [
        "raise the budget",
        *([f"set {' or '.join(off)}"] if off else []),
        *([f"lower plan.align (now {section.align})"] if section.align > 1 else []),
        "add smaller values to plan.widths",
        "raise plan.max_span or plan.max_epsilon",
    ]
    return ", ".join(ways) + ", or check plan.include and plan.exclude"
