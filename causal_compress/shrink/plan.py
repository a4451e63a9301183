"""Decides what is done; touches no network. Dynamic programming over the chain gives the best plan for every budget.

A state is a cut point and the share of its channels that stays. A candidate leads from one state to another; its harm
is what was measured for it alone, and the harm of a plan is predicted as their sum. What a plan costs is exchangeable:
MACs, parameters, bytes of the file, or latency measured on a runtime, each as a share of the teacher's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from causal_compress.recipe import BudgetSection, PlanSection
from causal_compress.results import (
    Candidate,
    Candidates,
    Decision,
    DecisionKind,
    Effects,
    Evidence,
    FrontPoint,
    Groups,
    LatencyTable,
    Plan,
    RegionInfo,
    Skip,
)
from causal_compress.shrink.costs import FileCosts
from causal_compress.shrink.refusal import impossible
from causal_compress.shrink.undo import leaves_whole, whole_regions
from causal_compress.understand.group import same_node_share

MOST_POINTS = 800
DEFAULT_MACS = 0.5
_TRADE_STEPS = 4
_FRONT_POINTS = 60

Kind = Literal["macs", "params", "bytes", "latency"]
KINDS: tuple[Kind, ...] = ("macs", "params", "bytes", "latency")
_BYTES, _LATENCY = KINDS.index("bytes"), KINDS.index("latency")
State = tuple[int, float]
Costs = NDArray[np.float64]


@dataclass(frozen=True)
class Prices:
    """What each candidate costs, as shares of the teacher: rows x KINDS; `out` scales with the output width kept."""

    fixed: Costs
    out: Costs


@dataclass(frozen=True)
class _Points:
    """Partial plans that end in one state, sorted by cost; `back` is (state index, point index, candidate index)."""

    costs: Costs
    harm: NDArray[np.float64]
    back: NDArray[np.int64]


def make_plan(  # noqa: PLR0913  (what was measured, what is asked for, and what its two further costs are)
    candidates: Candidates,
    effects: Effects,
    groups: Groups,
    budget: BudgetSection,
    section: PlanSection,
    latency: LatencyTable | None = None,
    file: FileCosts | None = None,
) -> Plan:
    """Choose the candidates that meet the budget with the least predicted harm.

    Args:
        candidates: Everything that was measured.
        effects: ACE and CKA, as evidence.
        groups: The chosen causal nodes, as evidence.
        budget: Largest shares of MACs, parameters and latency, and largest file; with none, half the MACs are planned
            for.
        section: Whether depth and width may be used.
        latency: What each candidate takes on the runtime of `budget.latency_ms`; needed with that budget.
        file: What an ONNX file consists of; needed with a budget on its size.

    Raises:
        BudgetError: no combination of candidates is small enough; says what is possible.

    Limits: exact with one kind of cost in the budget; with several, partial plans are compared by a few fixed mixtures
        of them, and the best plan may be missed by a little.
    """
    limits = limits_of(budget, file)
    prices = price(candidates, latency, file)
    whole = whole_regions(section.undo, effects.chain.regions)
    candidates, prices = allowed(candidates, prices, section, whole)
    mixtures = _mixtures(list(limits))
    paths = [best_path(candidates, prices, mixture, limits) for mixture in mixtures]
    met = [path for path in paths if path is not None]
    if not met:
        asked: dict[str, float] = {kind: limit for kind, limit in limits.items() if np.isfinite(limit)}
        least: dict[str, float] = {
            kind: least_share(kind, candidates, prices) for kind in KINDS if kind in (*asked, "macs", "params")
        }
        raise impossible(asked, least, section, file)
    chosen = min(met, key=lambda path: sum(candidates.rows[position].harm_kl for position in path))
    decisions = _decisions([candidates.rows[position] for position in chosen], candidates, effects, groups)
    kept = np.array([decision.outputs_kept for decision in decisions])[:, None]
    shares = (prices.fixed[chosen] + kept * prices.out[chosen]).sum(0)
    return Plan(
        decisions=decisions,
        macs=sum(d.macs_after for d in decisions) / candidates.macs,
        params=sum(d.params_after for d in decisions) / candidates.params,
        latency=None if latency is None else float(shares[_LATENCY]),
        predicted_harm_kl=sum(d.predicted_harm_kl for d in decisions),
        front=front(candidates, prices),
        skipped=(
            *candidates.skipped,
            *(Skip(what=name, reason="left whole, as plan.undo asks") for name in section.undo),
        ),
    )


def least_macs(candidates: Candidates, section: PlanSection, regions: Sequence[RegionInfo]) -> float:
    """The smallest share of the teacher's MACs that any plan can reach."""
    rows, prices = allowed(candidates, price(candidates), section, whole_regions(section.undo, regions))
    return least_share("macs", rows, prices)


