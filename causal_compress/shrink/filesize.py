"""A budget on the size of the ONNX file: a plan whose whole network is written out before it is accepted."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from causal_compress.errors import BudgetError
from causal_compress.recipe import BudgetSection
from causal_compress.results import Plan
from causal_compress.shrink.costs import FileCosts
from causal_compress.shrink.latency import skeleton
from causal_compress.understand.cost import count_params
from causal_compress.understand.trace import Network

logger = logging.getLogger(__name__)

Planner = Callable[[BudgetSection], Plan]
Sizer = Callable[[nn.Module], int]
"""The size of a network's file [bytes]."""

_ROUNDS = 5
_CLOSE = 0.97
_LEAST_STEP = 0.99  # plans differ by whole channels; a smaller step would often lead to the same one
_FURTHER = 1.5  # the costs of parts can't tell exactly that nothing fits


def file_costs(network: Network, sizer: Sizer, bytes_each: int) -> FileCosts:
    """What the teacher's file consists of: parameters, and a graph that is shared out among regions by their nodes.

    Args:
        network: The teacher.
        sizer: Writes networks.
        bytes_each: What a parameter takes in such a file.
    """
    whole = sizer(network.graph)
    nodes = [sum(node.op.startswith("call") for node in region.module.graph.nodes) for region in network.regions]
    each = max(whole - bytes_each * count_params(network.graph), 0) / max(sum(nodes), 1)
    return FileCosts(each=bytes_each, graph=tuple(each * count for count in nodes), layer=each, whole=whole)


def plan_for_size(network: Network, budget: BudgetSection, planner: Planner, sizer: Sizer) -> Plan:
    """Plan within a number of bytes, as the file of the plan's network has them.

    What parts take of a file does not add up exactly, so the plan's network is written out and what is planned for is
    corrected by what it took.

    Args:
        network: The teacher.
        budget: Its `size_bytes` says how large the file may be; all else in it holds beside it.
        planner: Plans for such a budget by what parts take.
        sizer: Writes networks; their weights do not matter to it.

    Returns:
        The plan of least predicted harm among those tried whose file was small enough.

    Raises:
        BudgetError: no combination of candidates is small enough.
    """
    wanted = budget.size_bytes
    assert wanted is not None
    plan, aim = _first_plan(planner, budget, float(wanted))
    low, high = wanted if aim > wanted else 0.0, math.inf
    sizes, met = list[int](), None
    for _ in range(_ROUNDS):
        size = sizer(skeleton(network, plan))
        logger.info("plan: %.4f of the parameters make a file of %d bytes, %d allowed", plan.params, size, wanted)
        if size <= wanted and (met is None or plan.predicted_harm_kl < met.predicted_harm_kl):
            met = replace(plan, size_bytes=size)
        if _CLOSE * wanted <= size <= wanted or (size in sizes and size <= wanted):
            break
        sizes.append(size)
        low, high = (max(low, aim), high) if size <= wanted else (low, min(high, aim))
        aim *= min(wanted / size, _LEAST_STEP) if size > wanted else wanted / size
        found = _next_plan(planner, budget, aim, (low, high))
        if found is None:
            break
        plan, aim, low = found
    if met is None:
        raise BudgetError(
            "no plan can meet the budget on the file's size",
            found=f"the smallest file of a plan that was tried has {min(sizes):,} bytes",
            wanted=f"budget.size_bytes: {wanted:,}",
            remedy="raise budget.size_bytes, add smaller values to plan.widths, raise plan.max_span or "
            "plan.max_epsilon, or, if the file is FP32, set quantize: {} (in INT8 a weight takes a byte, not four)",
        )
    return met


def _first_plan(planner: Planner, budget: BudgetSection, wanted: float) -> tuple[Plan, float]:
    """The plan for so many bytes, or for more before it is believed that nothing fits; and what was planned for."""
    refusals = []
    for aim in (wanted, _FURTHER * wanted):
        try:
            return _planned(planner, budget, aim), aim
        except BudgetError as error:
            refusals.append(error)
    raise refusals[0]


def _next_plan(
    planner: Planner, budget: BudgetSection, aim: float, bounds: tuple[float, float]
) -> tuple[Plan, float, float] | None:
    """The plan for so many bytes, or for as few more as there is one for.

    Args:
        planner: Refuses what no plan is small enough for.
        budget: All that holds beside the size.
        aim: What to plan for [bytes].
        bounds: Between what; at the lower one there is no plan, or its file has room left, at the upper one no file
            is small enough; infinity where that is not known.

    Returns:
        The plan, what was planned for, and the lower bound as it is known now; None: nothing lies between.
    """
    low, high = bounds
    for _ in range(_ROUNDS if math.isfinite(high) else 1):
        if not low < aim < high:
            aim = math.sqrt(max(low, 1.0) * high) if math.isfinite(high) else aim
        try:
            return _planned(planner, budget, aim), aim, low
        except BudgetError:
            low = max(low, aim)
    return None


def _planned(planner: Planner, budget: BudgetSection, aim: float) -> Plan:
    return planner(budget.model_copy(update={"size_bytes": max(1, round(aim))}))
