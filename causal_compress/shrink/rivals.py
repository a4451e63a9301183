"""Two plans beside each other: harms predicted for merges and for narrower layers err differently; surgery decides."""

from __future__ import annotations

from dataclasses import replace

from causal_compress.errors import BudgetError
from causal_compress.recipe import Recipe
from causal_compress.results import Candidates, Effects, Groups, Plan, Skip
from causal_compress.shrink.costs import FileCosts
from causal_compress.shrink.front import fresh_front
from causal_compress.shrink.plan import make_plan
from causal_compress.shrink.probe import Probe
from causal_compress.shrink.prune import prune
from causal_compress.shrink.rewrite import rewrite
from causal_compress.understand.trace import Network

NEAR = 1.5
"""A plan without merges is tried if its predicted harm is at most so many times that of the plan with them."""
INPUTS = 512


def plan_and_compare(
    network: Network,
    known: tuple[Candidates, Effects, Groups],
    recipe: Recipe,
    probe: Probe,
    file: FileCosts | None = None,
) -> Plan:
    """The plan of least predicted harm; where it merges, the better of it and of one without merges.

    The two are compared by the output KL of their students on held-out inputs, after a surgery on fewer inputs. A plan
    without merges whose predicted harm is far higher is not tried.

    Args:
        network: The teacher.
        known: What was measured.
        recipe: Its budget, and how plans are carried out.
        probe: Inputs for the refits and for reading harm.
        file: What an ONNX file consists of; needed with a budget on its size.

    Raises:
        BudgetError: no plan can meet the budget.
    """
    best = make_plan(*known, recipe.budget, recipe.plan, file=file)
    rival = _without_merges(best, known, recipe, file)
    if rival is None:
        return best
    both, names = (best, rival), ("the plan with merges", "the plan without merges")
    harms = [trial_harm(network, plan, recipe, probe) for plan in both]
    winner = min(range(2), key=lambda index: harms[index])
    told = f"held-out output KL {harms[1 - winner]:.4f} nats after a trial surgery, against {harms[winner]:.4f}"
    return replace(both[winner], skipped=(*both[winner].skipped, Skip(what=names[1 - winner], reason=told)))


def _without_merges(
    best: Plan, known: tuple[Candidates, Effects, Groups], recipe: Recipe, file: FileCosts | None
) -> Plan | None:
    merges = any(decision.candidate.first != decision.candidate.last for decision in best.decisions)
    if not merges or not (recipe.plan.width or recipe.plan.low_rank):
        return None
    try:
        rival = make_plan(*known, recipe.budget, recipe.plan.model_copy(update={"depth": False}), file=file)
    except BudgetError:
        return None
    return rival if rival.predicted_harm_kl <= NEAR * best.predicted_harm_kl else None


def trial_harm(network: Network, plan: Plan, recipe: Recipe, probe: Probe) -> float:
    """Output KL of a plan's student on held-out inputs [nats], refitted on few and by the closed forms alone."""
    first = fresh_front(network, probe, min(INPUTS, recipe.rewrite.inputs), recipe.plan.temperature)
    student, _, _ = rewrite(network, plan, first, recipe.rewrite)
    second = fresh_front(network, probe, min(INPUTS, recipe.prune.inputs), recipe.plan.temperature)
    prune(student, plan, second, recipe.prune.model_copy(update={"refine": False}))
    return second.harm_kl