def least_share(kind: Kind, candidates: Candidates, prices: Prices) -> float:
    """The smallest share of one cost that any plan can reach, whatever it takes of the others."""
    states, points = _sweep(candidates, prices, _mixtures([kind])[0])
    return float(points[len(states) - 1].costs[0, KINDS.index(kind)])


def limits_of(budget: BudgetSection, file: FileCosts | None = None) -> dict[Kind, float]:
    """The largest share of each cost; half the MACs where the budget names no cost."""
    latency = None if budget.latency_ms is None else budget.latency_ms.keep
    size = None if budget.size_bytes is None or file is None else budget.size_bytes / file.whole
    given: dict[Kind, float | None] = {
        "macs": budget.macs,
        "params": budget.params,
        "bytes": size,
        "latency": latency,
    }
    # All of a cost is no limit: a teacher that is left whole gets none of the biases that are counted for refits.
    limits = {kind: share if share < 1.0 else np.inf for kind, share in given.items() if share is not None}
    return limits or {"macs": DEFAULT_MACS}


def price(candidates: Candidates, latency: LatencyTable | None = None, file: FileCosts | None = None) -> Prices:
    """What each candidate costs, as shares of the teacher's cost.

    Args:
        candidates: Everything that was measured.
        latency: Milliseconds of each; None: latencies are 0.
        file: What an ONNX file consists of; None: files have no size.
    """
    fixed = np.zeros((len(candidates.rows), len(KINDS)))
    out = np.zeros_like(fixed)
    for position, row in enumerate(candidates.rows):
        fixed[position, :2] = row.macs_fixed / max(candidates.macs, 1), row.params_fixed / max(candidates.params, 1)
        out[position, :2] = row.macs_out / max(candidates.macs, 1), row.params_out / max(candidates.params, 1)
        if file is not None:
            graph = file.graph[row.representative] + file.layer * len(row.ranks)
            fixed[position, _BYTES] = (file.each * row.params_fixed + graph) / file.whole
            out[position, _BYTES] = file.each * row.params_out / file.whole
        if latency is not None:
            # Latency was measured at full output width; what a narrower output saves is taken to follow the MACs.
            share = latency.ms[position] / latency.teacher_ms
            scaling = row.macs_out / max(row.macs_out + row.macs_fixed, 1e-300)
            fixed[position, _LATENCY], out[position, _LATENCY] = share * (1 - scaling), share * scaling
    return Prices(fixed, out)


def _mixtures(kinds: Sequence[Kind]) -> list[Costs]:
    """Weights of the costs by which partial plans are compared; one alone gives an exact plan for a budget on it."""
    weights = itertools.product(range(_TRADE_STEPS + 1), repeat=len(kinds))
    mixtures = []
    for parts in weights:
        if sum(parts) == _TRADE_STEPS:
            mixture = np.zeros(len(KINDS))
            mixture[[KINDS.index(kind) for kind in kinds]] = np.array(parts) / _TRADE_STEPS
            mixtures.append(mixture)
    return mixtures[::-1]


def allowed(
    candidates: Candidates, prices: Prices, section: PlanSection, whole: frozenset[int] = frozenset()
) -> tuple[Candidates, Prices]:
    """The candidates that the recipe lets a plan use: merges only with `depth`, narrowings only with `width`, ranks
    only with `low_rank`, and nothing that changes a region of `whole`.
    """
    chosen = [
        position
        for position, row in enumerate(candidates.rows)
        if (section.depth or row.first == row.last)
        and (section.width or row.keeps_width or (not row.widths and row.inputs_kept == 1.0))
        and (section.borrow or row.adapter != "borrow")
        and (section.low_rank or not row.ranks)
        and leaves_whole(row, whole)
    ]
    rows = tuple(candidates.rows[position] for position in chosen)
    return replace(candidates, rows=rows), Prices(prices.fixed[chosen], prices.out[chosen])


