"""A representative that borrows: beside its own inner channels it gets those of the other regions of its node.

Blocks in a row compute, each, some features and what to add for them. One block that has the features of all of them,
and from which the least needed are then taken, follows the node far more closely than one that has its own alone.
What a later region saw was the output of the one before it; here its features are refitted to what enters the node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from causal_compress.results import Merge
from causal_compress.shrink.channels import ChannelGroup, Reader
from causal_compress.shrink.repair import (
    EXACT_FEATURES,
    Fitted,
    Rectified,
    Site,
    accumulate,
    channel_axis,
    current_affine,
    find_site,
    rectified_target,
    write_solution,
)
from causal_compress.understand.graph import ends, fetch, get_module, observer, shape_of, used_once
from causal_compress.understand.tail import Tail, activations_before, find_tail, is_affine, rectifier_ceiling
from causal_compress.understand.trace import Network, Region

ROUNDS = 2


@dataclass(frozen=True)
class Hidden:
    """The layer whose outputs, behind activations alone, are all that a region's last affine layer reads.

    Attributes:
        site: Where it reads and writes.
        activations: What lies between it and the tail, comparable between regions.
        positions: Where its output has channels: rows and columns behind a convolution, else all axes but the last.
        strided: Whether of these positions every so many can be taken.
    """

    site: Site
    activations: tuple[str, ...]
    positions: tuple[int, ...]
    strided: bool


def hidden_of(part: fx.GraphModule, tail: Tail) -> Hidden | None:
    """The layer before a part's last affine one, or None where something else than activations lies between them."""
    source, activations = activations_before(part, tail.features)
    if len(source.users) > 1:
        return None
    before = source if is_affine(get_module(part, source)) else next(iter(source.all_input_nodes), source)
    if not is_affine(get_module(part, before)) or not used_once(part, str(before.target)):
        return None
    site = find_site(part, str(before.target))
    if site.output is not source:
        return None
    shape, image = shape_of(source), isinstance(get_module(part, before), nn.Conv2d)
    return Hidden(site, activations, shape[2:] if image else shape[1:-1], image)


def lenders_of(network: Network, merge: Merge) -> list[tuple[Region, Hidden]] | str:
    """The regions of a node whose inner channels its representative can have, itself among them, or why there are none.

    Args:
        network: The teacher.
        merge: Which regions, which representative.
    """
    found = {index: _hidden(network.regions[index].module) for index in range(merge.first, merge.last + 1)}
    own = found[merge.representative]
    if own is None:
        return "its last layer does not read another one's channels through activations alone"
    alike = [(network.regions[index], other) for index, other in found.items() if other and _alike(own, other)]
    return alike if len(alike) > 1 else "no other region has inner channels of the same kind"


def _hidden(piece: fx.GraphModule) -> Hidden | None:
    tail = find_tail(piece)
    return None if isinstance(tail, str) else hidden_of(piece, tail)


def _alike(own: Hidden, other: Hidden) -> bool:
    """Whether channels of two hidden layers lie on the same positions, or some of them do, and become the same."""
    return own.activations == other.activations and _steps(own, other) is not None


def _steps(own: Hidden, other: Hidden) -> tuple[int, int] | None:
    """Every how many rows and columns of another hidden layer lie where this one's do; (1, 1) where all do.

    A block that halves the image can have channels of one before it: of those it needs every second position.
    """
    if own.strided != other.strided:
        return None
    if not own.strided:
        return (1, 1) if own.positions == other.positions else None
    (rows, columns), (more_rows, more_columns) = own.positions, other.positions
    if more_rows % rows or more_columns % columns:
        return None
    return more_rows // rows, more_columns // columns


def borrowed(part: fx.GraphModule, lenders: Sequence[tuple[Region, Hidden]], own: Region) -> fx.GraphModule | str:
    """A part whose hidden layer has the channels of all lenders, in their order (the caller's own copy, changed).

    Args:
        part: With the representative alone.
        lenders: From `lenders_of`.
        own: The representative.

    Returns:
        The part; it computes what it did. Weights of channels that another region lends are where its own input is
        read, and zero where it read something of another width; nothing reads these channels yet.
    """
    tail = find_tail(part)
    hidden = None if isinstance(tail, str) else hidden_of(part, tail)
    if isinstance(tail, str) or hidden is None:
        return "its hidden layer can't be told apart"
    counts = [len(fetch(region.module, other.site.layer).weight) for region, other in lenders]
    if any(size > EXACT_FEATURES for size in _fan_ins(part, hidden.site.layer, tail.affine, sum(counts))):
        return "with the channels of all its regions it has too many inputs for an exact choice among them"
    start = sum(counts[: [region is own for region, _ in lenders].index(True)])
    _widen_hidden(part, hidden.site, lenders, counts)
    _widen_reader(part, tail.affine, sum(counts), start)
    return part


def _fan_ins(part: fx.GraphModule, hidden: str, reader: str, channels: int) -> tuple[int, int]:
    first, second = fetch(part, hidden), fetch(part, reader)
    return int(first.weight[0].numel()), int(second.weight[0].numel()) // len(first.weight) * channels


