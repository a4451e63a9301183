"""Measures what every candidate would cost, by intervention: do(cut point := the candidate's output), the rest unchanged.

A candidate is a span of regions, its representative and a width. Its layers are refitted in closed form on the teacher's own
activations; then the teacher's cut point is replaced by what the refitted part puts out, and the KL divergence of the
network's outputs is read on held-out plain and intervened inputs. The result depends on the network and the data, not on a
budget, so one measurement serves any number of plans.
"""

from __future__ import annotations

import copy
import fnmatch
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from causal_compress.inputs.data import Features, Split
from causal_compress.progress import progress
from causal_compress.recipe import InterveneSection, PlanSection
from causal_compress.results import Candidate, Candidates, CutGroup, Effects, Skip
from causal_compress.shrink.channels import ChannelGroup, find_groups
from causal_compress.shrink.costs import layer_costs, part_costs
from causal_compress.shrink.parts import Adapter, fitting_adapter
from causal_compress.shrink.repair import (
    MOST_FEATURES,
    Fitted,
    accumulate,
    current_affine,
    feature_columns,
    find_site,
    inner_groups,
    kept_channels,
    masked,
    reader_equations,
    tail_equations,
    write_solution,
)
from causal_compress.understand.graph import ends, fetch, observer
from causal_compress.understand.intervene import intervened
from causal_compress.understand.tail import Tail, find_tail
from causal_compress.understand.trace import Network

logger = logging.getLogger(__name__)

CHUNK = 64
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
PATH_PENALTY = 1e-3


@dataclass(frozen=True)
class Probe:
    """Chunks of calibration inputs.

    Attributes:
        fit: Plain and intervened inputs in alternation, for the candidates' normal equations.
        heldout: The same from other inputs, on which harm is read; never fitted on.
        surgery: All plain inputs that are not held out, for the refits of the surgery itself.
    """

    fit: list[Tensor]
    heldout: list[Tensor]
    surgery: list[Tensor]


@dataclass(frozen=True)
class Widths:
    """What can be narrowed: groups inside regions by region, and the group of a cut point by the region before it."""

    inner: dict[int, list[ChannelGroup]]
    cuts: dict[int, ChannelGroup]
    skipped: tuple[Skip, ...]


