"""The plan against brute force on small sets of candidates."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causal_compress.errors import BudgetError
from causal_compress.recipe import BudgetSection, PlanSection
from causal_compress.results import (
    Candidate,
    Candidates,
    Chain,
    Effects,
    Groups,
    LatencyTable,
    NodeEffect,
    Partition,
    RegionInfo,
    Skip,
)
from causal_compress.shrink.plan import KINDS, best_path, front, make_plan, price

MACS, PARAMS = 100, 50


def candidate(  # noqa: PLR0913  (a result with many fields; all but two by name)
    first: int,
    last: int,
    *,
    macs: tuple[float, float] = (MACS, 0.0),
    params: tuple[float, float] = (PARAMS, 0.0),
    harm: float = 0.0,
    inputs_kept: float = 1.0,
    widths: dict[str, int] | None = None,
) -> Candidate:
    return Candidate(
        first=first,
        last=last,
        representative=first,
        adapter=None,
        inputs_kept=inputs_kept,
        widths=widths or {},
        macs_fixed=macs[0],
        macs_out=macs[1],
        params_fixed=params[0],
        params_out=params[1],
        harm_kl=harm,
        harm_stderr=0.0,
        relative_error=harm,
    )


def candidates(rows: list[Candidate], regions: int) -> Candidates:
    return Candidates(
        rows=tuple(rows),
        cut_groups={},
        regions=regions,
        macs=MACS * regions,
        params=PARAMS * regions,
        skipped=(Skip(what="width of odd", reason="it is odd"),),
        inputs=8,
        heldout=8,
        seconds=0.0,
    )


def kept_whole(regions: int) -> list[Candidate]:
    return [candidate(index, index) for index in range(regions)]


def effects(regions: int, cka: float = 0.9) -> Effects:
    infos = [
        RegionInfo(index=i, name=f"r{i}", modules=(), input_shape=(1,), output_shape=(1,), macs=MACS, params=PARAMS)
        for i in range(regions)
    ]
    matrix = tuple(tuple(1.0 if i == j else cka for j in range(regions)) for i in range(regions))
    return Effects(
        chain=Chain(regions=tuple(infos), untraced=()),
        nodes=tuple(
            NodeEffect(site=f"r{i}", ace=i / 10, ace_stderr=0.0, kl=0.0, kl_stderr=0.0) for i in range(regions)
        ),
        features=(),
        feature_ace=(),
        feature_ace_stderr=(),
        baselines=("mean",),
        inputs=8,
        interventions=8,
        forwards=16,
        forward_seconds=1.0,
        analysis_seconds=1.0,
        cka=matrix,
        cka_null=matrix,
        hsic_bins=(matrix, matrix),
    )


def groups(regions: int) -> Groups:
    partition = Partition(
        epsilon_low=0.1,
        epsilon_high=0.4,
        nodes=(tuple(range(regions)),),
        stability_ari=1.0,
        stability_low=1.0,
    )
    return Groups(
        sites=tuple(f"r{i}" for i in range(regions)),
        epsilon=0.2,
        chosen=partition,
        path=(partition,),
        fisher=(),
        null_cka_mean=0.0,
        null_cka_max=0.0,
        inputs=8,
        stable=True,
    )


Price = tuple[float, float, float]
BY_MACS, BY_PARAMS, _, BY_LATENCY = np.eye(len(KINDS))


def all_plans(known: Candidates, at: int = 0, share: float = 1.0) -> Iterator[tuple[Price, list[Candidate]]]:
    """Every sequence of candidates that covers the chain and in which each reads what the one before can write."""
    for row in known.rows:
        if row.first != at or row.inputs_kept != share:
            continue
        if row.last == known.regions - 1:
            yield _price(row, 1.0, (0.0, 0.0, 0.0)), [row]
            continue
        for out in {other.inputs_kept for other in known.rows if other.first == row.last + 1}:
            if out < 1.0 and row.macs_out == 0:
                continue
            for cost, rest in all_plans(known, row.last + 1, out):
                yield _price(row, out, cost), [row, *rest]


def _price(row: Candidate, out: float, rest: Price) -> Price:
    macs = row.macs_fixed + out * row.macs_out
    params = row.params_fixed + out * row.params_out
    return rest[0] + macs, rest[1] + params, rest[2] + row.harm_kl


@st.composite
def small_sets(draw: st.DrawFn) -> Candidates:
    regions = draw(st.integers(1, 4))
    outs = [draw(st.sampled_from([0, 30])) for _ in range(regions)]
    rows = [candidate(index, index, macs=(MACS - out, out)) for index, out in enumerate(outs)]
    number = st.floats(0, 40).map(lambda value: round(value, 2))
    for _ in range(draw(st.integers(0, 9))):
        first = draw(st.integers(0, regions - 1))
        last = draw(st.integers(first, min(first + 2, regions - 1)))
        share = draw(st.sampled_from([1.0, 0.5, 0.25])) if first else 1.0
        rows.append(
            candidate(
                first,
                last,
                macs=(draw(number), draw(number)),
                params=(draw(number) / 2, draw(number) / 4),
                harm=draw(number),
                inputs_kept=share,
            )
        )
    return candidates(rows, regions)


@given(small_sets(), st.floats(0.05, 1.0))
def test_the_best_plan_is_brute_forces(known: Candidates, share: float) -> None:
    limit = share * known.macs * (1 + 1e-9)
    possible = [cost for cost, _ in all_plans(known) if cost[0] <= limit]
    positions = best_path(known, price(known), BY_MACS, {"macs": share})
    assert (positions is None) == (not possible)
    if positions is None:
        return
    found = [known.rows[position] for position in positions]
    assert sum(row.harm_kl for row in found) == pytest.approx(min(cost[2] for cost in possible), abs=1e-9)
    outs = [row.inputs_kept for row in found[1:]] + [1.0]
    assert sum(row.macs_fixed + out * row.macs_out for row, out in zip(found, outs, strict=True)) <= limit
    assert [row.first for row in found] == [0, *[row.last + 1 for row in found[:-1]]]
    assert found[-1].last == known.regions - 1


@given(small_sets(), st.floats(0.05, 1.0))
def test_a_budget_of_parameters_is_met_likewise(known: Candidates, share: float) -> None:
    limit = share * known.params * (1 + 1e-9)
    possible = [cost for cost, _ in all_plans(known) if cost[1] <= limit and cost[0] <= known.macs * (1 + 1e-9)]
    found = best_path(known, price(known), BY_PARAMS, {"macs": 1.0, "params": share})
    assert (found is None) == (not possible)
    if found is not None:
        harm = sum(known.rows[position].harm_kl for position in found)
        assert harm == pytest.approx(min(cost[2] for cost in possible), abs=1e-9)


@given(small_sets(), st.floats(0.05, 1.0), st.randoms(use_true_random=False))
def test_a_budget_of_latency_is_met_likewise(known: Candidates, share: float, random: Random) -> None:
    table = latencies(known, random)
    times = dict(zip(map(id, known.rows), table.ms, strict=True))
    limit = share * table.teacher_ms * (1 + 1e-9)

    def latency(path: list[Candidate]) -> float:
        kept = [row.inputs_kept for row in path[1:]] + [1.0]
        scaling = [row.macs_out / max(row.macs_out + row.macs_fixed, 1e-300) for row in path]
        parts = zip(path, kept, scaling, strict=True)
        return sum(times[id(row)] * (1 - scale + out * scale) for row, out, scale in parts)

    possible = [cost[2] for cost, path in all_plans(known) if latency(path) <= limit]
    found = best_path(known, price(known, table), BY_LATENCY, {"latency": share})
    assert (found is None) == (not possible)
    if found is not None:
        harm = sum(known.rows[position].harm_kl for position in found)
        assert harm == pytest.approx(min(possible), abs=1e-9)


def latencies(known: Candidates, random: Random) -> LatencyTable:
    """Made-up times that have nothing to do with MACs."""
    ms = tuple(random.uniform(0.1, 2.0) for _ in known.rows)
    whole = {row.first: time for row, time in zip(known.rows, ms, strict=True) if is_whole(row)}
    total = sum(whole.values())
    return LatencyTable(runtime="onnxruntime", batch=1, threads=1, ms=ms, teacher_ms=total, parts=len(ms), seconds=1.0)


def is_whole(row: Candidate) -> bool:
    return row.first == row.last and not row.widths and row.inputs_kept == 1.0 and row.harm_kl == 0.0


@given(small_sets())
def test_the_front_falls_from_the_smallest_plan_to_the_teacher(known: Candidates) -> None:
    points = front(known, price(known))
    assert all(a.macs < b.macs and a.harm_kl > b.harm_kl for a, b in itertools.pairwise(points))
    least = min(cost[0] for cost, _ in all_plans(known))
    assert points[0].macs == pytest.approx(least / known.macs, abs=1e-9)
    assert points[-1].harm_kl == 0.0


@given(small_sets(), st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_a_plan_answers_for_its_numbers(known: Candidates, macs: float, params: float) -> None:
    budget = BudgetSection(macs=macs, params=params)
    try:
        plan = make_plan(known, effects(known.regions), groups(known.regions), budget, PlanSection())
    except BudgetError:
        return
    assert plan.macs <= macs + 0.01
    assert plan.params <= params + 0.01
    assert plan.predicted_harm_kl == pytest.approx(sum(d.candidate.harm_kl for d in plan.decisions))
    assert sum(d.macs_before for d in plan.decisions) == known.macs
    assert [d.outputs_kept for d in plan.decisions[:-1]] == [d.candidate.inputs_kept for d in plan.decisions[1:]]


def test_many_candidates_still_give_the_exact_ends_of_the_front() -> None:
    rows = kept_whole(6)
    for index in range(6):
        rows += [candidate(index, index, macs=(3 + 1.37 * k + index / 7, 0), harm=1 / (k + 1.1)) for k in range(12)]
    known = candidates(rows, 6)
    points = front(known, price(known))
    assert points[0].macs == pytest.approx(sum(3 + index / 7 for index in range(6)) / known.macs)
    assert points[-1].macs == pytest.approx(1.0)
    assert points[-1].harm_kl == 0.0


def test_an_impossible_budget_says_what_is_possible() -> None:
    known = candidates([*kept_whole(2), candidate(0, 1, macs=(60, 0), params=(20, 0), harm=1.0)], 2)
    with pytest.raises(BudgetError, match=r"keep 0\.300 of the MACs, 0\.200 of the parameters") as caught:
        make_plan(known, effects(2), groups(2), BudgetSection(macs=0.1), PlanSection())
    assert "budget.macs: 0.1" in str(caught.value)
    with pytest.raises(BudgetError):
        make_plan(known, effects(2), groups(2), BudgetSection(params=0.1), PlanSection())
    large = replace(known, macs=1_000_000)
    with pytest.raises(BudgetError, match=r"keep 6e-05 of the MACs, 0\.200 of the parameters"):
        make_plan(large, effects(2), groups(2), BudgetSection(macs=1e-5), PlanSection())


def test_without_a_budget_half_the_macs_are_planned_for() -> None:
    rows = [*kept_whole(2), candidate(0, 1, macs=(99, 0), harm=3.0), candidate(1, 1, macs=(10, 0), harm=1.0)]
    plan = make_plan(candidates(rows, 2), effects(2), groups(2), BudgetSection(), PlanSection())
    assert plan.macs == pytest.approx(0.495)
    assert [decision.kind for decision in plan.decisions] == ["merge"]


def test_a_roomy_budget_keeps_everything() -> None:
    rows = [*kept_whole(3), candidate(0, 1, macs=(60, 0), harm=0.2)]
    plan = make_plan(candidates(rows, 3), effects(3), groups(3), BudgetSection(macs=1.0), PlanSection())
    assert [decision.kind for decision in plan.decisions] == ["keep"] * 3
    assert (plan.macs, plan.params, plan.predicted_harm_kl) == (1.0, 1.0, 0.0)


def test_what_no_budget_limits_may_grow() -> None:
    rows = [*kept_whole(2), candidate(0, 0, macs=(10, 0), params=(60, 0), harm=0.1)]
    plan = make_plan(candidates(rows, 2), effects(2), groups(2), BudgetSection(macs=0.6), PlanSection())
    assert (plan.macs, plan.params) == (0.55, 1.1)


def test_a_narrow_cut_point_is_paid_for_on_both_sides() -> None:
    rows = [
        candidate(0, 0, macs=(0, 100)),
        candidate(1, 1),
        candidate(1, 1, macs=(50, 0), inputs_kept=0.5, harm=0.3),
    ]
    known = candidates(rows, 2)
    plan = make_plan(known, effects(2), groups(2), BudgetSection(macs=0.5), PlanSection())
    first, second = plan.decisions
    assert (first.outputs_kept, first.macs_after, first.kind) == (0.5, 50, "keep")
    assert (second.macs_after, second.kind) == (50, "narrow")


def test_evidence_and_refusals_stand_beside_each_decision() -> None:
    rows = [
        *kept_whole(2),
        candidate(0, 1, macs=(50, 0), harm=0.1, widths={"conv": 4}),
        candidate(0, 1, macs=(90, 0), harm=0.4),
    ]
    plan = make_plan(candidates(rows, 2), effects(2, cka=0.8), groups(2), BudgetSection(macs=0.5), PlanSection())
    (decision,) = plan.decisions
    assert (decision.node, decision.kind) == ("r0..r1", "merge+narrow")
    assert decision.evidence.cka == 0.8
    assert decision.evidence.ace == 0.1
    assert {skip.what for skip in decision.refused} == {"r0", "r0 for r0..r1"}
    assert plan.skipped == (Skip(what="width of odd", reason="it is odd"),)
    assert [decision.macs_after, decision.params_after] == [50, 50]
