"""Which change costs the most: each is undone alone, and the surgery carried out again without it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_compress.errors import CausalCompressError
from causal_compress.inputs.data import Split
from causal_compress.progress import progress
from causal_compress.recipe import PruneSection, RewriteSection
from causal_compress.results import Bisection, Candidates, Change, Decision, Estimate, Plan, Skip, Undone
from causal_compress.shrink.front import fresh_front, kl_rows
from causal_compress.shrink.probe import Probe
from causal_compress.shrink.prune import prune
from causal_compress.shrink.rewrite import rewrite
from causal_compress.shrink.surgery import Student
from causal_compress.shrink.undo import taken_back
from causal_compress.understand.cost import count_macs, count_params
from causal_compress.understand.statistics import paired_drop, wilson
from causal_compress.understand.trace import Network

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """What was planned, how it is carried out, and what it is measured on."""

    network: Network
    plan: Plan
    candidates: Candidates
    probe: Probe
    validation: Split
    rewrite: RewriteSection
    prune: PruneSection
    temperature: float


@dataclass(frozen=True)
class _Reading:
    """One student: KL of each held-out input, whether each validation answer is right, and its cost."""

    kl: Tensor
    right: Tensor
    macs: int
    params: int


def carry_out(case: Case, plan: Plan) -> Student:
    """The surgery of a plan, as a run does it: merges, then widths; no distillation.

    Args:
        case: Network, probe and sections.
        plan: The decisions.
    """
    front = fresh_front(case.network, case.probe, case.rewrite.inputs, case.temperature)
    student, _, _ = rewrite(case.network, plan, front, case.rewrite)
    front = fresh_front(case.network, case.probe, case.prune.inputs, case.temperature)
    return prune(student, plan, front, case.prune)[0]


def bisect(case: Case, ledger: Sequence[Change], *, top: int | None = None, distilled: bool = False) -> Bisection:
    """Undo every change of a plan, one at a time, and read what comes back.

    All other changes are made again in full, so what they had absorbed of the undone one's error is accounted for.

    Args:
        case: The plan and what it is measured on.
        ledger: What surgery noted; orders the changes where not all are tried.
        top: Only so many changes are tried, those with the largest measured harm in the ledger; None: all.
        distilled: Whether the run's own student was distilled afterwards (a note is made of it).

    Returns:
        Changes, the one whose undoing removes most of the harm first.

    Limits: changes interact; the sum of the harms removed is not the harm of the plan. A distilled student may have
        recovered from some of it.
    """
    start = time.perf_counter()
    positions, skipped = _chosen(case.plan, ledger, top)
    undone: list[Undone] = []
    base = _read(case, carry_out(case, case.plan).graph)
    for position in progress(positions, label="undoing one change at a time", unit="change"):
        decision = case.plan.decisions[position]
        try:
            student = carry_out(case, taken_back(case.plan, position, case.candidates, case.network.chain().regions))
        except CausalCompressError as error:
            skipped.append(Skip(what=decision.node, reason=f"the plan can't be carried out without it: {error.what}"))
            continue
        undone.append(_undone(decision, ledger, base, _read(case, student.graph)))
        logger.debug("undone %s: %.4f nats removed", decision.node, undone[-1].harm_removed_kl.value)
    return Bisection(
        undone=tuple(sorted(undone, key=lambda one: -one.harm_removed_kl.value)),
        skipped=tuple(skipped),
        notes=_notes(distilled),
        heldout_kl=float(base.kl.mean()),
        heldout=len(base.kl),
        accuracy=wilson(int(base.right.sum()), len(base.right)),
        macs=base.macs,
        params=base.params,
        distilled=distilled,
        refit_inputs=min(max(case.rewrite.inputs, case.prune.inputs), sum(map(len, case.probe.surgery))),
        seconds=time.perf_counter() - start,
    )


def with_inputs(case: Case, inputs: int | None) -> Case:
    """The same case with fewer inputs for each refit; None: as many as the run used."""
    if inputs is None:
        return case
    return replace(
        case,
        rewrite=case.rewrite.model_copy(update={"inputs": min(inputs, case.rewrite.inputs)}),
        prune=case.prune.model_copy(update={"inputs": min(inputs, case.prune.inputs)}),
    )


def _chosen(plan: Plan, ledger: Sequence[Change], top: int | None) -> tuple[list[int], list[Skip]]:
    """The decisions that change something, worst of the ledger first, and those beyond `top`."""
    changed = [position for position, decision in enumerate(plan.decisions) if decision.kind != "keep"]
    harms = {position: _noted_harm(plan.decisions[position].node, ledger) or 0.0 for position in changed}
    changed.sort(key=lambda position: -harms[position])
    skipped = (
        [
            Skip(
                what=plan.decisions[position].node,
                reason=f"its measured harm in the ledger ({harms[position]:.4f} nats) is not among the {top} largest",
            )
            for position in changed[top:]
        ]
        if top is not None
        else []
    )
    return changed[:top], skipped


def _noted_harm(node: str, ledger: Sequence[Change]) -> float | None:
    noted = [line.measured_harm_kl for line in ledger if line.node == node and line.measured_harm_kl is not None]
    return sum(noted) if noted else None


def _read(case: Case, student: nn.Module) -> _Reading:
    rows: list[Tensor] = []
    right: list[Tensor] = []
    with torch.inference_mode():
        for x in case.probe.heldout:
            reference = F.log_softmax(case.network.graph(x) / case.temperature, 1)
            rows.append(kl_rows(student(x), reference, case.temperature))
        for x, y in case.validation.batches(250):
            right.append(student(x).argmax(1) == y)
    example = case.network.example_input[:1]
    return _Reading(torch.cat(rows).double(), torch.cat(right), count_macs(student, example), count_params(student))


def _undone(decision: Decision, ledger: Sequence[Change], base: _Reading, now: _Reading) -> Undone:
    lost, gained = int((base.right & ~now.right).sum()), int((now.right & ~base.right).sum())
    gain, interval = paired_drop(gained, lost, len(now.right))
    return Undone(
        node=decision.node,
        kind=decision.kind,
        what=tuple(line.what for line in ledger if line.node == decision.node),
        ledger_harm_kl=_noted_harm(decision.node, ledger),
        harm_removed_kl=_mean(base.kl - now.kl),
        heldout_kl=float(now.kl.mean()),
        accuracy=wilson(int(now.right.sum()), len(now.right)),
        accuracy_gained_pp=gain,
        accuracy_gained_ci_pp=interval,
        macs_given_back=now.macs - base.macs,
        params_given_back=now.params - base.params,
    )


def _mean(differences: Tensor) -> Estimate:
    """Mean of paired differences with its 95 % interval (normal)."""
    n = len(differences)
    value = float(differences.mean())
    half = 1.96 * float(differences.std()) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def _notes(distilled: bool) -> tuple[str, ...]:
    notes = ["read without distillation, on held-out calibration inputs (plain and intervened) and on validation"]
    if distilled:
        notes.append("the run's own student was distilled afterwards, which may have healed some of this harm")
    return tuple(notes)