def best_path(candidates: Candidates, prices: Prices, mixture: Costs, limits: Mapping[Kind, float]) -> list[int] | None:
    """The plan of least predicted harm within shares of costs, as positions of candidates, or None.

    Args:
        candidates: Everything that was measured.
        prices: What each costs.
        mixture: Weights of the costs by which partial plans are compared.
        limits: Largest shares.
    """
    states, points = _sweep(candidates, prices, mixture)
    final = points[len(states) - 1]
    largest = np.array([limits.get(kind, np.inf) for kind in KINDS])
    fits = (final.costs <= largest * (1 + 1e-9)).all(1)
    if not fits.any():
        return None
    index = int(np.flatnonzero(fits)[np.argmin(final.harm[fits])])
    return _walk_back(states, points, index)


def front(candidates: Candidates, prices: Prices) -> tuple[FrontPoint, ...]:
    """The predicted Pareto front over MACs, whatever the budget is on: from the smallest plan to the teacher itself."""
    states, points = _sweep(candidates, prices, _mixtures(["macs"])[0])
    final = points[len(states) - 1]
    chosen = np.unique(np.linspace(0, len(final.harm) - 1, _FRONT_POINTS).astype(int))
    return tuple(
        FrontPoint(macs=float(final.costs[i, 0]), params=float(final.costs[i, 1]), harm_kl=float(final.harm[i]))
        for i in chosen
    )


def _states(candidates: Candidates) -> list[State]:
    """All states in chain order: the start, the shares in which each cut point is read, the end."""
    states: list[State] = [(-1, 1.0)]
    for cut in range(candidates.regions - 1):
        shares = {c.inputs_kept for c in candidates.rows if c.first == cut + 1}
        states.extend((cut, share) for share in sorted(shares, reverse=True))
    return [*states, (candidates.regions - 1, 1.0)]


def _sweep(candidates: Candidates, prices: Prices, mixture: Costs) -> tuple[list[State], dict[int, _Points]]:
    """All undominated partial plans of every state, front to back."""
    states = _states(candidates)
    number = {state: index for index, state in enumerate(states)}
    start = _Points(np.zeros((1, len(KINDS))), np.zeros(1), np.full((1, 3), -1))
    arriving: dict[int, list[_Points]] = {0: [start]}
    points: dict[int, _Points] = {}
    shares_of: dict[int, list[float]] = {}
    for cut, share in states:
        shares_of.setdefault(cut, []).append(share)
    by_first: dict[int, list[int]] = {}
    for position, candidate in enumerate(candidates.rows):
        by_first.setdefault(candidate.first, []).append(position)
    for index, (cut, share) in enumerate(states):
        if index not in arriving:
            continue
        points[index] = _undominated(arriving.pop(index), mixture)
        for position in by_first.get(cut + 1, ()):
            candidate = candidates.rows[position]
            if abs(candidate.inputs_kept - share) > 1e-9:
                continue
            for out in (share for share in shares_of[candidate.last] if share == 1.0 or candidate.narrows_output):
                cost = prices.fixed[position] + out * prices.out[position]
                step = _step(points[index], cost, candidate.harm_kl, (index, position))
                arriving.setdefault(number[candidate.last, out], []).append(step)
    return states, points


def _step(points: _Points, cost: Costs, harm: float, origin: tuple[int, int]) -> _Points:
    size = len(points.harm)
    back = np.stack([np.full(size, origin[0]), np.arange(size), np.full(size, origin[1])], 1)
    return _Points(points.costs + cost, points.harm + harm, back)


def _undominated(parts: Sequence[_Points], mixture: Costs) -> _Points:
    """Points that no other beats in cost and harm; of many nearly equal costs only the best stays."""
    costs, harm, back = (np.concatenate([getattr(part, name) for part in parts]) for name in ("costs", "harm", "back"))
    cost = costs @ mixture
    order = np.lexsort((harm, cost))
    best = np.minimum.accumulate(harm[order])
    better = np.r_[True, best[1:] < best[:-1]]
    order = order[better]
    if len(order) > MOST_POINTS:
        edges = np.linspace(cost[order[0]], cost[order[-1]], MOST_POINTS)
        bins = np.searchsorted(edges, cost[order])
        order = order[np.r_[bins[1:] != bins[:-1], True]]
    return _Points(costs[order], harm[order], back[order])


