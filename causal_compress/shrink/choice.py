"""One representative for one span: refitted at any width, put into the teacher's place, and measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, fx, nn

from causal_compress.results import Adapter, Candidate, Merge
from causal_compress.shrink.borrow import borrowed_groups, fit_hidden, hidden_of, lent_values
from causal_compress.shrink.channels import ChannelGroup, find_groups
from causal_compress.shrink.costs import layer_costs, part_costs, with_biases
from causal_compress.shrink.repair import (
    Fitted,
    accumulate,
    current_affine,
    feature_columns,
    find_site,
    kept_channels,
    masked,
    reader_equations,
    tail_equations,
    without_bias,
    write_solution,
)
from causal_compress.shrink.widths import aligned, level_counts
from causal_compress.understand.graph import ancestors, compose, ends, fetch, get_module, observer
from causal_compress.understand.tail import Tail, find_tail

if TYPE_CHECKING:
    from causal_compress.shrink.measure import Sweep

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
PATH_PENALTY = 1e-3
MOST_BORROWED = 1.5
"""Times the representative's own channels, or the next multiple of `align` above that: nothing wider was part of a plan
for a third to half of ResNet-56 where any number was allowed."""
_CHANNELWISE = (
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.dropout._DropoutNd, nn.Flatten, nn.Identity, nn.ReLU,
)  # fmt: skip
_CHANNELWISE_NAMES = {
    "max_pool2d", "boolean_dispatch", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "dropout", "flatten",
    "relu",
}  # fmt: skip

Known = tuple[Fitted, tuple[Tensor, Tensor]]
Shares = dict[str, tuple[float, float]]


@dataclass
class Shape:
    """A part at some widths, while it is being made.

    Attributes:
        part: A copy with refitted layers; columns of channels that go are zero.
        widths: Producer -> channels that stay.
        inputs_kept: Share of the channels of the cut point before the part.
        shares: Layer -> shares of its inputs and outputs that stay.
        kept: Layer -> which of its outputs stay, where not all do.
        error: The worst relative error of a refit.
    """

    part: fx.GraphModule
    widths: dict[str, int]
    inputs_kept: float
    shares: Shares
    kept: dict[str, Tensor]
    error: float


class Choice:
    """One representative for one span, with the normal equations of all its layers on the teacher's activations."""

    def __init__(
        self, sweep: Sweep, first: int, last: int, representative: int, adapter: Adapter | None, part: fx.GraphModule
    ) -> None:
        self.sweep, self.first, self.last = sweep, first, last
        self.representative, self.adapter, self.part = representative, adapter, part
        tail = find_tail(part)
        self.tail = None if isinstance(tail, str) else tail
        if adapter == "project":
            self._fit_projection()
        self.groups = sweep.widths.inner.get(representative, [])
        self.own: dict[str, int] = {}
        if adapter == "borrow":
            self._borrow()
        self.cut = sweep.widths.cuts.get(first - 1)
        self.costs = with_biases(layer_costs(part, sweep.heldout[0][:1]), without_bias(part))
        self.fitted: dict[str, Known] = {}
        self.paths: dict[str, dict[int, Tensor]] = {}
        self.error = 0.0
        if first != last:
            assert self.tail is not None
            self._fit_tail()
            self.error = self._weighed_error()

    def _borrow(self) -> None:
        """Give the channels that other regions lend their values, and take them for the representative's own."""
        assert self.tail is not None
        hidden = hidden_of(self.part, self.tail)
        assert hidden is not None
        known, self.groups = self.groups, borrowed_groups(self.groups, self.part, hidden) or []
        self.own = {group.producer: group.channels for group in known if group.producer == hidden.site.layer}
        place = Merge(first=self.first, last=self.last, representative=self.representative, adapter=self.adapter)
        values = lent_values(self.sweep.network, place)
        fit_hidden(self.part, self.sweep.fit, [values(x)[0] for x in self.sweep.fit], PENALTIES)

    def levels(self) -> list[dict[str, int]]:
        """Channel counts of the groups inside that are tried, at each width of the recipe.

        Full width is left out, but where all that a representative can borrow is bearable: there it is empty.
        """
        counts = level_counts([group.channels for group in self.groups], self.sweep.section)
        producers = [group.producer for group in self.groups]
        levels = [dict(zip(producers, level, strict=True)) for level in counts]
        if not self.own:
            return levels
        step = self.sweep.section.align
        bearable = {producer: math.ceil(MOST_BORROWED * count / step) * step for producer, count in self.own.items()}
        full = {group.producer: group.channels for group in self.groups}
        kept = [level for level in ({}, *levels) if all((full | level)[own] <= most for own, most in bearable.items())]
        return kept if self.own in kept else [*kept, self.own]

    def reads_cut(self) -> bool:
        """Whether the part can do with fewer channels of the cut point before it: its tail alone reads them."""
        if self.tail is None or self.cut is None or self.adapter == "project":
            return False
        if self.first == self.representative:  # as in the teacher, where it was tried out
            return True
        return reads_channels(self.part, self.tail) and self._is_followed(self.cut.producer, self.tail.affine)

    def _is_followed(self, producer: str, reader: str) -> bool:
        """Whether channels can go where the part stands right behind the region before it, which is yet to be seen."""
        together = compose([self.sweep.network.regions[self.first - 1].module, self.part])
        groups, _ = find_groups(together, self.sweep.before)
        found = [group for group in groups if group.producer == producer]
        return bool(found) and [layer.layer for layer in found[0].readers] == [reader]

    def _fit_projection(self) -> None:
        name = f"adapter_{self.first}_{self.last}"
        wanted = self.sweep.fit
        for index in range(self.first, self.representative):
            self.sweep.targets(index)
            wanted = self.sweep.ahead[index][1]
        project(self.part, name, self.sweep.fit, wanted)

    def _fit_tail(self) -> Known:
        assert self.tail is not None
        name = self.tail.affine
        if name not in self.fitted:
            targets = self.sweep.targets(self.last)
            assert targets
            sums = tail_equations(self.part, self.tail, self.sweep.fit, targets)
            self.fitted[name] = (sums, self._solve(sums, name, self.tail.norm))
        return self.fitted[name]

    def _solve(self, sums: Fitted, layer: str, norm: str | None) -> tuple[Tensor, Tensor]:
        weight, bias = current_affine(self.part, layer, norm)
        if self.first == self.last:
            return weight, bias
        is_tail = self.tail is not None and layer == self.tail.affine
        solution = sums.solve(PENALTIES, None if self.adapter in ("reshape", "borrow") and is_tail else weight)
        return solution.weight, solution.bias

    def _weighed_error(self) -> float:
        """Held-out error of the refitted tail relative to the targets' variance."""
        sums, (weight, bias) = self._fit_tail()
        return sums.heldout.error(weight, bias) / max(sums.heldout.target_variance(), 1e-12)

    def reader(self, layer: str) -> Known:
        """A layer's normal equations on the teacher's activations, and its solution at full width."""
        if self.tail is not None and layer == self.tail.affine:
            return self._fit_tail()
        if layer not in self.fitted:
            site = find_site(self.part, layer)
            sums = reader_equations(self.part, site, self.sweep.fit)
            self.fitted[layer] = (sums, self._solve(sums, layer, site.norm))
        return self.fitted[layer]

    def measured(self, widths: dict[str, int], inputs_kept: float) -> Candidate:
        """Refit at given widths, put the part into the teacher's place, and read the output's KL."""
        shape = self.shaped(widths, inputs_kept)
        return self.scored(shape.part, self.candidate(shape))

    def scored(self, part: fx.GraphModule, candidate: Candidate) -> Candidate:
        """A candidate with the harm that its part does."""
        harm, stderr = self.sweep.harm(part, self.last)
        return replace(candidate, harm_kl=harm, harm_stderr=stderr)

    def shaped(self, widths: dict[str, int], inputs_kept: float) -> Shape:
        """The part at given widths, its layers refitted.

        Args:
            widths: Producer -> channels that stay.
            inputs_kept: Share of the channels of the cut point before the part.
        """
        shape = Shape(copy.deepcopy(self.part), widths, inputs_kept, _fractions(self.groups, widths), {}, self.error)
        if self.first != self.last:
            self._write(shape.part, self.tail.affine, None)  # type: ignore[union-attr]
        for group in self.groups:
            if group.producer in widths:
                readers = [(reader.layer, self._columns(reader.layer, group)) for reader in group.readers]
                kept = self._narrow(shape, readers, widths[group.producer])
                shape.kept.update(dict.fromkeys(group.writers, kept))
        if inputs_kept < 1.0:
            assert self.cut is not None
            assert self.tail is not None
            channels = self.cut.channels
            columns = feature_columns(fetch(self.part, self.tail.affine), None, channels, len(self._fit_tail()[1][0]))
            self._narrow(shape, [(self.tail.affine, columns)], round(inputs_kept * channels))
            shape.shares[self.tail.affine] = (inputs_kept, shape.shares.get(self.tail.affine, (1.0, 1.0))[1])
        return shape

    def candidate(self, shape: Shape, ranks: dict[str, int] | None = None, lost: float = 0.0) -> Candidate:
        """What a shape costs; its harm is yet to be measured.

        Args:
            shape: Of this choice.
            ranks: Layer -> rank, where it becomes two.
            lost: Share of the variance that ranks lose.
        """
        return Candidate(
            first=self.first,
            last=self.last,
            representative=self.representative,
            adapter=self.adapter,
            inputs_kept=shape.inputs_kept,
            widths=shape.widths,
            **part_costs(self.costs, shape.shares, self._writers(), ranks),
            harm_kl=0.0,
            harm_stderr=0.0,
            relative_error=1 - (1 - min(shape.error, 1.0)) * (1 - lost) if ranks else shape.error,
            ranks=ranks or {},
            keeps_width=self._keeps_width(shape.widths),
        )

    def _keeps_width(self, widths: dict[str, int]) -> bool:
        """Whether a representative that borrows ends with as many channels as it has of its own, or more."""
        full = {group.producer: group.channels for group in self.groups} | self.own
        return bool(self.own) and all(count >= full[producer] for producer, count in widths.items())

    def refit_tail(self, part: fx.GraphModule) -> Fitted:
        """Refit a part's last affine layer to what the part feeds it now, on the channels that it reads (in place).

        Args:
            part: Of this choice.

        Returns:
            Sums over its inputs.
        """
        tail, targets = find_tail(part), self.sweep.targets(self.last)
        assert not isinstance(tail, str)
        assert targets
        sums = tail_equations(part, tail, self.sweep.fit, targets)
        weight, _ = current_affine(part, tail.affine, tail.norm)
        read = weight.abs().sum(1).nonzero().flatten()
        solution = sums.select(read).solve(PENALTIES, weight[read])
        write_solution(part, tail.affine, tail.norm, masked(solution, read, len(weight)), sums.both())
        return sums

    def _writers(self) -> set[str]:
        """The layers whose outputs shrink with the cut point behind the part: none where anything is added to them."""
        if self.tail is None or self.last not in self.sweep.widths.cuts or self.tail.skip or self.tail.undo:
            return set()
        return {self.tail.affine, self.tail.norm or self.tail.affine, *self.sweep.widths.cuts[self.last].passing}

    def _columns(self, layer: str, group: ChannelGroup) -> Tensor:
        reader = next(reader for reader in group.readers if reader.layer == layer)
        return feature_columns(fetch(self.part, layer), reader, group.channels, len(self.reader(layer)[1][0]))

    def _narrow(self, shape: Shape, readers: Sequence[tuple[str, Tensor]], count: int) -> Tensor:
        """Zero the columns that the surgeon gives up, refit the others; returns the channels that stay."""
        known = [(self.reader(layer), layer, columns) for layer, columns in readers]
        kept = self._kept(known, len(readers[0][1]))[count]
        for (sums, solution), layer, columns in known:
            stays = columns[kept].flatten().sort().values
            refitted = sums.select(stays).solve(PENALTIES, solution[0][stays])
            self._write(shape.part, layer, masked(refitted, stays, len(solution[0])))
            shape.error = max(shape.error, refitted.relative_error)
        return kept

    def _kept(self, known: Sequence[tuple[Known, str, Tensor]], channels: int) -> dict[int, Tensor]:
        """Which channels stay at every width of the recipe; one greedy path serves all."""
        key = ",".join(layer for _, layer, _ in known)
        if key not in self.paths:
            counts = {aligned(channels, share, self.sweep.section) for share in self.sweep.section.widths}
            counts |= set(self.own.values())
            readers = [(sums.both(), solution[0], columns) for (sums, solution), _, columns in known]
            self.paths[key] = kept_channels(readers, sorted(counts), PATH_PENALTY)
        return self.paths[key]

    def _write(self, part: fx.GraphModule, layer: str, solution: tuple[Tensor, Tensor] | None) -> None:
        sums, fitted = self.reader(layer)
        write_solution(part, layer, self.norm(part, layer), fitted if solution is None else solution, sums.both())

    def norm(self, part: fx.GraphModule, layer: str) -> str | None:
        """The batch norm right behind a layer."""
        if self.tail is not None and layer == self.tail.affine:
            return self.tail.norm
        return find_site(part, layer).norm


