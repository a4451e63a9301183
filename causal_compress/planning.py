"""The plan as a stage of a run: within shares of MACs and parameters, on a runtime's clock, or in so many bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from causal_compress.deploy.filesize import bytes_each, sizer_for
from causal_compress.deploy.latency import time_models
from causal_compress.provenance import place
from causal_compress.recipe import BudgetSection, Recipe
from causal_compress.results import Candidates, Effects, Groups, LatencyTable, Plan
from causal_compress.runs import Run
from causal_compress.shrink.costs import FileCosts
from causal_compress.shrink.filesize import Planner, file_costs, plan_for_size
from causal_compress.shrink.latency import measure_latency, plan_for_latency
from causal_compress.shrink.probe import Probe
from causal_compress.shrink.rivals import plan_and_compare
from causal_compress.understand.trace import Network

Measured = tuple[Candidates, Effects, Groups]
Costs = Callable[[], FileCosts | None]
"""What a file consists of, found out when a plan is made and not when one is read back."""


def decide(run: Run, recipe: Recipe, network: Network, known: Measured, probe: Probe) -> Plan:
    """The plan; with a budget on latency, from what each candidate takes on the runtime, timed here.

    Args:
        run: The open run folder.
        recipe: Its budget, and how plans are made and carried out.
        network: The teacher.
        known: What was measured.
        probe: Inputs for trial surgeries.

    Raises:
        BudgetError: no plan can meet the budget.
    """
    depends = {
        "candidates": run.key_of("candidates"),
        "group": run.key_of("group"),
        "budget": recipe.budget,
        "plan": recipe.plan.model_dump(exclude=None if recipe.plan.undo else {"undo"}),
    }
    limited = recipe.budget.size_bytes is not None
    sizer = sizer_for(recipe.quantize, network.example_input)

    @cache
    def costs() -> FileCosts | None:
        return file_costs(network, sizer, bytes_each(recipe.quantize)) if limited else None

    if recipe.budget.latency_ms is None:
        planner = _planner(recipe, network, known, probe, costs)
        depends |= {"rewrite": recipe.rewrite, "prune": recipe.prune}
    else:
        planner = _planner_in_time(run, recipe, network, known, costs)
        depends |= {"latency": run.key_of("latency")}
    if not limited:
        return run.stage("plan", Plan, lambda _: planner(recipe.budget), depends=depends)
    return run.stage(
        "plan",
        Plan,
        lambda _: plan_for_size(network, recipe.budget, planner, sizer),
        depends={"bytes_each": bytes_each(recipe.quantize), **depends},
    )


def _planner(recipe: Recipe, network: Network, known: Measured, probe: Probe, costs: Costs) -> Planner:
    def planner(budget: BudgetSection) -> Plan:
        return plan_and_compare(network, known, recipe.model_copy(update={"budget": budget}), probe, costs())

    return planner


def _planner_in_time(run: Run, recipe: Recipe, network: Network, known: Measured, costs: Costs) -> Planner:
    section = recipe.budget.latency_ms
    assert section is not None
    timer = partial(time_models, section=section)
    where = {"runtime": section.runtime, "batch": section.batch, "threads": section.threads, **place()}
    table = run.stage(
        "latency",
        LatencyTable,
        lambda _: measure_latency(network, known[0], section, timer),
        depends={"candidates": run.key_of("candidates"), **where},
    )

    def planner(budget: BudgetSection) -> Plan:
        return plan_for_latency(network, *known, budget, recipe.plan, table, timer, costs())

    return planner
