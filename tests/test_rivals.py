"""A plan against those that do without some of its means: surgery decides, and what lost is told."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from test_surgery import inputs_of, merging, planned, singles, traced

from causal_compress.errors import BudgetError
from causal_compress.recipe import PlanSection, Recipe
from causal_compress.results import Skip
from causal_compress.shrink import rivals
from causal_compress.shrink.probe import Probe
from causal_compress.shrink.rivals import CHEAP_MACS, plan_and_compare, trial_harm

DEAR = (SimpleNamespace(macs=CHEAP_MACS + 1), None, None)
CHEAP = (SimpleNamespace(macs=CHEAP_MACS), None, None)


def probe_of(name):
    fit = list(inputs_of(name, 128, 1).split(32))
    return Probe(fit, list(inputs_of(name, 64, 2).split(32)), fit)


def offer(monkeypatch, merged, flat):
    """make_plan gives one plan where merges are allowed, the other where they are not."""

    def plan(candidates, effects, groups, budget, section, file=None):
        found = merged if section.depth else flat
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(rivals, "make_plan", plan)


@pytest.mark.parametrize("kept", [2, 5])
def test_the_plan_whose_student_does_less_harm_wins(monkeypatch, kept):
    network, probe, recipe = traced("residual"), probe_of("residual"), Recipe()
    with_merge = planned(merging(network, 1, 2))
    conv = next(p for p, m in network.graph.named_modules() if p.endswith("conv1") and "blocks" in p)
    region = next(r.info.index for r in network.regions if conv in r.info.modules)
    without = planned(singles(network), {region: {conv: kept}})
    offer(monkeypatch, with_merge, without)
    harms = [trial_harm(network, plan, recipe, probe) for plan in (with_merge, without)]
    chosen = plan_and_compare(network, DEAR, recipe, probe)
    assert chosen.decisions == (with_merge, without)[harms.index(min(harms))].decisions
    (told,) = chosen.skipped
    assert f"{max(harms):.4f} nats" in told.reason
    assert f"against {min(harms):.4f}" in told.reason


@pytest.mark.parametrize("flat", [BudgetError("no", remedy="no"), "far worse"])
def test_a_rival_that_is_not_there_or_far_worse_is_not_tried(monkeypatch, flat):
    network = traced("residual")
    with_merge = dataclasses.replace(planned(merging(network, 1, 2)), predicted_harm_kl=0.1)
    worse = dataclasses.replace(planned(singles(network)), predicted_harm_kl=0.2)
    offer(monkeypatch, with_merge, worse if flat == "far worse" else flat)
    monkeypatch.setattr(rivals, "trial_harm", lambda *_: pytest.fail("nothing is to be tried"))
    assert plan_and_compare(network, DEAR, Recipe(), probe_of("residual")) is with_merge


@pytest.mark.parametrize("section", [PlanSection(), PlanSection(width=False, low_rank=False)])
def test_without_merges_or_another_axis_there_is_no_rival(monkeypatch, section):
    network = traced("residual")
    plan = planned(singles(network) if section.width else merging(network, 1, 2))
    offer(monkeypatch, plan, RuntimeError("must not be asked for"))
    recipe = Recipe(plan=section)
    assert plan_and_compare(network, DEAR, recipe, probe_of("residual")) is plan


def small_plans():
    """Plans of the same network, by the means that they may use: (depth, low_rank)."""
    network = traced("residual")
    conv = next(p for p, m in network.graph.named_modules() if p.endswith("conv1") and "blocks" in p)
    region = next(r.info.index for r in network.regions if conv in r.info.modules)
    plans = {
        (True, True): planned(merging(network, 1, 2)),
        (True, False): planned(merging(network, 1, 2)),
        (False, True): planned(singles(network), {region: {conv: 2}}),
        (False, False): planned(singles(network), {region: {conv: 5}}),
    }
    return network, {key: dataclasses.replace(plan, predicted_harm_kl=0.1) for key, plan in plans.items()}


@pytest.mark.parametrize("winner", [(True, True), (False, True), (False, False)])
def test_a_small_network_tries_all_that_differ_however_far_they_seem(monkeypatch, winner):
    network, plans = small_plans()
    far = {key: dataclasses.replace(p, predicted_harm_kl=0.1 if all(key) else 9.0) for key, p in plans.items()}
    monkeypatch.setattr(rivals, "make_plan", lambda *known, file=None: far[known[-1].depth, known[-1].low_rank])
    tried = []

    def harm(network, plan, recipe, probe):
        tried.append(plan)
        return 0.01 if plan is far[winner] else 0.02 + len(tried)

    monkeypatch.setattr(rivals, "trial_harm", harm)
    chosen = plan_and_compare(network, CHEAP, Recipe(), probe_of("residual"))
    assert [id(plan) for plan in tried] == [id(far[key]) for key in ((True, True), (False, True), (False, False))]
    assert chosen.decisions == far[winner].decisions
    names = {
        (True, True): "the plan of least predicted harm",
        (False, True): "the plan without merges",
        (False, False): "the plan without merges and low ranks",
    }
    assert [skip.what for skip in chosen.skipped] == [name for key, name in names.items() if key != winner]
    assert all(f"against 0.0100 of {names[winner]}" in skip.reason for skip in chosen.skipped)


def test_plans_that_do_the_same_are_tried_once(monkeypatch):
    network, plans = small_plans()
    flat = plans[False, True]
    told = tuple(dataclasses.replace(d, refused=(Skip(what="another", reason="worse"),)) for d in flat.decisions)
    plans[False, False] = dataclasses.replace(flat, decisions=told)
    monkeypatch.setattr(rivals, "make_plan", lambda *known, file=None: plans[known[-1].depth, known[-1].low_rank])
    tried = []
    monkeypatch.setattr(rivals, "trial_harm", lambda network, plan, *_: tried.append(plan) or 0.1)
    plan_and_compare(network, CHEAP, Recipe(), probe_of("residual"))
    assert [id(plan) for plan in tried] == [id(plans[True, True]), id(flat)]


def test_what_the_recipe_forbids_no_rival_uses(monkeypatch):
    network, plans = small_plans()
    asked = []

    def plan(*known, file=None):
        asked.append((known[-1].depth, known[-1].width, known[-1].low_rank))
        return plans[known[-1].depth, known[-1].low_rank]

    monkeypatch.setattr(rivals, "make_plan", plan)
    monkeypatch.setattr(rivals, "trial_harm", lambda *_: 0.1)
    recipe = Recipe(plan=PlanSection(low_rank=False))
    plan_and_compare(network, CHEAP, recipe, probe_of("residual"))
    assert asked == [(True, True, False), (False, True, False), (False, True, False)]


def test_a_small_network_that_is_left_whole_has_no_rival(monkeypatch):
    network = traced("residual")
    whole = planned(singles(network))
    monkeypatch.setattr(rivals, "make_plan", lambda *known, file=None: whole)
    monkeypatch.setattr(rivals, "trial_harm", lambda *_: pytest.fail("nothing is to be tried"))
    assert plan_and_compare(network, CHEAP, Recipe(), probe_of("residual")) is whole
