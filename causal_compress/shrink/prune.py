"""Carries out the plan's widths and ranks front to back, every reader refitted on what the student feeds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from causal_compress.errors import SurgeryError
from causal_compress.progress import progress
from causal_compress.recipe import PruneSection
from causal_compress.results import Candidate, Change, Decision, Factor, Keep, Plan, Skip
from causal_compress.shrink.batch_norms import reestimate_batch_norms
from causal_compress.shrink.borrow import hidden_of, lent_values
from causal_compress.shrink.channels import ChannelGroup, dependencies_of, find_groups, remove_channels
from causal_compress.shrink.choice import PATH_PENALTY
from causal_compress.shrink.front import Front, output_kl
from causal_compress.shrink.lowrank import components, split, write_factors
from causal_compress.shrink.refine import Refined, refine
from causal_compress.shrink.repair import (
    Fitted,
    Rectified,
    Site,
    accumulate,
    affine_layers,
    channel_axis,
    current_affine,
    feature_columns,
    find_site,
    kept_channels,
    reader_equations,
    rectified_target,
    tail_equations,
    too_large,
    write_solution,
)
from causal_compress.shrink.surgery import Student, copied, merge_of
from causal_compress.shrink.undo import is_whole
from causal_compress.understand.graph import fetch, observer
from causal_compress.understand.tail import Tail, find_tail, is_affine, rectifier_ceiling

Watch = Callable[[Tensor], Sequence[Tensor]]
RECTIFIED_ROUNDS = 2
ENOUGH_INPUTS = 1024  # ResNet-56, held-out KL with Gauss-Newton steps: a fifth lower with 512 inputs, 2 % with 2,048
_COMPOSITION_KL = 1e-3  # nats; sums of floats in another order differ by a thousandth of it


def prune(
    student: Student, plan: Plan, front: Front, section: PruneSection
) -> tuple[Student, tuple[Change, ...], tuple[Skip, ...]]:
    """Remove the channels that the plan gives up and repair what read them; refit every other tail where that helps.

    Args:
        student: After `rewrite`; left as it is.
        plan: How many channels stay in each group.
        front: At the input; is moved to the end.
        section: Ridge penalties, and which repairs are allowed.

    Returns:
        The student, ledger lines, refusals.

    Raises:
        SurgeryError: the whole network computes something else than its parts, so the ledger would be wrong.
    """
    work = _Work(copied(student), front, section)
    for index, decision in enumerate(progress(plan.decisions, label="removing channels and refitting", unit="node")):
        work.carry_out(index, decision)
    work.check_composition()
    work.reestimate_norms()
    surgery = replace(
        student.surgery,
        keeps=tuple(work.keeps),
        biased=tuple(dict.fromkeys([*student.surgery.biased, *work.biased])),
        factors=tuple(work.factors),
    )
    return replace(work.student, surgery=surgery), tuple(work.changes), tuple(work.skips)


@dataclass(frozen=True)
class _Refit:
    """Relative error of a layer, the penalty that it was refitted with, and sums over its inputs; None: no refit."""

    error: float | None = None
    penalty: float | None = None
    sums: Fitted | None = None


class _Work:
    """Everything that grows while the surgery goes along the chain."""

    def __init__(self, student: Student, front: Front, section: PruneSection) -> None:
        self.student, self.front, self.section = student, front, section
        self.inputs = list(front.student)
        self.heldout_inputs = list(front.heldout)
        example = front.network.example_input
        self.groups, _ = find_groups(student.graph, example)
        self.dependencies: Any = dependencies_of(student.graph, example)
        self.keeps: list[Keep] = []
        self.factors: list[Factor] = []
        self.kept: dict[str, Tensor] = {}
        self.biased: list[str] = []
        self.changed = False
        self.changes: list[Change] = []
        self.skips: list[Skip] = []

    def carry_out(self, index: int, decision: Decision) -> None:
        """Narrow one part, refit its last affine layer, and go on behind it; what nothing has changed yet stays."""
        part = self.student.parts[index]
        candidate = decision.candidate
        last = candidate.last == len(self.front.network.regions) - 1
        entering = self.front.teacher
        targets = self.front.look_ahead(candidate.last)
        self.changed |= not is_whole(candidate)
        if not self.changed and not (last and self.section.head_refit == "always"):
            self.front.advance(part)  # a refit would fit the noise of rounding, and may add a bias to do it
            return
        tail = find_tail(part)
        narrowed = []
        if candidate.inputs_kept < 1.0 and isinstance(tail, Tail):
            narrowed.append(self._narrow_input(index, part, tail, candidate.inputs_kept, targets))
        for producer, count in candidate.widths.items():
            narrowed.append(self._narrow_group(part, self._group(producer), count, tail, targets))
        self._absorb_drift(part, candidate, tail, entering)
        refit = self._refit_tail(part, tail, targets, last=last)
        if isinstance(tail, Tail) and tail.affine in candidate.ranks:
            sums = refit.sums or tail_equations(part, tail, self.front.student, targets)
            self._factorize(part, (tail.affine, tail.norm), sums, candidate.ranks)
            refit = self._refit_tail(part, find_tail(part), targets, last=last)
        narrowed += [f"{layer} in two layers of rank {rank}" for layer, rank in candidate.ranks.items()]
        refined = None if last and self.section.head_refit == "never" else self._refine(decision, part)
        rise = self.front.advance(part)
        if narrowed:
            self.changes.append(
                Change(
                    node=decision.node,
                    what="; ".join(narrowed),
                    evidence=decision.evidence,
                    predicted_harm_kl=decision.predicted_harm_kl,
                    measured_harm_kl=rise,
                    relative_error=refit.error,
                    penalty=refit.penalty,
                    refined=refined,
                )
            )

    def _group(self, producer: str) -> ChannelGroup:
        found = next((group for group in self.groups if group.producer == producer), None)
        if found is None:
            raise SurgeryError(
                f"the plan takes channels out of {producer}, which can't be narrowed",
                found="a plan by an earlier version, which did not try out what channels are coupled",
                wanted="a plan for this network by this version",
                remedy="give another --out and no --reuse, so that it is planned anew",
            )
        return found

    def _narrow_input(self, index: int, part: fx.GraphModule, tail: Tail, share: float, targets: list[Tensor]) -> str:
        """Remove channels of the cut point before a part: its own tail reads them, the part before writes them."""
        before = find_tail(self.student.parts[index - 1])
        assert isinstance(before, Tail)
        layer = fetch(part, tail.affine)
        channels = len(fetch(self.student.graph, before.affine).weight)
        count = round(share * channels)
        weight, _ = current_affine(part, tail.affine, tail.norm)
        columns = feature_columns(layer, None, channels, len(weight))
        sums = tail_equations(part, tail, self.front.student, targets)
        kept = self._choose([(sums, weight, columns)], count)
        self._remove(before.affine, kept)
        self.front.keep_channels(kept, channel_axis(fetch(self.student.graph, before.affine)))
        return f"{count} of {channels} channels of {before.affine} kept"

    def _narrow_group(
        self, part: fx.GraphModule, group: ChannelGroup, count: int, tail: Tail | str, targets: list[Tensor]
    ) -> str:
        """Remove channels of a group inside a part; readers other than the tail are refitted to their own output."""
        readers: list[tuple[Fitted, Tensor, Tensor]] = []
        for reader in group.readers:
            is_tail = isinstance(tail, Tail) and reader.layer == tail.affine
            site = find_site(part, reader.layer)
            weight, _ = current_affine(part, reader.layer, site.norm)
            if is_tail and isinstance(tail, Tail):
                sums = tail_equations(part, tail, self.front.student, targets)
            else:
                sums = reader_equations(part, site, self.front.student)
            columns = feature_columns(fetch(part, reader.layer), reader, group.channels, len(weight))
            readers.append((sums, weight, columns))
        kept = self._choose(readers, count)
        self._remove(group.producer, kept)
        self.kept.update(dict.fromkeys(group.writers, kept))
        for reader, (sums, weight, columns) in zip(group.readers, readers, strict=True):
            if not (isinstance(tail, Tail) and reader.layer == tail.affine):
                stays = columns[kept].flatten().sort().values
                self._write(part, reader.layer, sums.select(stays), weight[stays])
        return f"{count} of {group.channels} channels of {group.producer} kept"

    def _absorb_drift(
        self, part: fx.GraphModule, candidate: Candidate, tail: Tail | str, entering: list[Tensor]
    ) -> None:
        """Refit inner layers so that, on the student's inputs, they put out what the teacher's do on its own."""
        last = None if isinstance(tail, str) else tail.affine
        hidden = hidden_of(part, tail) if candidate.adapter == "borrow" and isinstance(tail, Tail) else None
        for layer in affine_layers(part):
            if layer == last or too_large(fetch(part, layer)) is not None:
                continue
            borrows = hidden is not None and layer == hidden.site.layer
            teacher = self._in_teacher(candidate, layer, borrows=borrows)
            if teacher is None:
                continue
            sums = self._settle_drift(part, layer, teacher, entering)
            if layer in candidate.ranks:
                second = self._factorize(part, (layer, find_site(part, layer).norm), sums, candidate.ranks)
                self._settle_drift(part, second, teacher, entering)

    def _in_teacher(self, candidate: Candidate, layer: str, *, borrows: bool) -> Watch | None:
        """What an inner layer puts out in the teacher, for what enters the node; None where it never sees that."""
        if borrows:
            return lent_values(self.front.network, merge_of(candidate))
        if candidate.representative != candidate.first or candidate.adapter not in (None, "borrow"):
            return None
        original = self.front.network.regions[candidate.first].module
        if not is_affine(fetch(original, layer)):  # depthwise; with one channel left it looks like any convolution
            return None
        return observer(original, [find_site(original, layer).output])

    def _settle_drift(self, part: fx.GraphModule, layer: str, teacher: Watch, entering: list[Tensor]) -> Fitted:
        """Refit one layer; returns sums over its inputs."""
        site = find_site(part, layer)
        equations = partial(self._drift_equations, part, site, teacher, entering)
        refit = self._settle(part, (site.layer, site.norm), rectifier_ceiling(part, site.output), equations)
        assert refit.sums is not None
        return refit.sums

    def _factorize(
        self, part: fx.GraphModule, where: tuple[str, str | None], sums: Fitted, ranks: Mapping[str, int]
    ) -> str:
        """Put two layers in a layer's place, by the components of what it puts out now; returns the second."""
        layer, norm = where
        self._note_bias(part, layer, norm)
        weight, bias = current_affine(part, layer, norm)
        if norm is None and fetch(part, layer).bias is None:
            fetch(part, layer).bias = nn.Parameter(torch.zeros(len(bias)))
        factor = Factor(layer=layer, rank=ranks[layer])
        basis = components(sums.both(), weight).basis[:, : factor.rank]
        first, second = split([self.student.graph, part], factor)
        behind = None if norm is None else fetch(part, norm)
        write_factors((fetch(part, first), fetch(part, second)), behind, (weight, bias), basis, sums.both())
        self.factors.append(factor)
        if layer in self.kept:
            self.kept[second] = self.kept[layer]
        return second

    def _drift_equations(
        self, part: fx.GraphModule, site: Site, teacher: Watch, entering: list[Tensor], known: Rectified | None = None
    ) -> Fitted:
        """Normal equations that give a layer, on the student's inputs, the teacher's output on its own."""
        layer = fetch(part, site.layer)
        kept, axis = self.kept.get(site.layer), channel_axis(layer)
        watch = observer(part, [site.features, site.output])

        def rows() -> Iterator[tuple[Tensor, Tensor]]:
            for x, z in zip(self.front.student, entering, strict=True):
                features, now = watch(x)
                wanted = teacher(z)[0] if kept is None else teacher(z)[0].index_select(axis, kept)
                yield features, wanted if known is None else rectified_target(wanted, now, known.ceiling)

        with torch.no_grad():
            return accumulate(layer, rows(), len(entering), None if known is None else known.sums)

    def _settle(
        self,
        part: fx.GraphModule,
        where: tuple[str, str | None],
        ceiling: float | None,
        equations: Callable[[Rectified | None], Fitted],
        *,
        always: bool = False,
    ) -> _Refit:
        """Solve a layer anew, and before a rectifier again, for what it lets through."""
        sums = equations(None)
        error, penalty = self._improve(part, where, sums, always=always)
        for _ in range(RECTIFIED_ROUNDS if ceiling is not None else 0):
            error, taken = self._improve(part, where, equations(Rectified(ceiling or math.inf, sums)))
            if taken is None:
                break
            penalty = taken
        return _Refit(error, penalty, sums)

    def _improve(
        self, part: fx.GraphModule, where: tuple[str, str | None], sums: Fitted, *, always: bool = False
    ) -> tuple[float, float | None]:
        """Solve a layer anew if that lowers its held-out error; returns the relative error and the penalty taken."""
        weight, bias = current_affine(part, *where)
        solution = sums.solve(self.section.penalties, weight)
        now = sums.heldout.error(weight, bias) / max(sums.heldout.target_variance(), 1e-12)
        if solution.relative_error >= now and not always:
            return now, None
        self._note_bias(part, *where)
        write_solution(part, *where, (solution.weight, solution.bias), sums.both())
        return solution.relative_error, solution.penalty

    def _choose(self, readers: Sequence[tuple[Fitted, Tensor, Tensor]], count: int) -> Tensor:
        """Which channels stay: the surgeon's path from each reader's own best solution."""
        known = []
        for sums, weight, columns in readers:
            best = sums.solve(self.section.penalties, weight).weight
            known.append((sums.both(), best, columns))
        return kept_channels(known, [count], PATH_PENALTY)[count]

    def _remove(self, producer: str, kept: Tensor) -> None:
        channels = tuple(int(channel) for channel in kept)
        whole = {f"{factor.layer}.1": factor.layer for factor in self.factors}
        if producer in whole:  # split since the dependencies were read; replay narrows first and splits then
            self.dependencies = dependencies_of(self.student.graph, self.front.network.example_input)
        remove_channels(self.student.graph, self.dependencies, Keep(producer=producer, channels=channels))
        self.keeps.append(Keep(producer=whole.get(producer, producer), channels=channels))

    def _write(self, part: fx.GraphModule, layer: str, sums: Fitted, prior: Tensor) -> None:
        site = find_site(part, layer)
        solution = sums.solve(self.section.penalties, prior)
        self._note_bias(part, layer, site.norm)
        write_solution(part, layer, site.norm, (solution.weight, solution.bias), sums.both())

    def _note_bias(self, part: fx.GraphModule, layer: str, norm: str | None) -> None:
        if norm is None and fetch(part, layer).bias is None:
            self.biased.append(layer)

    def _refit_tail(self, part: fx.GraphModule, tail: Tail | str, targets: list[Tensor], *, last: bool) -> _Refit:
        """Solve the part's last affine layer anew if held-out error falls."""
        if isinstance(tail, str) or not targets or (last and self.section.head_refit == "never"):
            return _Refit()
        reason = too_large(fetch(part, tail.affine))
        if reason is not None:
            self.skips.append(Skip(what=f"refit of {tail.affine}", reason=reason))
            return _Refit()
        equations = partial(tail_equations, part, tail, self.front.student, targets)
        always = last and self.section.head_refit == "always"
        where = (tail.affine, tail.norm)
        return self._settle(part, where, rectifier_ceiling(part, tail.pre), equations, always=always)

    def _refine(self, decision: Decision, part: fx.GraphModule) -> tuple[float, float] | None:
        """Gauss-Newton steps on the whole part; returns its held-out relative error before and after."""
        few = sum(map(len, self.front.student)) < ENOUGH_INPUTS
        wanted = few if self.section.refine == "auto" else self.section.refine
        found = refine(part, self.front.student, self.front.teacher) if wanted else None
        if isinstance(found, str):
            self.skips.append(Skip(what=f"Gauss-Newton steps of {decision.node}", reason=found))
        return (found.before, found.after) if isinstance(found, Refined) else None

    def check_composition(self) -> None:
        """Refuse a student that is not what was measured: parts that share state, or channels taken out elsewhere."""
        ledger, whole = self.front.harm_kl, self._kl(self.student.graph)
        if abs(whole - ledger) > _COMPOSITION_KL + 0.01 * ledger:
            raise SurgeryError(
                "the smaller network does not compute what its parts were measured to",
                found=f"held-out output KL {whole:.4f} nats as a whole",
                wanted=f"{ledger:.4f} nats, as its parts give one after the other",
                remedy="set plan.depth, plan.width or plan.low_rank to false in turn, or name modules that are used in "
                "several places in plan.exclude; and report it: the analysis should have left them alone",
            )

    def reestimate_norms(self) -> None:
        """Batch norm statistics from the student's own activations, kept where the held-out KL falls."""
        if self.section.bn_reestimate == "never":
            return
        trial = copied(self.student)
        if not reestimate_batch_norms(trial.graph, self.inputs):
            return
        scores = [self._kl(self.student.graph), self._kl(trial.graph)]
        if self.section.bn_reestimate == "always" or scores[1] < scores[0]:
            self.student = trial
            self.front.harm_kl = scores[1]
            self.changes.append(_norm_change(scores[1] - scores[0]))
        else:
            reason = f"held-out output KL would rise from {scores[0]:.4f} to {scores[1]:.4f} nats"
            self.skips.append(Skip(what="batch norm re-estimation", reason=reason))

    def _kl(self, graph: nn.Module) -> float:
        with torch.no_grad():
            logits = [graph(x) for x in self.heldout_inputs]
        return output_kl(logits, self.front.reference, self.front.temperature)


def _norm_change(rise: float) -> Change:
    return Change(
        node="all",
        what="batch norm statistics re-estimated on the student's own activations",
        evidence=None,
        predicted_harm_kl=None,
        measured_harm_kl=rise,
        relative_error=None,
        penalty=None,
    )
