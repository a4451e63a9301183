"""The plan as a stage of a run: within shares of MACs and parameters, on a runtime's clock, or in so many bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from causal_compress.deploy.filesize import bytes_each, sizer_for
from causal_compress.deploy.latency import time_models
from causal_compress.files import sha256_of_json
from causal_compress.provenance import package_version, place
from causal_compress.recipe import BudgetSection, Recipe
from causal_compress.results import Candidates, Effects, Groups, LatencyTable, Plan
from causal_compress.runs import Run, read_provenance
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
        "budget": _costs_of(recipe.budget),
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
    if limited:
        depends |= {"bytes_each": bytes_each(recipe.quantize)}
    whole = depends | {"budget": recipe.budget}
    if recorded(run.folder, "plan", whole):  # by an earlier causal-compress, with all that followed from it
        depends = whole

    def work(_: Path) -> Plan:
        return plan_for_size(network, recipe.budget, planner, sizer) if limited else planner(recipe.budget)

    return run.stage("plan", Plan, work, depends=depends)


def recorded(folder: Path, stage: str, depends: Mapping[str, Any]) -> bool:
    """Whether a run folder holds a stage that depended on this, by the key that `Run.stage` gives it.

    Args:
        folder: A run folder.
        stage: The stage's name.
        depends: What it should have depended on.
    """
    told = read_provenance(folder)
    key = sha256_of_json([stage, depends, told.versions.get("causal-compress", package_version())])
    return any((record.stage, record.key) == (stage, key) for record in told.stages)


def surgery_depends(folders: Sequence[Path], candidates: str, key: str, plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """What merging depends on: what was decided, whichever budget led to it, and the inputs that it is fitted on.

    Args:
        folders: Where its result may be found; there it also counts under the plan's key, as it once was recorded.
        candidates: The key of what was measured.
        key: The plan's.
        plan: Its decisions.
        recipe: How representatives are refitted.
    """
    decided = {
        "candidates": candidates,
        "decisions": plan.decisions,
        "rewrite": recipe.rewrite,
        "drawn": most_inputs(recipe),
    }
    earlier = {"plan": key, "rewrite": recipe.rewrite}
    known = [depends for depends in (decided, earlier) if any(recorded(each, "rewrite", depends) for each in folders)]
    return known[0] if known else decided


def most_inputs(recipe: Recipe) -> int:
    """How many calibration inputs surgery draws."""
    return max(recipe.rewrite.inputs, recipe.prune.inputs)


def _costs_of(budget: BudgetSection) -> BudgetSection:
    """What of a budget shapes a plan: a limit on the drop of accuracy only decides the verdict."""
    return budget.model_copy(update={"max_accuracy_drop": None})


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
