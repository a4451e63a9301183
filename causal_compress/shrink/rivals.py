"""Plans beside each other: harms predicted for merges, narrow layers and low ranks err differently; surgery decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

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
"""A rival is tried if its predicted harm is at most so many times that of the plan."""
CHEAP_MACS = 1_000_000
"""Up to here [MACs of the teacher] trials are cheap, and all rivals are tried, however far they seem to be."""
INPUTS = 512
_WITHOUT = (("merges", {"depth": False}), ("low ranks", {"low_rank": False}))


def plan_and_compare(
    network: Network,
    known: tuple[Candidates, Effects, Groups],
    recipe: Recipe,
    probe: Probe,
    file: FileCosts | None = None,
) -> Plan:
    """The plan of least predicted harm, or one that does without some of its means if its student does less harm.

    They are compared by the output KL of their students on held-out inputs, after a surgery on fewer inputs. Large
    networks have one rival, the plan without merges, and that only if it is not predicted to do far more harm; small
    ones also have those without low ranks, and without both.

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
    plans = {"the plan of least predicted harm": best}
    for name, rival in _rivals(best, known, recipe, file):
        if not any(_same(rival, plan) for plan in plans.values()):
            plans[name] = rival
    if len(plans) == 1:
        return best
    harms = {name: trial_harm(network, plan, recipe, probe) for name, plan in plans.items()}
    winner = min(harms, key=lambda name: harms[name])
    told = tuple(
        Skip(
            what=name,
            reason=f"held-out output KL {harm:.4f} nats after a trial surgery, against {harms[winner]:.4f} of {winner}",
        )
        for name, harm in harms.items()
        if name != winner
    )
    return replace(plans[winner], skipped=(*plans[winner].skipped, *told))


def _same(one: Plan, other: Plan) -> bool:
    """Whether two plans do the same; what they refused for it may differ."""
    return [decision.candidate for decision in one.decisions] == [decision.candidate for decision in other.decisions]


def _rivals(
    best: Plan, known: tuple[Candidates, Effects, Groups], recipe: Recipe, file: FileCosts | None
) -> Iterator[tuple[str, Plan]]:
    """Plans that do without a means that the best one uses, as far as they are worth a trial."""
    cheap = known[0].macs <= CHEAP_MACS
    for names, changes in _restrictions(best, recipe, cheap=cheap):
        section = recipe.plan.model_copy(update=changes)
        try:
            rival = make_plan(*known, recipe.budget, section, file=file)
        except BudgetError:
            continue
        if cheap or rival.predicted_harm_kl <= NEAR * best.predicted_harm_kl:
            yield f"the plan without {names}", rival


def _restrictions(best: Plan, recipe: Recipe, *, cheap: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What rivals do without, and how the recipe says so; some means must be left to them."""
    used = {
        "merges": any(decision.candidate.first != decision.candidate.last for decision in best.decisions),
        "low ranks": any(decision.candidate.ranks for decision in best.decisions),
    }
    left = recipe.plan.width or recipe.plan.low_rank
    for name, change in _WITHOUT if cheap else _WITHOUT[:1]:
        if used[name] and left:
            yield name, change
    if cheap and any(used.values()) and recipe.plan.width:
        yield "merges and low ranks", {"depth": False, "low_rank": False}


def trial_harm(network: Network, plan: Plan, recipe: Recipe, probe: Probe) -> float:
    """Output KL of a plan's student on held-out inputs [nats], refitted on few and by the closed forms alone."""
    first = fresh_front(network, probe, min(INPUTS, recipe.rewrite.inputs), recipe.plan.temperature)
    student, _, _ = rewrite(network, plan, first, recipe.rewrite)
    second = fresh_front(network, probe, min(INPUTS, recipe.prune.inputs), recipe.plan.temperature)
    prune(student, plan, second, recipe.prune.model_copy(update={"refine": False}))
    return second.harm_kl
