"""The plan with merges against the one without: surgery decides, and what lost is told."""

from __future__ import annotations

import dataclasses

import pytest
from test_surgery import inputs_of, merging, planned, singles, traced

from causal_compress.errors import BudgetError
from causal_compress.recipe import PlanSection, Recipe
from causal_compress.shrink import rivals
from causal_compress.shrink.probe import Probe
from causal_compress.shrink.rivals import plan_and_compare, trial_harm


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
    chosen = plan_and_compare(network, (None, None, None), recipe, probe)
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
    assert plan_and_compare(network, (None, None, None), Recipe(), probe_of("residual")) is with_merge


@pytest.mark.parametrize("section", [PlanSection(), PlanSection(width=False, low_rank=False)])
def test_without_merges_or_another_axis_there_is_no_rival(monkeypatch, section):
    network = traced("residual")
    plan = planned(singles(network) if section.width else merging(network, 1, 2))
    offer(monkeypatch, plan, RuntimeError("must not be asked for"))
    recipe = Recipe(plan=section)
    assert plan_and_compare(network, (None, None, None), recipe, probe_of("residual")) is plan