def draw_probe(split: Split, features: Features, section: PlanSection, intervene: InterveneSection, seed: int) -> Probe:
    """Calibration inputs for candidates: disjoint for fitting and scoring, every second input intervened.

    Args:
        split: Calibration split.
        features: What an intervention masks.
        section: How many inputs.
        intervene: Grid, fraction and baselines of the interventions.
        seed: Of the masks.
    """
    generator = torch.Generator().manual_seed(seed)
    plain = [x for x, _ in split.batches(CHUNK)]
    held = max(1, min(len(plain) // 3, -(-section.heldout // CHUNK)))
    fitted = max(1, min(len(plain) - held, -(-section.inputs // CHUNK)))

    def mixed(x: Tensor) -> Tensor:
        changed = intervened(
            x, features, grid=intervene.grid, fraction=intervene.fraction, baselines=intervene.baselines, generator=generator
        )
        every_second = (torch.arange(len(x)) % 2 == 1).reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(every_second, changed, x)

    return Probe([mixed(x) for x in plain[held:][:fitted]], [mixed(x) for x in plain[:held]], plain[held:] or plain)


def find_widths(network: Network, section: PlanSection) -> Widths:
    """Which channel groups each region can lose, and which cut points can be narrowed.

    Args:
        network: The teacher.
        section: Include and exclude patterns on module names.
    """
    groups, skips = find_groups(network.graph, network.example_input)
    allowed = [group for group in groups if is_allowed(group.producer, section)]
    refused = [Skip(what=f"width of {g.producer}", reason="excluded by plan.include/exclude") for g in groups if g not in allowed]
    inner = {region.info.index: inner_groups(allowed, region.info.modules) for region in network.regions}
    placed = {group.producer for found in inner.values() for group in found}
    cuts: dict[int, ChannelGroup] = {}
    for group in allowed:
        if group.producer in placed:
            continue
        index = _cut_of(network, group)
        if isinstance(index, str):
            refused.append(Skip(what=f"width of {group.producer}", reason=index))
        else:
            cuts[index] = group
    return Widths(inner, cuts, (*skips, *refused))


def is_allowed(name: str, section: PlanSection) -> bool:
    """Whether include and exclude patterns let a module change."""
    included = any(fnmatch.fnmatch(name, pattern) for pattern in section.include)
    return included and not any(fnmatch.fnmatch(name, pattern) for pattern in section.exclude)


def _cut_of(network: Network, group: ChannelGroup) -> int | str:
    """The region whose output has exactly this group as channels, read by the next region's last layer alone."""
    for before, after in zip(network.regions, network.regions[1:], strict=False):
        if group.producer not in before.info.modules:
            continue
        tail, next_tail = find_tail(before.module), find_tail(after.module)
        if isinstance(tail, str) or isinstance(next_tail, str):
            break
        inside = {*before.info.modules, *after.info.modules}.issuperset(group.passing)
        alone = group.writers == (tail.affine,) and [reader.layer for reader in group.readers] == [next_tail.affine]
        if alone and inside and tail.skip is None:
            return before.info.index
        break
    spanned = len({reader.layer for reader in group.readers})
    return f"its channels are shared along the chain ({len(group.writers)} writers, {spanned} readers); only groups with one region are narrowed"


def measure(
    network: Network,
    probe: Probe,
    effects: Effects,
    section: PlanSection,
) -> Candidates:
    """Measure every candidate that depth, width and the similarity of sites allow.

    Args:
        network: The teacher.
        probe: Inputs for fitting and for scoring.
        effects: CKA of the sites; limits the spans.
        section: Spans, widths, patterns, temperature.
    """
    start = time.perf_counter()
    widths = find_widths(network, section) if section.width else Widths({}, {}, ())
    sweep = _Sweep(network, probe, widths, section)
    rows: list[Candidate] = []
    skipped: list[Skip] = []
    for first in progress(range(len(network.regions)), label="measuring candidates", unit="region"):
        for last in _spans(network, effects, section, first):
            found = sweep.span(first, last)
            rows.extend(found if not isinstance(found, Skip) else ())
            skipped.extend([found] if isinstance(found, Skip) else ())
        sweep.advance()
    return Candidates(
        rows=tuple(rows),
        cut_groups={k: CutGroup(producer=group.producer, channels=group.channels) for k, group in widths.cuts.items()},
        regions=len(network.regions),
        macs=sum(region.info.macs for region in network.regions),
        params=sum(region.info.params for region in network.regions),
        skipped=(*widths.skipped, *skipped, *network.untraced),
        inputs=sum(map(len, probe.fit)),
        heldout=sum(map(len, probe.heldout)),
        seconds=time.perf_counter() - start,
    )


def _spans(network: Network, effects: Effects, section: PlanSection, first: int) -> Iterator[int]:
    """Last regions of the spans that CKA proposes: every site inside is similar enough to the one at the end."""
    yield first
    if not section.depth or not is_allowed(network.regions[first].info.name, section):
        return
    for last in range(first + 1, min(first + section.max_span, len(network.regions))):
        if not is_allowed(network.regions[last].info.name, section):
            return
        if min(effects.cka[site][last] for site in range(first, last)) >= 1 - section.max_epsilon:
            yield last


class _Sweep:
    """Walks along the chain, holding the teacher's activations before the current region."""

    def __init__(self, network: Network, probe: Probe, widths: Widths, section: PlanSection) -> None:
        self.network, self.widths, self.section = network, widths, section
        self.fit, self.heldout = probe.fit, probe.heldout
        self.first = 0
        self.metrics = output_metrics(network, probe.heldout)
        self.ahead: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        with torch.no_grad():
            self.reference = [F.log_softmax(network.graph(x) / section.temperature, 1) for x in probe.heldout]

    def advance(self) -> None:
        """Go to the next region."""
        with torch.no_grad():
            module = self.network.regions[self.first].module
            self.fit = [module(x) for x in self.fit]
            self.heldout = [module(x) for x in self.heldout]
        self.ahead.pop(self.first, None)
        self.first += 1

    def targets(self, last: int) -> list[Tensor] | None:
        """The teacher's values before the final activation of region `last`, on the fitting inputs."""
        for index in range(self.first, last + 1):
            if index not in self.ahead:
                entering = self.fit if index == self.first else self.ahead[index - 1][1]
                self.ahead[index] = before_and_after(self.network, index, entering)
        return self.ahead[last][0]

    def span(self, first: int, last: int) -> list[Candidate] | Skip:
        """All candidates of one span."""
        if first == last:
            part = copy.deepcopy(self.network.regions[first].module)
            return self._kept_whole(first) + self._widths(_Choice(self, first, last, first, None, part))
        choices, reasons = [], []
        for representative in range(first, last + 1):
            found = fitting_adapter(self.network, first, last, representative)
            if isinstance(found, str):
                reasons.append(found)
            else:
                choices.append(_Choice(self, first, last, representative, *found))
        if not choices:
            return Skip(what=f"merging {self._name(first)}..{self._name(last)}", reason=reasons[-1])
        best = min(choices, key=lambda choice: choice.error)
        return [best.measured({}, 1.0), *self._widths(best)]

    def _name(self, index: int) -> str:
        return self.network.regions[index].info.name

    def _kept_whole(self, first: int) -> list[Candidate]:
        info = self.network.regions[first].info
        cost = layer_costs(self.network.regions[first].module, self.heldout[0][:1])
        return [
            Candidate(
                first=first,
                last=first,
                representative=first,
                adapter=None,
                inputs_kept=1.0,
                widths={},
                **part_costs(cost, {}, self.tail_layers(info.index)),
                harm_kl=0.0,
                harm_stderr=0.0,
                relative_error=0.0,
            )
        ]

    def tail_layers(self, index: int) -> set[str]:
        """The layers whose outputs shrink with the cut point behind a region, where that can be narrowed."""
        group = self.widths.cuts.get(index)
        return set() if group is None else {*group.writers, *group.passing}

    def _widths(self, choice: _Choice) -> list[Candidate]:
        found: list[Candidate] = []
        inner = self.widths.inner.get(choice.representative, [])
        for counts in level_counts([group.channels for group in inner], self.section):
            found.append(choice.measured({g.producer: c for g, c in zip(inner, counts, strict=True)}, 1.0))
        cut = self.widths.cuts.get(choice.first - 1)
        if cut is not None and choice.adapter != "project" and choice.tail is not None:
            for (count,) in level_counts([cut.channels], self.section):
                found.append(choice.measured({}, count / cut.channels))
        return found

    def harm(self, part: fx.GraphModule, last: int) -> tuple[float, float]:
        """Mean and standard error of the output KL when the part's output replaces the teacher's cut point."""
        rows = []
        with torch.no_grad():
            for x, reference in zip(self.heldout, self.reference, strict=True):
                y = part(x)
                for region in self.network.regions[last + 1 :]:
                    y = region.module(y)
                student = F.log_softmax(y / self.section.temperature, 1)
                rows.append(F.kl_div(student, reference, log_target=True, reduction="none").sum(1))
        kl = torch.cat(rows).double()
        return float(kl.mean()), float(kl.std() / len(kl) ** 0.5)


def level_counts(channels: Sequence[int], section: PlanSection) -> list[tuple[int, ...]]:
    """Channel counts of some groups at each width of the recipe, aligned; full width is left out."""
    if not channels:
        return []
    levels = [tuple(aligned(count, share, section) for count in channels) for share in section.widths]
    return [counts for counts in dict.fromkeys(levels) if counts != tuple(channels)]


def aligned(channels: int, share: float, section: PlanSection) -> int:
    """The multiple of `align` nearest to a share of channels, within [min_channels, channels]."""
    count = max(section.align, round(channels * share / section.align) * section.align)
    return min(channels, max(count, section.min_channels))


def before_and_after(network: Network, index: int, entering: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """A region's values before its final activation (empty where it has no affine tail) and its outputs."""
    piece = network.regions[index].module
    tail = find_tail(piece)
    nodes = [ends(piece)[1]] if isinstance(tail, str) else [ends(piece)[1], tail.pre]
    watch = observer(piece, nodes)
    with torch.no_grad():
        values = [watch(x) for x in entering]
    return [value[1] for value in values if len(value) > 1], [value[0] for value in values]


def output_metrics(network: Network, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
    """For each region with an affine tail, what an error before its final activation costs at the output.

    The Fisher information of the output, averaged over positions: E[g g'] with g the gradient of the log-probability of a
    class drawn from the network's own output. KL of the output is half its quadratic form, to second order.

    Args:
        network: The teacher.
        inputs: Chunks of inputs, plain and intervened.

    Returns:
        Region index -> (targets, targets), scaled to mean diagonal 1.
    """
    tails = {region.info.index: find_tail(region.module) for region in network.regions}
    watches = {
        index: observer(network.regions[index].module, [tail.pre, ends(network.regions[index].module)[1]])
        for index, tail in tails.items()
        if isinstance(tail, Tail) and not tail.undo
    }
    sums: dict[int, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for x in inputs:
        before: dict[int, Tensor] = {}
        y = x.detach().requires_grad_(True)
        with torch.enable_grad():
            for region in network.regions:
                index = region.info.index
                if index in watches:
                    before[index], y = watches[index](y)
                    before[index].retain_grad()
                else:
                    y = region.module(y)
            log_p = F.log_softmax(y, 1)
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            gradients = torch.autograd.grad(log_p.gather(1, drawn).sum(), list(before.values()))
        for index, gradient in zip(before, gradients, strict=True):
            rows = gradient.movedim(1, -1) if gradient.ndim == 4 else gradient
            rows = rows.reshape(-1, rows.shape[-1]).double()
            sums[index] = sums.get(index, 0) + rows.T @ rows
    return {index: total / total.diagonal().mean().clamp_min(1e-300) for index, total in sums.items()}


_Known = tuple[Fitted, tuple[Tensor, Tensor]]


class _Choice:
    """One representative for one span, with the normal equations of all its layers on the teacher's activations."""

    def __init__(
        self, sweep: _Sweep, first: int, last: int, representative: int, adapter: Adapter | None, part: fx.GraphModule
    ) -> None:
        self.sweep, self.first, self.last = sweep, first, last
        self.representative, self.adapter, self.part = representative, adapter, part
        tail = find_tail(part)
        self.tail = None if isinstance(tail, str) else tail
        if adapter == "project":
            self._fit_projection()
        self.groups = sweep.widths.inner.get(representative, [])
        self.cut = sweep.widths.cuts.get(first - 1)
        self.costs = layer_costs(part, sweep.heldout[0][:1])
        self.fitted: dict[str, _Known] = {}
        self.paths: dict[str, dict[int, Tensor]] = {}
        self.error = 0.0
        if first != last:
            assert self.tail is not None
            self._fit_tail()
            self.error = self._weighed_error()

    def _fit_projection(self) -> None:
        name = f"adapter_{self.first}_{self.last}"
        wanted = self.sweep.fit
        for index in range(self.first, self.representative):
            self.sweep.targets(index)
            wanted = self.sweep.ahead[index][1]
        project(self.part, name, self.sweep.fit, wanted)

    def _fit_tail(self) -> _Known:
        assert self.tail is not None
        name = self.tail.affine
        if name not in self.fitted:
            targets = self.sweep.targets(self.last)
            assert targets
            sums = tail_equations(self.part, self.tail, self.sweep.fit, targets)
            self.fitted[name] = (sums, self._solve(sums, name, self.tail.norm))
        return self.fitted[name]

    def _solve(self, sums: Fitted, layer: str, norm: str | None) -> tuple[Tensor, Tensor]:
        weight, _ = current_affine(self.part, layer, norm)
        if len(weight) > MOST_FEATURES or (self.first == self.last):
            return current_affine(self.part, layer, norm)
        solution = sums.solve(PENALTIES, weight if self.adapter != "reshape" else None)
        return solution.weight, solution.bias

    def _weighed_error(self) -> float:
        """Held-out error of the refitted tail relative to the targets' variance."""
        sums, (weight, bias) = self._fit_tail()
        return sums.heldout.error(weight, bias) / max(sums.heldout.target_variance(), 1e-12)

    def _reader(self, layer: str) -> _Known:
        if self.tail is not None and layer == self.tail.affine:
            return self._fit_tail()
        if layer not in self.fitted:
            site = find_site(self.part, layer)
            sums = reader_equations(self.part, site, self.sweep.fit)
            self.fitted[layer] = (sums, self._solve(sums, layer, site.norm))
        return self.fitted[layer]

    def _metric(self, layer: str) -> Tensor | None:
        is_tail = self.tail is not None and layer == self.tail.affine
        return self.sweep.metrics.get(self.last) if is_tail else None

    def measured(self, widths: dict[str, int], inputs_kept: float) -> Candidate:
        """Refit at given widths, put the part into the teacher's place, and read the output's KL."""
        part = copy.deepcopy(self.part)
        error = self.error
        if self.first != self.last:
            self._write(part, self.tail.affine, None)  # type: ignore[union-attr]
        for group in self.groups:
            if group.producer in widths:
                readers = [(reader.layer, self._columns(reader.layer, group)) for reader in group.readers]
                error = max(error, self._narrow(part, readers, widths[group.producer]))
        if inputs_kept < 1.0:
            assert self.cut is not None
            assert self.tail is not None
            channels = self.cut.channels
            columns = feature_columns(fetch(part, self.tail.affine), None, channels, len(self._fit_tail()[1][0]))
            error = max(error, self._narrow(part, [(self.tail.affine, columns)], round(inputs_kept * channels)))
        harm, stderr = self.sweep.harm(part, self.last)
        shares = _fractions(self.groups, widths)
        if inputs_kept < 1.0 and self.tail is not None:
            shares[self.tail.affine] = (inputs_kept, shares.get(self.tail.affine, (1.0, 1.0))[1])
        return Candidate(
            first=self.first,
            last=self.last,
            representative=self.representative,
            adapter=self.adapter,
            inputs_kept=inputs_kept,
            widths=widths,
            **part_costs(self.costs, shares, self._writers()),
            harm_kl=harm,
            harm_stderr=stderr,
            relative_error=error,
        )

    def _writers(self) -> set[str]:
        if self.tail is None or self.last not in self.sweep.widths.cuts:
            return set()
        return {self.tail.affine, self.tail.norm or self.tail.affine}

    def _columns(self, layer: str, group: ChannelGroup) -> Tensor:
        reader = next(reader for reader in group.readers if reader.layer == layer)
        return feature_columns(fetch(self.part, layer), reader, group.channels, len(self._reader(layer)[1][0]))

    def _narrow(self, part: fx.GraphModule, readers: Sequence[tuple[str, Tensor]], count: int) -> float:
        """Zero the columns that the surgeon gives up, refit the others; returns the worst relative error."""
        known = [(self._reader(layer), layer, columns) for layer, columns in readers]
        kept = self._kept(known, len(readers[0][1]))[count]
        worst = 0.0
        for (sums, solution), layer, columns in known:
            stays = columns[kept].flatten().sort().values
            refitted = sums.select(stays).solve(PENALTIES, solution[0][stays])
            self._write(part, layer, masked(refitted, stays, len(solution[0])))
            worst = max(worst, refitted.relative_error)
        return worst

    def _kept(self, known: Sequence[tuple[_Known, str, Tensor]], channels: int) -> dict[int, Tensor]:
        """Which channels stay at every width of the recipe; one greedy path serves all."""
        key = ",".join(layer for _, layer, _ in known)
        if key not in self.paths:
            counts = {aligned(channels, share, self.sweep.section) for share in self.sweep.section.widths}
            readers = [(sums.both(), solution[0], columns, self._metric(layer)) for (sums, solution), layer, columns in known]
            self.paths[key] = kept_channels(readers, sorted(counts), PATH_PENALTY)
        return self.paths[key]

    def _write(self, part: fx.GraphModule, layer: str, solution: tuple[Tensor, Tensor] | None) -> None:
        sums, fitted = self._reader(layer)
        is_tail = self.tail is not None and layer == self.tail.affine
        norm = self.tail.norm if is_tail and self.tail is not None else find_site(part, layer).norm
        write_solution(part, layer, norm, fitted if solution is None else solution, sums.both())


def project(part: fx.GraphModule, name: str, inputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Fit an adapter so that its representative gets what it got in the teacher (in place)."""
    site = find_site(part, name)
    watch = observer(part, [site.features])
    sums = accumulate(fetch(part, name), ((watch(x)[0], y) for x, y in zip(inputs, wanted, strict=True)), len(inputs))
    solution = sums.solve(PENALTIES, None)
    write_solution(part, name, None, (solution.weight, solution.bias), sums.both())


def _fractions(groups: Sequence[ChannelGroup], widths: dict[str, int]) -> dict[str, tuple[float, float]]:
    """For each layer the shares of inputs and outputs that stay."""
    shares: dict[str, tuple[float, float]] = {}
    for group in groups:
        share = widths.get(group.producer, group.channels) / group.channels
        for layer in (*group.writers, *group.passing):
            shares[layer] = (shares.get(layer, (1.0, 1.0))[0], share)
        for reader in group.readers:
            shares[reader.layer] = (share, shares.get(reader.layer, (1.0, 1.0))[1])
    return shares
