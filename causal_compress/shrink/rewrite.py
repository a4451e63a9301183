"""Carries out the plan's merges: one representative per causal node, refitted in closed form, front to back."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from causal_compress.progress import progress
from causal_compress.recipe import RewriteSection
from causal_compress.results import Change, Decision, Plan, Skip
from causal_compress.shrink.borrow import fit_hidden, lent_values
from causal_compress.shrink.choice import project
from causal_compress.shrink.front import Front
from causal_compress.shrink.repair import current_affine, tail_equations, too_large, write_solution
from causal_compress.shrink.surgery import Student, assemble, merge_of, merges_of
from causal_compress.understand.algebra import told
from causal_compress.understand.graph import fetch
from causal_compress.understand.tail import Tail, find_tail
from causal_compress.understand.trace import Network


def rewrite(
    network: Network, plan: Plan, front: Front, section: RewriteSection
) -> tuple[Student, tuple[Change, ...], tuple[Skip, ...]]:
    """Keep one representative per merged node and solve its last affine layer anew on what the student feeds it.

    Nodes are done front to back, so that each absorbs the error of those before it.

    Args:
        network: The teacher; left as it is.
        plan: Which regions merge.
        front: At the input; is moved to the end.
        section: Ridge penalties.

    Returns:
        The student, ledger lines for what was folded exactly and for each merge, and what was refused.
    """
    student = assemble(network, merges_of(plan))
    changes = list(told(network.folds))
    skips: list[Skip] = []
    biased: list[str] = []
    pairs = list(zip(plan.decisions, student.parts, strict=True))
    for decision, part in progress(pairs, label="refitting representatives", unit="node"):
        entering, start = front.teacher, front.at
        targets = front.look_ahead(decision.candidate.last)
        found = None
        if decision.candidate.first != decision.candidate.last:
            match decision.candidate.adapter:
                case "project":
                    _project(network, decision, part, front, entering, start)
                case "borrow":
                    values = lent_values(network, merge_of(decision.candidate))
                    fit_hidden(part, front.student, [values(x)[0] for x in entering], section.penalties)
            found = _refit(part, front, targets, section, fresh=decision.candidate.adapter == "borrow")
        rise = front.advance(part)
        if isinstance(found, Skip):
            skips.append(found)
        elif found is not None:
            added, penalty, error = found
            biased.extend(added)
            changes.append(_change(decision, network, rise, penalty, error))
    surgery = replace(student.surgery, biased=tuple(biased))
    return Student(student.graph, student.parts, student.sites, student.ends, surgery), tuple(changes), tuple(skips)


def _project(
    network: Network, decision: Decision, part: fx.GraphModule, front: Front, entering: list[torch.Tensor], start: int
) -> None:
    """Fit the adapter to what the representative gets in the teacher."""
    candidate = decision.candidate
    wanted = entering
    with torch.no_grad():
        for region in network.regions[start : candidate.representative]:
            wanted = [region.module(x) for x in wanted]
    project(part, f"adapter_{candidate.first}_{candidate.last}", front.student, wanted)


def _refit(
    part: fx.GraphModule, front: Front, targets: list[torch.Tensor], section: RewriteSection, *, fresh: bool
) -> tuple[list[str], float, float] | Skip:
    tail = find_tail(part)
    assert isinstance(tail, Tail)
    weight, _ = current_affine(part, tail.affine, tail.norm)
    layer = fetch(part, tail.affine)
    reason = too_large(layer)
    if reason is not None:
        return Skip(what=f"refit of {tail.affine}", reason=reason)
    added = [tail.affine] if tail.norm is None and layer.bias is None else []
    sums = tail_equations(part, tail, front.student, targets)
    solution = sums.solve(section.penalties, None if fresh else weight)
    write_solution(part, tail.affine, tail.norm, (solution.weight, solution.bias), sums.both())
    return added, solution.penalty, solution.relative_error


def _change(decision: Decision, network: Network, rise: float, penalty: float, error: float) -> Change:
    kept = network.regions[decision.candidate.representative].info.name
    lent = " with the inner channels of all" if decision.candidate.adapter == "borrow" else ""
    return Change(
        node=decision.node,
        what=f"{kept}{lent} stands for {decision.candidate.last - decision.candidate.first + 1} regions, refitted",
        evidence=decision.evidence,
        predicted_harm_kl=decision.predicted_harm_kl,
        measured_harm_kl=rise,
        relative_error=error,
        penalty=penalty,
    )