def _walk_back(states: Sequence[State], points: dict[int, _Points], index: int) -> list[int]:
    path: list[int] = []
    state = len(states) - 1
    while state != 0:
        state, index, position = (int(value) for value in points[state].back[index])
        path.insert(0, position)
    return path


def _decisions(
    path: Sequence[Candidate], candidates: Candidates, effects: Effects, groups: Groups
) -> tuple[Decision, ...]:
    regions = effects.chain.regions
    decisions = []
    for position, candidate in enumerate(path):
        span = regions[candidate.first : candidate.last + 1]
        out = path[position + 1].inputs_kept if position + 1 < len(path) else 1.0
        merged = candidate.first != candidate.last
        narrow = (bool(candidate.widths) and not candidate.keeps_width) or candidate.inputs_kept < 1.0
        decisions.append(
            Decision(
                node=span[0].name if not merged else f"{span[0].name}..{span[-1].name}",
                kind=_kind(merged, narrow, bool(candidate.ranks)),
                candidate=candidate,
                outputs_kept=out,
                evidence=_evidence(candidate, effects, groups),
                predicted_harm_kl=candidate.harm_kl,
                macs_before=sum(region.macs for region in span),
                macs_after=round(candidate.macs_fixed + out * candidate.macs_out),
                params_before=sum(region.params for region in span),
                params_after=round(candidate.params_fixed + out * candidate.params_out),
                refused=tuple(_refused(candidate, candidates.rows, regions)),
            )
        )
    return tuple(decisions)


def _kind(merged: bool, narrow: bool, thin: bool) -> DecisionKind:
    match merged, narrow, thin:
        case True, True, _:
            return "merge+narrow"
        case True, False, _:
            return "merge"
        case False, True, True:
            return "narrow+low rank"
        case False, True, False:
            return "narrow"
        case False, False, True:
            return "low rank"
        case _:
            return "keep"


def _evidence(candidate: Candidate, effects: Effects, groups: Groups) -> Evidence:
    first, last = candidate.first, candidate.last
    merged = first != last
    return Evidence(
        cka=min(effects.cka[site][last] for site in range(first, last)) if merged else None,
        same_node_share=same_node_share(effects, groups.epsilon, first, last) if merged else None,
        ace=effects.nodes[last].ace,
        relative_error=candidate.relative_error,
    )


def _refused(chosen: Candidate, rows: Iterable[Candidate], regions: Sequence[object], most: int = 3) -> list[Skip]:
    """The nearest alternatives that start at the same cut point, with what they would have cost."""
    others = [c for c in rows if c.first == chosen.first and c is not chosen]
    others.sort(key=lambda c: abs(c.harm_kl - chosen.harm_kl))
    return [Skip(what=_label(c, regions), reason=_comparison(c, chosen)) for c in others[:most]]


def _label(candidate: Candidate, regions: Sequence[object]) -> str:
    names = [str(getattr(regions[i], "name", i)) for i in (candidate.first, candidate.last, candidate.representative)]
    what = f"{names[2]} for {names[0]}..{names[1]}" if candidate.first != candidate.last else names[0]
    what += ", borrowing channels," if candidate.adapter == "borrow" else ""
    widths = ", ".join(f"{count} channels of {producer}" for producer, count in candidate.widths.items())
    inputs = f"{candidate.inputs_kept:.0%} of its input channels" if candidate.inputs_kept < 1 else ""
    ranks = ", ".join(f"rank {rank} of {layer}" for layer, rank in candidate.ranks.items())
    return " with ".join(part for part in (what, widths or inputs, ranks) if part)


def _comparison(other: Candidate, chosen: Candidate) -> str:
    macs = other.macs_fixed + other.macs_out
    return f"predicted harm {other.harm_kl:.4f} against {chosen.harm_kl:.4f} nats at {macs / 1e6:.2f} M MACs"
