"""Measures what every candidate would cost, by intervention: do(cut point := the candidate's output), nothing else.

A candidate is a span of regions, its representative and a width. Its layers are refitted in closed form on the
teacher's own activations; then the teacher's cut point is replaced by what the refitted part puts out, and the KL
divergence of the network's outputs is read on held-out plain and intervened inputs. The result depends on the network
and the data, not on a budget, so one measurement serves any number of plans.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from causal_compress.progress import progress
from causal_compress.recipe import PlanSection
from causal_compress.results import Candidate, Candidates, CutGroup, Effects, Merge, Skip
from causal_compress.shrink.borrow import borrowed_groups, hidden_of
from causal_compress.shrink.choice import Choice
from causal_compress.shrink.costs import layer_costs, part_costs, with_biases
from causal_compress.shrink.parts import build_part, fitting_adapter
from causal_compress.shrink.probe import Probe
from causal_compress.shrink.ranks import spectra, thinned, with_ranks
from causal_compress.shrink.repair import tail_too_large, without_bias
from causal_compress.shrink.targets import before_and_after
from causal_compress.shrink.widths import Widths, find_widths, level_counts
from causal_compress.understand.algebra import saved
from causal_compress.understand.network import may_be_merged
from causal_compress.understand.tail import find_tail
from causal_compress.understand.trace import Network

_MOST_RANKS = 12


def measure(
    network: Network,
    probe: Probe,
    effects: Effects,
    section: PlanSection,
) -> Candidates:
    """Measure every candidate that the similarity of sites allows, for any plan: depth and width alike.

    Args:
        network: The teacher.
        probe: Inputs for fitting and for scoring.
        effects: CKA of the sites; limits the spans.
        section: Spans, widths, patterns, temperature.
    """
    start = time.perf_counter()
    widths = find_widths(network, section)
    sweep = Sweep(network, probe, widths, section)
    rows: list[Candidate] = []
    skipped: list[Skip] = []
    for first in progress(range(len(network.regions)), label="measuring candidates", unit="region"):
        for last in _spans(network, effects, section, first):
            found = sweep.span(first, last)
            rows.extend(found if not isinstance(found, Skip) else ())
            skipped.extend([found] if isinstance(found, Skip) else ())
        sweep.advance()
    folded_macs, folded_params = saved(network)
    return Candidates(
        rows=tuple(rows),
        cut_groups={k: CutGroup(producer=group.producer, channels=group.channels) for k, group in widths.cuts.items()},
        regions=len(network.regions),
        macs=sum(region.info.macs for region in network.regions) + folded_macs,
        params=sum(region.info.params for region in network.regions) + folded_params,
        skipped=(*widths.skipped, *skipped, *network.untraced),
        inputs=sum(map(len, probe.fit)),
        heldout=sum(map(len, probe.heldout)),
        seconds=time.perf_counter() - start,
    )


def _spans(network: Network, effects: Effects, section: PlanSection, first: int) -> Iterator[int]:
    """Last regions of the spans that CKA proposes: every site inside is similar enough to the one at the end."""
    yield first
    if not may_be_merged(network.regions[first], section):
        return
    for last in range(first + 1, min(first + section.max_span, len(network.regions))):
        if not may_be_merged(network.regions[last], section):
            return
        if min(effects.cka[site][last] for site in range(first, last)) >= 1 - section.max_epsilon:
            yield last


def _is_better(one: Candidate, other: Candidate) -> bool:
    """Whether a candidate is as cheap as another and loses less, or as good and cheaper."""
    costs = [(row.macs_fixed + row.macs_out, row.relative_error) for row in (one, other)]
    return costs[0] != costs[1] and costs[0][0] <= costs[1][0] and costs[0][1] <= costs[1][1]


class Sweep:
    """Walks along the chain, holding the teacher's activations before the current region, and a few one region back."""

    def __init__(self, network: Network, probe: Probe, widths: Widths, section: PlanSection) -> None:
        self.network, self.widths, self.section = network, widths, section
        self.fit, self.heldout = probe.fit, probe.heldout
        self.first = 0
        self.before = self.heldout[0][:0]
        self.ahead: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        with torch.no_grad():
            self.reference = [F.log_softmax(network.graph(x) / section.temperature, 1) for x in probe.heldout]

    def advance(self) -> None:
        """Go to the next region."""
        self.before = self.heldout[0][:4].clone()  # for trying out which channels are read
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
            choice = Choice(self, first, last, first, None, part)
            narrowed = self._widths(choice)
            return self._kept_whole(first) + narrowed + self._ranks(choice, narrowed)
        lent = self._borrowing(first, last)
        if lent is not None:
            return self._widths(lent)
        choices, reasons = [], []
        for representative in range(first, last + 1):
            found = fitting_adapter(self.network, first, last, representative)
            if isinstance(found, str):
                reasons.append(found)
            elif (reason := tail_too_large(found[1])) is not None:
                reasons.append(reason)
            else:
                choices.append(Choice(self, first, last, representative, *found))
        if not choices:
            return Skip(what=f"merging {self._name(first)}..{self._name(last)}", reason=reasons[-1])
        best = min(choices, key=lambda choice: choice.error)
        return [best.measured({}, 1.0), *self._widths(best)]

    def _borrowing(self, first: int, last: int) -> Choice | None:
        """The first region that fits as it is, with the inner channels of the others; None where none can have them."""
        for own in range(first, last + 1) if self.section.borrow else ():
            part = build_part(self.network, Merge(first=first, last=last, representative=own, adapter="borrow"))
            tail = find_tail(part) if not isinstance(part, str) else part
            if isinstance(part, str) or isinstance(tail, str):
                continue
            hidden, groups = hidden_of(part, tail), self.widths.inner.get(own, [])
            if hidden is not None and borrowed_groups(groups, part, hidden) is not None:
                return Choice(self, first, last, own, "borrow", part)
        return None

    def _name(self, index: int) -> str:
        return self.network.regions[index].info.name

    def _kept_whole(self, first: int) -> list[Candidate]:
        info, part = self.network.regions[first].info, self.network.regions[first].module
        cost = layer_costs(part, self.heldout[0][:1])
        if first > 0:  # behind a change it is refitted as well
            cost = with_biases(cost, without_bias(part))
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
                ranks={},
                keeps_width=True,
            )
        ]

    def tail_layers(self, index: int) -> set[str]:
        """The layers whose outputs shrink with the cut point behind a region, where that can be narrowed."""
        group = self.widths.cuts.get(index)
        return set() if group is None else {*group.writers, *group.passing}

    def _widths(self, choice: Choice) -> list[Candidate]:
        found = [choice.measured(widths, 1.0) for widths in choice.levels()]
        cut = self.widths.cuts.get(choice.first - 1)
        if cut is not None and choice.reads_cut():
            for (count,) in level_counts([cut.channels], self.section):
                found.append(choice.measured({}, count / cut.channels))
        return found

    def _ranks(self, choice: Choice, narrowed: Sequence[Candidate]) -> list[Candidate]:
        """Low ranks at full and at smaller widths: those measured for which no cheaper form loses less variance."""
        if not self.section.low_rank:
            return []
        levels = [{}, *choice.levels()]
        found: list[tuple[int, Candidate]] = []
        for level, widths in enumerate(levels):
            shape = choice.shaped(widths, 1.0)
            known = spectra(choice, shape)
            thin = (thinned(choice, shape, known, share) for share in self.section.rank_errors)
            found += [(level, candidate) for candidate in thin if candidate is not None]
        rivals = [*narrowed, *(candidate for _, candidate in found)]
        best = [pair for pair in found if not any(_is_better(rival, pair[1]) for rival in rivals)]
        best.sort(key=lambda pair: pair[1].macs_fixed + pair[1].macs_out)
        best = best[:: max(1, -(-len(best) // _MOST_RANKS))]
        scored = []
        for level, widths in enumerate(levels):
            if wanted := [candidate for where, candidate in best if where == level]:
                shape = choice.shaped(widths, 1.0)
                known = spectra(choice, shape)
                scored += [choice.scored(with_ranks(choice, shape, known, c.ranks), c) for c in wanted]
        return scored

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