def reads_channels(part: fx.GraphModule, tail: Tail) -> bool:
    """Whether a part's last affine layer is the only reader of what enters it, channel by channel."""
    entry, _ = ends(part)
    between = [node for node in (tail.features, *ancestors(tail.features)) if node is not entry]
    return tail.skip is None and not tail.undo and all(_is_channelwise(part, node) for node in between)


def _is_channelwise(part: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node treats every channel alike and by itself, and leaves them in their order."""
    if node.op == "call_module":
        return isinstance(get_module(part, node), _CHANNELWISE)
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _CHANNELWISE_NAMES


def project(part: fx.GraphModule, name: str, inputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Fit an adapter so that its representative gets what it got in the teacher (in place)."""
    site = find_site(part, name)
    watch = observer(part, [site.features])
    sums = accumulate(fetch(part, name), ((watch(x)[0], y) for x, y in zip(inputs, wanted, strict=True)), len(inputs))
    solution = sums.solve(PENALTIES, None)
    write_solution(part, name, None, (solution.weight, solution.bias), sums.both())


def _fractions(groups: Sequence[ChannelGroup], widths: dict[str, int]) -> Shares:
    """For each layer the shares of inputs and outputs that stay."""
    shares: Shares = {}
    for group in groups:
        share = widths.get(group.producer, group.channels) / group.channels
        for layer in (*group.writers, *group.passing):
            shares[layer] = (shares.get(layer, (1.0, 1.0))[0], share)
        for reader in group.readers:
            shares[reader.layer] = (share, shares.get(reader.layer, (1.0, 1.0))[1])
    return shares
