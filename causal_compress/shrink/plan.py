"""Decides what is done; touches no network. Dynamic programming over the chain gives the best plan for every budget.

A state is a cut point and the share of its channels that stays. A candidate leads from one state to another; its harm
is what was measured for it alone, and the harm of a plan is predicted as their sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from causal_compress.errors import BudgetError
from causal_compress.recipe import BudgetSection, PlanSection
from causal_compress.results import Candidate, Candidates, Decision, Effects, Evidence, FrontPoint, Groups, Plan, Skip
from causal_compress.understand.group import same_node_share

MOST_POINTS = 800
DEFAULT_MACS = 0.5
_TRADES = (1.0, 0.75, 0.5, 0.25, 0.0)
_FRONT_POINTS = 60

State = tuple[int, float]


@dataclass(frozen=True)
class _Points:
    """Partial plans that end in one state, sorted by cost; `back` is (state index, point index, candidate index)."""

    macs: NDArray[np.float64]
    params: NDArray[np.float64]
    harm: NDArray[np.float64]
    back: NDArray[np.int64]


def make_plan(
    candidates: Candidates, effects: Effects, groups: Groups, budget: BudgetSection, section: PlanSection
) -> Plan:
    """Choose the candidates that meet the budget with the least predicted harm.

    Args:
        candidates: Everything that was measured.
        effects: ACE and CKA, as evidence.
        groups: The chosen causal nodes, as evidence.
        budget: Largest shares of MACs and parameters; with neither, half the MACs are planned for.
        section: Whether depth and width may be used.

    Raises:
        BudgetError: no combination of candidates is small enough; says what is possible.
    """
    candidates = allowed(candidates, section)
    macs = budget.macs if budget.macs or budget.params else DEFAULT_MACS
    trades = [1.0 if budget.params is None else 0.0] if macs is None or budget.params is None else list(_TRADES)
    paths = [best_path(candidates, trade, macs or np.inf, budget.params or np.inf) for trade in trades]
    met = [path for path in paths if path is not None]
    if not met:
        raise _impossible(candidates, macs, budget.params)
    chosen = min(met, key=lambda path: sum(c.harm_kl for c in path))
    decisions = _decisions(chosen, candidates, effects, groups)
    return Plan(
        decisions=decisions,
        macs=sum(d.macs_after for d in decisions) / candidates.macs,
        params=sum(d.params_after for d in decisions) / candidates.params,
        predicted_harm_kl=sum(d.predicted_harm_kl for d in decisions),
        front=front(candidates, trades[0]),
        skipped=candidates.skipped,
    )


def allowed(candidates: Candidates, section: PlanSection) -> Candidates:
    """The candidates that the recipe lets a plan use: merges only with `depth`, narrowings only with `width`."""
    rows = tuple(
        row
        for row in candidates.rows
        if (section.depth or row.first == row.last) and (section.width or (not row.widths and row.inputs_kept == 1.0))
    )
    return replace(candidates, rows=rows)


def _impossible(candidates: Candidates, macs: float | None, params: float | None) -> BudgetError:
    least = {kind: getattr(front(candidates, trade)[0], kind) for kind, trade in (("macs", 1.0), ("params", 0.0))}
    wanted = [f"budget.{name}: {value}" for name, value in (("macs", macs), ("params", params)) if value is not None]
    return BudgetError(
        "no plan can meet the budget",
        found=f"the smallest possible keeps {least['macs']:.3f} of the MACs; of the parameters, {least['params']:.3f}",
        wanted=", ".join(wanted),
        remedy="raise the budget, add smaller values to plan.widths, raise plan.max_span or plan.max_epsilon, "
        "lower plan.align, or check plan.include and plan.exclude",
    )


def best_path(candidates: Candidates, trade: float, macs: float, params: float) -> list[Candidate] | None:
    """The plan of least predicted harm within shares of MACs and parameters, or None.

    Args:
        candidates: Everything that was measured.
        trade: Weight of MACs in the cost by which partial plans are compared; the rest is parameters.
        macs: Largest share of MACs.
        params: Largest share of parameters.
    """
    states, points = _sweep(candidates, trade)
    final = points[len(states) - 1]
    fits = (final.macs <= macs * candidates.macs * (1 + 1e-9)) & (
        final.params <= params * candidates.params * (1 + 1e-9)
    )
    if not fits.any():
        return None
    index = int(np.flatnonzero(fits)[np.argmin(final.harm[fits])])
    return _walk_back(candidates, states, points, index)


def front(candidates: Candidates, trade: float = 1.0) -> tuple[FrontPoint, ...]:
    """The predicted Pareto front, from the smallest plan to the teacher itself."""
    states, points = _sweep(candidates, trade)
    final = points[len(states) - 1]
    chosen = np.unique(np.linspace(0, len(final.harm) - 1, _FRONT_POINTS).astype(int))
    return tuple(
        FrontPoint(
            macs=float(final.macs[i] / candidates.macs),
            params=float(final.params[i] / candidates.params),
            harm_kl=float(final.harm[i]),
        )
        for i in chosen
    )


def _states(candidates: Candidates) -> list[State]:
    """All states in chain order: the start, the shares in which each cut point is read, the end."""
    states: list[State] = [(-1, 1.0)]
    for cut in range(candidates.regions - 1):
        shares = {c.inputs_kept for c in candidates.rows if c.first == cut + 1}
        states.extend((cut, share) for share in sorted(shares, reverse=True))
    return [*states, (candidates.regions - 1, 1.0)]


def _sweep(candidates: Candidates, trade: float) -> tuple[list[State], dict[int, _Points]]:
    """All undominated partial plans of every state, front to back."""
    states = _states(candidates)
    number = {state: index for index, state in enumerate(states)}
    start = np.zeros(1)
    arriving: dict[int, list[_Points]] = {0: [_Points(start, start, start, np.full((1, 3), -1))]}
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
        points[index] = _undominated(arriving.pop(index), trade, candidates)
        for position in by_first.get(cut + 1, ()):
            candidate = candidates.rows[position]
            if abs(candidate.inputs_kept - share) > 1e-9:
                continue
            for out in shares_of[candidate.last]:
                step = _step(points[index], candidate, out, index, position)
                arriving.setdefault(number[candidate.last, out], []).append(step)
    return states, points


def _step(points: _Points, candidate: Candidate, out: float, state: int, position: int) -> _Points:
    size = len(points.harm)
    return _Points(
        points.macs + candidate.macs_fixed + out * candidate.macs_out,
        points.params + candidate.params_fixed + out * candidate.params_out,
        points.harm + candidate.harm_kl,
        np.stack([np.full(size, state), np.arange(size), np.full(size, position)], 1),
    )


def _undominated(parts: Sequence[_Points], trade: float, candidates: Candidates) -> _Points:
    """Points that no other beats in cost and harm; of many nearly equal costs only the best stays."""
    macs, params, harm = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("macs", "params", "harm")
    )
    back = np.concatenate([part.back for part in parts])
    cost = trade * macs / max(candidates.macs, 1) + (1 - trade) * params / max(candidates.params, 1)
    order = np.lexsort((harm, cost))
    best = np.minimum.accumulate(harm[order])
    better = np.r_[True, best[1:] < best[:-1]]
    order = order[better]
    if len(order) > MOST_POINTS:
        edges = np.linspace(cost[order[0]], cost[order[-1]], MOST_POINTS)
        bins = np.searchsorted(edges, cost[order])
        order = order[np.r_[bins[1:] != bins[:-1], True]]
    return _Points(macs[order], params[order], harm[order], back[order])


def _walk_back(
    candidates: Candidates, states: Sequence[State], points: dict[int, _Points], index: int
) -> list[Candidate]:
    path: list[Candidate] = []
    state = len(states) - 1
    while state != 0:
        state, index, position = (int(value) for value in points[state].back[index])
        path.insert(0, candidates.rows[position])
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
        narrow = bool(candidate.widths) or candidate.inputs_kept < 1.0
        decisions.append(
            Decision(
                node=span[0].name if not merged else f"{span[0].name}..{span[-1].name}",
                kind=_kind(merged, narrow),
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


def _kind(merged: bool, narrow: bool) -> Literal["keep", "merge", "narrow", "merge+narrow"]:
    match merged, narrow:
        case True, True:
            return "merge+narrow"
        case True, False:
            return "merge"
        case False, True:
            return "narrow"
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
    widths = ", ".join(f"{count} channels of {producer}" for producer, count in candidate.widths.items())
    inputs = f"{candidate.inputs_kept:.0%} of its input channels" if candidate.inputs_kept < 1 else ""
    return " with ".join(part for part in (what, widths or inputs) if part)


def _comparison(other: Candidate, chosen: Candidate) -> str:
    macs = other.macs_fixed + other.macs_out
    return f"predicted harm {other.harm_kl:.4f} against {chosen.harm_kl:.4f} nats at {macs / 1e6:.2f} M MACs"