def _widen_hidden(
    part: fx.GraphModule, site: Site, lenders: Sequence[tuple[Region, Hidden]], counts: Sequence[int]
) -> None:
    layer = fetch(part, site.layer)
    wide = _resized(layer, layer.weight.shape[1], sum(counts))
    part.set_submodule(site.layer, wide)
    if site.norm is not None:
        old = fetch(part, site.norm)
        part.set_submodule(site.norm, type(old)(sum(counts), eps=old.eps, momentum=old.momentum).eval())
    own = layer.weight.shape[1:]
    weights, biases = [], []
    for (region, hidden), count in zip(lenders, counts, strict=True):
        weight, bias = current_affine(region.module, hidden.site.layer, hidden.site.norm)
        fits = fetch(region.module, hidden.site.layer).weight.shape[1:] == own
        weights.append(weight.T.reshape(count, *own) if fits else torch.zeros(count, *own, dtype=weight.dtype))
        biases.append(bias)
    with torch.no_grad():
        wide.weight.copy_(torch.cat(weights))
        if site.norm is None:
            wide.bias = nn.Parameter(torch.cat(biases).to(wide.weight.dtype))
            return
        if wide.bias is not None:  # the norm has all of it
            wide.bias.zero_()
        fresh = fetch(part, site.norm)
        fresh.weight.copy_((fresh.running_var + fresh.eps).sqrt())
        fresh.bias.copy_(torch.cat(biases))


def _widen_reader(part: fx.GraphModule, path: str, channels: int, start: int) -> None:
    layer = fetch(part, path)
    wide = _resized(layer, channels, len(layer.weight))
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, start : start + layer.weight.shape[1]] = layer.weight
        if wide.bias is not None:
            wide.bias.copy_(layer.bias)
    part.set_submodule(path, wide)


def _resized(layer: nn.Module, inputs: int, outputs: int) -> nn.Conv2d | nn.Linear:
    """A layer of the same kind with other numbers of channels."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Conv2d):
        size, stride, padding, dilation = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        return nn.Conv2d(inputs, outputs, size, stride, padding, dilation, bias=bias)  # type: ignore[arg-type]
    return nn.Linear(inputs, outputs, bias=bias)


def borrowed_groups(groups: Sequence[ChannelGroup], part: fx.GraphModule, hidden: Hidden) -> list[ChannelGroup] | None:
    """A representative's channel groups with the borrowed channels; None where those can't be narrowed.

    Args:
        groups: Of the representative in the teacher.
        part: With the borrowed channels.
        hidden: Of the part.
    """
    tail, layer = find_tail(part), hidden.site.layer
    own = next((group for group in groups if group.producer == layer), None)
    if isinstance(tail, str) or own is None or own.writers != (layer,):
        return None
    if {reader.layer for reader in own.readers} != {tail.affine} or not {hidden.site.norm}.issuperset(own.passing):
        return None
    channels = len(fetch(part, layer).weight)
    reader = Reader(tail.affine, tuple((channel,) for channel in range(channels)))
    return [replace(own, channels=channels, readers=(reader,)) if group is own else group for group in groups]


def lent_values(network: Network, merge: Merge) -> Callable[[Tensor], list[Tensor]]:
    """What the hidden layers of a node's regions put out in the teacher, for what enters the node there.

    Args:
        network: The teacher.
        merge: Whose representative borrows.

    Returns:
        A function: activations before the node -> one tensor, all channels beside each other in the part's order.
    """
    lenders = lenders_of(network, merge)
    assert not isinstance(lenders, str)
    hidden = {region.info.index: layer for region, layer in lenders}
    own = hidden[merge.representative]
    steps = [step for other in hidden.values() if (step := _steps(own, other)) is not None]
    watches = []
    for index in range(merge.first, merge.last + 1):
        piece = network.regions[index].module
        nodes = [ends(piece)[1], *([hidden[index].site.output] if index in hidden else [])]
        watches.append(observer(piece, nodes))
    axis = channel_axis(fetch(lenders[0][0].module, lenders[0][1].site.layer))

    @torch.no_grad()
    def values(x: Tensor) -> list[Tensor]:
        lent = []
        for watch in watches:
            x, *inside = watch(x)
            lent += inside
        seen = [_every(y, step) for y, step in zip(lent, steps, strict=True)]
        return [torch.cat(seen, axis)]

    return values


def _every(values: Tensor, step: tuple[int, int]) -> Tensor:
    rows, columns = step
    return values if step == (1, 1) else values[..., ::rows, ::columns]


@torch.no_grad()
def fit_hidden(
    part: fx.GraphModule, inputs: Sequence[Tensor], wanted: Sequence[Tensor], penalties: Sequence[float]
) -> None:
    """Refit a part's hidden layer so that it puts out what the lenders' did in the teacher (in place).

    Args:
        part: With borrowed channels.
        inputs: Chunks that enter it.
        wanted: For each chunk what `lent_values` says of the teacher.
        penalties: Ridge penalties to try.
    """
    tail = find_tail(part)
    assert isinstance(tail, Tail)
    hidden = hidden_of(part, tail)
    assert hidden is not None
    site, ceiling = hidden.site, rectifier_ceiling(part, hidden.site.output)
    watch = observer(part, [site.features, site.output])

    def rows(known: Rectified | None) -> Iterable[tuple[Tensor, Tensor]]:
        for x, goal in zip(inputs, wanted, strict=True):
            features, now = watch(x)
            yield features, goal if known is None else rectified_target(goal, now, known.ceiling)

    layer, plain = fetch(part, site.layer), None
    for _ in range(1 + (ROUNDS if ceiling is not None else 0)):
        known = None if plain is None or ceiling is None else Rectified(ceiling, plain)
        sums: Fitted = accumulate(layer, rows(known), len(inputs), plain)
        plain = plain or sums
        solution = sums.solve(penalties, current_affine(part, site.layer, site.norm)[0])
        write_solution(part, site.layer, site.norm, (solution.weight, solution.bias), plain.both())
