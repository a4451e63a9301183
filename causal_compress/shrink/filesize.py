"""A budget on the size of the ONNX file: a plan whose whole network is written out before it is accepted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from causal_compress.errors import BudgetError
from causal_compress.recipe import BudgetSection
from causal_compress.results import Plan
from causal_compress.shrink.latency import skeleton
from causal_compress.understand.trace import Network

logger = logging.getLogger(__name__)

_ROUNDS = 5
_CLOSE = 0.97
_MARGIN = 0.998

Planner = Callable[[BudgetSection], Plan]
Sizer = Callable[[nn.Module], int]
"""The size of a network's file [bytes]."""


@dataclass(frozen=True)
class Params:
    """A teacher's parameters: how many, and the smallest share of them that any plan can keep."""

    number: int
    least: float


def plan_for_size(
    network: Network, params: Params, budget: BudgetSection, planner: Planner, sizer: Sizer, *, bytes_each: int
) -> Plan:
    """Plan within a number of bytes, as the file of the plan's network has them.

    A file is its parameters and what describes the graph; how much the latter is shows only when the network is there.
    So a share of parameters is planned for, the network is written out, and the share is corrected by what it took.

    Args:
        network: The teacher.
        params: The teacher's, and the smallest share of them that a plan can keep.
        budget: Its `size_bytes` says how large the file may be; all else in it holds beside it.
        planner: Plans for a budget without `size_bytes`.
        sizer: Writes networks; their weights do not matter to it.
        bytes_each: What a parameter takes in such a file.

    Returns:
        The plan of least predicted harm among those tried whose file was small enough.

    Raises:
        BudgetError: no combination of candidates is small enough.
    """
    wanted = budget.size_bytes
    assert wanted is not None
    whole, most = bytes_each * params.number, 1.0 if budget.params is None else budget.params
    share, tried, met = wanted / whole, dict[float, int](), None
    for _ in range(_ROUNDS):
        try:
            plan = planner(
                budget.model_copy(update={"size_bytes": None, "params": min(max(share, params.least), most)})
            )
        except BudgetError as error:
            if met is None:
                raise _out_of_reach(wanted, tried, error) from error
            break
        if plan.params in tried:
            break
        size = tried[plan.params] = sizer(skeleton(network, plan))
        logger.info("plan: %.4f of the parameters make a file of %d bytes, %d allowed", plan.params, size, wanted)
        if size <= wanted and (met is None or plan.predicted_harm_kl < met.predicted_harm_kl):
            met = replace(plan, size_bytes=size)
        share = plan.params + (_MARGIN * wanted - size) / whole
        if _CLOSE * wanted <= size <= wanted:
            break
    if met is None:
        raise _out_of_reach(wanted, tried, None)
    return met


def _out_of_reach(wanted: int, tried: Mapping[float, int], error: BudgetError | None) -> BudgetError:
    found = [f"the smallest file of a plan that was tried has {min(tried.values()):,} bytes"] if tried else []
    if error is not None and error.found:
        found.append(error.found)
    return BudgetError(
        "no plan can meet the budget on the file's size",
        found="; ".join(found),
        wanted=f"budget.size_bytes: {wanted:,}",
        remedy="raise budget.size_bytes, add smaller values to plan.widths, raise plan.max_span or plan.max_epsilon, "
        "or, if it is FP32, set quantize: {} (in INT8 a weight takes one byte instead of four)",
    )
