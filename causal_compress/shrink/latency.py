"""A budget on latency: what every candidate takes on the runtime, and a plan whose whole network is timed there.

MACs are not speed: narrow layers can be as slow as wide ones, and a merged region is always worth its time. So the
plan's cost is what a runtime says. Parts timed alone do not add up exactly to a network (the runtime lays activations
out anew at its ends, fuses across parts), hence the plan's skeleton is timed whole, and the plan is corrected.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, fx, nn

from causal_compress.errors import BudgetError
from causal_compress.recipe import BudgetSection, LatencySection, PlanSection
from causal_compress.results import Candidate, Candidates, Effects, Factor, Groups, Keep, LatencyTable, Plan
from causal_compress.shrink.costs import FileCosts
from causal_compress.shrink.lowrank import split
from causal_compress.shrink.parts import build_part
from causal_compress.shrink.plan import allowed, least_share, make_plan, price
from causal_compress.shrink.repair import without_bias
from causal_compress.shrink.surgery import Student, add_biases, assemble, merge_of, merges_of, narrow
from causal_compress.shrink.undo import is_whole, whole_regions
from causal_compress.understand.graph import fetch, get_module
from causal_compress.understand.tail import Tail, find_tail
from causal_compress.understand.trace import Network

logger = logging.getLogger(__name__)

Timer = Callable[[Sequence[tuple[nn.Module, Tensor]]], list[float]]
"""Milliseconds of networks on two or more example inputs each, measured in turn; one can be there several times."""

_COPIES = 4
_ROUNDS = 6
_CLOSE = 0.98  # a plan that keeps this much of what it may keep is good enough
_AIM = 0.99  # of what a plan may keep
_READINGS = 3
_STEADY = 0.04  # readings of one network differ by less where nothing else runs


def measure_latency(network: Network, candidates: Candidates, section: LatencySection, timer: Timer) -> LatencyTable:
    """Time each different part that a candidate can be, once.

    Args:
        network: The teacher.
        candidates: What could stand in its place.
        section: Which runtime, batch size and threads; told to the reader, the timer knows them.
        timer: Runs networks there.

    Limits: parts are timed at full input width; candidates that read a narrower cut point are taken to save time as
        they save MACs.
    """
    start = time.perf_counter()
    shapes: dict[str, int] = {}
    parts: list[tuple[nn.Module, Tensor]] = []
    built: dict[tuple[int, int, int, str | None], tuple[fx.GraphModule, str]] = {}
    places: list[int] = []
    for row in candidates.rows:
        span = (row.first, row.last, row.representative, row.adapter)
        if span not in built:
            built[span] = _part(network, row)
        part, structure = built[span]
        key = f"{structure} {_sizes(part, row.widths)} {_sizes(part, row.ranks)}"
        if key not in shapes:
            shapes[key] = len(parts)
            parts.append((_narrowed(part, row, network), _entering(network, row.first)))
        places.append(shapes[key])
    stacked = [_stacked(part, x) for part, x in parts]
    times = [ms / copies for ms, (_, _, copies) in zip(timer([(m, x) for m, x, _ in stacked]), stacked, strict=True)]
    ms = tuple(times[place] * row.inputs_kept for place, row in zip(places, candidates.rows, strict=True))
    whole = {row.first: time for row, time in zip(candidates.rows, ms, strict=True) if is_whole(row)}
    return LatencyTable(
        runtime=section.runtime,
        batch=section.batch,
        threads=section.threads,
        ms=ms,
        teacher_ms=sum(whole.values()),
        parts=len(parts),
        seconds=time.perf_counter() - start,
    )


def _part(network: Network, row: Candidate) -> tuple[fx.GraphModule, str]:
    part = build_part(network, merge_of(row))
    assert not isinstance(part, str)  # it was measured
    return part, f"{tuple(network.regions[row.first].info.input_shape)} {_structure(part)}"


def _structure(part: fx.GraphModule) -> str:
    """Equal for parts that do the same work, whatever their weights and names."""
    number = {node: index for index, node in enumerate(part.graph.nodes)}
    lines = []
    for node in part.graph.nodes:
        module = get_module(part, node)
        what = f"{node.op} {node.target}" if module is None else repr(module)
        what = node.op if node.op in {"placeholder", "output"} else what
        if node.op == "get_attr":
            what = f"get_attr {getattr(fetch(part, str(node.target)), 'shape', ())}"
        lines.append(f"{what} {[number[source] for source in node.all_input_nodes]} {_constants(node)}")
    return "; ".join(lines)


def _sizes(part: fx.GraphModule, counts: Mapping[str, int]) -> list[tuple[int, int]]:
    """What is kept of which layer; layers go by the place of their call, so that equal blocks have equal sizes."""
    place: dict[str, int] = {}
    for index, node in enumerate(part.graph.nodes):
        place.setdefault(str(node.target), index)
    return sorted((place[layer], count) for layer, count in counts.items())


def _constants(node: fx.Node) -> str:
    if node.op == "output":
        return ""
    return str([argument for argument in (*node.args, *node.kwargs.values()) if not isinstance(argument, fx.Node)])


def _narrowed(part: fx.GraphModule, row: Candidate, network: Network) -> fx.GraphModule:
    result = copy.deepcopy(part)
    keeps = [Keep(producer=producer, channels=tuple(range(count))) for producer, count in row.widths.items()]
    narrow(result, _entering(network, row.first), keeps)
    for factor in factors_of(row):
        split([result], factor)
    return result.eval()


def _entering(network: Network, first: int) -> Tensor:
    return torch.zeros(2, *network.regions[first].info.input_shape)


def _stacked(part: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor, int]:
    """Several copies in a row where the shape allows, so that what happens at the ends hardly counts."""
    with torch.no_grad():
        fits = part(x).shape == x.shape
    copies = _COPIES if fits else 1
    return nn.Sequential(*(copy.deepcopy(part) for _ in range(copies))).eval(), x, copies


def plan_for_latency(  # noqa: PLR0913  (what a plan needs, and where it is timed)
    network: Network,
    candidates: Candidates,
    effects: Effects,
    groups: Groups,
    budget: BudgetSection,
    section: PlanSection,
    table: LatencyTable,
    timer: Timer,
    file: FileCosts | None = None,
) -> Plan:
    """Plan within a share of the teacher's latency as the runtime takes it for the whole network.

    Args:
        network: The teacher.
        candidates: Everything that was measured.
        effects: ACE and CKA, as evidence.
        groups: The chosen causal nodes, as evidence.
        budget: Its `latency_ms` says what to keep; shares of MACs and parameters hold beside it.
        section: Whether depth and width may be used.
        table: What each candidate takes.
        timer: Runs networks on that runtime.
        file: What an ONNX file consists of; needed with a budget on its size.

    Returns:
        The plan of least predicted harm among those tried whose whole network was fast enough.

    Raises:
        BudgetError: no combination of candidates is fast enough.
    """
    limit = budget.latency_ms
    assert limit is not None

    def planner(keep: float) -> Plan:
        aimed = budget.model_copy(update={"latency_ms": limit.model_copy(update={"keep": min(keep, 1.0)})})
        return make_plan(candidates, effects, groups, aimed, section, table, file)

    whole = whole_regions(section.undo, effects.chain.regions)
    least = least_share("latency", *allowed(candidates, price(candidates, table), section, whole))
    wanted, met, fastest, unsteady = limit.keep, None, math.inf, 0.0
    plan, aim = _first_plan(planner, wanted, least)
    for turn in range(_ROUNDS):
        readings = _time_whole(network, plan, timer)
        kept, unsteady = median(readings), max(unsteady, max(readings) / min(readings) - 1)
        logger.info("plan: %.3f of the latency predicted, %.3f measured, %.3f wanted", plan.latency, kept, wanted)
        fastest = min(fastest, kept)
        if kept <= wanted and (met is None or plan.predicted_harm_kl < met.predicted_harm_kl):
            met = replace(plan, latency_measured=kept)
        if _CLOSE * wanted <= kept <= wanted or (kept > wanted and aim <= least) or turn == _ROUNDS - 1:
            break
        # Half the way back after a plan that was fast enough, lest it swings.
        aim = max(least, aim * (wanted * _AIM / kept) ** (1.0 if kept > wanted or turn == 0 else 0.5))
        try:
            plan = planner(aim)
        except BudgetError:
            break
    _warn_of_noise(unsteady)
    if met is None:
        raise _too_slow(fastest, limit, table)
    return met


def _warn_of_noise(unsteady: float) -> None:
    """Say that plans suffer where readings of one network differ by more than such a share of the smallest."""
    if unsteady > _STEADY:
        logger.warning(
            "plan: readings of one network's latency differ by %.0f %%; on a quiet machine the plan may be better, and "
            "nearer to the limit",
            100 * unsteady,
        )


def _first_plan(planner: Callable[[float], Plan], wanted: float, least: float) -> tuple[Plan, float]:
    """The plan for a share of the latency, and what was planned for.

    Parts timed alone can take longer than they do in a network: where by their sum no plan is fast enough, it is the
    fastest one, for a runtime to judge.

    Args:
        planner: Plans for a share.
        wanted: The share.
        least: That of the fastest plan.
    """
    try:
        return planner(wanted), wanted
    except BudgetError as refusal:
        if least <= wanted:
            raise
        try:
            return planner(least), least
        except BudgetError:
            raise refusal from None


def _too_slow(fastest: float, limit: LatencySection, table: LatencyTable) -> BudgetError:
    return BudgetError(
        "no plan can meet the budget on latency",
        found=f"the fastest plan tried keeps {fastest:.3f} of the teacher's latency on {table.runtime}",
        wanted=f"budget.latency_ms.keep: {limit.keep:g} at batch {table.batch}, {table.threads} thread(s)",
        remedy="raise budget.latency_ms.keep, plan.max_span or plan.max_epsilon, or set plan.align to cpu",
    )


def _time_whole(network: Network, plan: Plan, timer: Timer) -> list[float]:
    """Shares of the teacher's latency that the plan's network takes, read in turn; weights do not matter to it.

    Several, for their median: of many plans that are read once each, one with a lucky reading would be accepted.
    """
    example = network.example_input
    times = timer([(skeleton(network, plan), example), (network.teacher, example)] * _READINGS)
    return [student / teacher for student, teacher in zip(times[::2], times[1::2], strict=True)]


def skeleton(network: Network, plan: Plan) -> fx.GraphModule:
    """The network that a plan leads to, with any channels, unfitted weights, and all biases that refits may add.

    Args:
        network: The teacher; left as it is.
        plan: What merges and what narrows.
    """
    student = assemble(network, merges_of(plan))
    biased = _biased(student, plan)
    add_biases(student.graph, biased)
    for layer in biased:  # the exporter leaves zeros out, and keeps equal tensors once
        nn.init.uniform_(fetch(student.graph, layer).bias)
    keeps: dict[str, int] = {}
    for index, decision in enumerate(plan.decisions):
        keeps |= decision.candidate.widths
        if decision.candidate.inputs_kept < 1.0:
            before = find_tail(student.parts[index - 1])
            assert isinstance(before, Tail)
            channels = len(_weight(student.graph, before.affine))
            keeps[before.affine] = round(decision.candidate.inputs_kept * channels)
    narrow(student.graph, network.example_input, _as_keeps(keeps))
    for factor in (factor for decision in plan.decisions for factor in factors_of(decision.candidate)):
        split([student.graph], factor)
    return student.graph


def _biased(student: Student, plan: Plan) -> list[str]:
    """Layers without a bias or a batch norm from the first change on: what follows a change is refitted as well."""
    changed = [index for index, decision in enumerate(plan.decisions) if not is_whole(decision.candidate)]
    parts = student.parts[changed[0] :] if changed else ()
    return [layer for part in parts for layer in without_bias(part)]


def factors_of(row: Candidate) -> list[Factor]:
    """A candidate's ranks as surgery steps."""
    return [Factor(layer=layer, rank=rank) for layer, rank in row.ranks.items()]


def _weight(graph: fx.GraphModule, path: str) -> Tensor:
    weight = graph.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight


def _as_keeps(counts: Mapping[str, int]) -> list[Keep]:
    return [Keep(producer=producer, channels=tuple(range(count))) for producer, count in counts.items()]
