"""Refits of a part's affine layers on activations: the plumbing between fx graphs and the closed forms of refit.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from causal_compress.shrink.channels import ChannelGroup, Reader
from causal_compress.shrink.refit import (
    Consumer,
    NormalEquations,
    Solution,
    Sums,
    effective_affine,
    fit,
    sample_rows,
    surgeon_path,
    write_affine,
)
from causal_compress.shrink.rows import FewRows
from causal_compress.understand.graph import fetch, get_module, observer, used_once
from causal_compress.understand.tail import Tail, find_tail, is_affine, is_folded, undo

HELD_OUT_EVERY = 4
ROWS_PER_FEATURE = 200
FEWEST_ROWS = 150_000
MOST_FEATURES = 4800  # beyond, only as many rows are taken as the dual form bears
MOST_ROWS = 2400
MOST_WEIGHTS = 40_000_000
EXACT_FEATURES = 2400


@dataclass(frozen=True)
class Site:
    """An affine layer to refit: its path, the batch norm right behind it, and the nodes of its input and output."""

    layer: str
    norm: str | None
    features: fx.Node
    output: fx.Node


def find_site(part: fx.GraphModule, layer: str) -> Site:
    """Where a layer of a part reads and writes; the output is taken behind its batch norm where one follows."""
    node = next(node for node in part.graph.nodes if node.op == "call_module" and str(node.target) == layer)
    follower = next(iter(node.users)) if len(node.users) == 1 else None
    if (
        follower is not None
        and is_folded(part, follower)
        and fetch(part, str(follower.target)).running_mean is not None
    ):
        return Site(layer, str(follower.target), node.all_input_nodes[0], follower)
    return Site(layer, None, node.all_input_nodes[0], node)


def without_bias(part: fx.GraphModule) -> list[str]:
    """Layers of a part to which a refit adds a bias: they have none, and no batch norm behind them could take it."""
    found = [layer for layer in affine_layers(part) if fetch(part, layer).bias is None]
    return [layer for layer in found if find_site(part, layer).norm is None]


@dataclass(frozen=True)
class Rectified:
    """What a refit before a rectifier knows from the plain one before it: the rectifier's ceiling, and the sums."""

    ceiling: float
    sums: Fitted


def rectified_target(wanted: Tensor, now: Tensor, ceiling: float) -> Tensor:
    """A target before a rectifier, whose squared error bounds the error behind it and equals it where the map is now.

    Where the teacher is cut off, any value that is cut off as well is as good: what the student puts out now stays.

    Args:
        wanted: The teacher's values before the rectifier.
        now: The student's.
        ceiling: Where the rectifier ends: infinity for ReLU, 6 for ReLU6.

    Source: a majorisation of the rectified error; the aim is that of Zhang et al. 2016, "Accelerating very deep
        convolutional networks for classification and detection".
    """
    goal = torch.where(wanted > 0, wanted, now.clamp(max=0))
    return goal if math.isinf(ceiling) else torch.where(wanted >= ceiling, now.clamp(min=ceiling), goal)


@dataclass(frozen=True)
class Fitted:
    """Sums over the fitting and the held-out chunks of one layer."""

    train: Sums
    heldout: Sums

    def without_targets(self) -> dict[bool, Sums]:
        """Sums by whether their chunk is held out, for `accumulate` to add other targets; none where rows are few."""
        parts = {False: self.train, True: self.heldout} if self.heldout is not self.train else {False: self.train}
        return {held: sums.without_targets() for held, sums in parts.items() if isinstance(sums, NormalEquations)}

    def both(self) -> Sums:
        """All rows."""
        return self.train + self.heldout  # type: ignore[operator]  # both are of one kind

    def select(self, kept: Tensor) -> Fitted:
        """The same for a subset of features."""
        return Fitted(self.train.select(kept), self.heldout.select(kept))

    def solve(self, penalties: Sequence[float], prior: Tensor | None) -> Solution:
        """Ridge with held-out choice of the penalty."""
        return fit(self.train, self.heldout, penalties, prior)


@torch.no_grad()
def tail_equations(
    part: fx.GraphModule,
    tail: Tail,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    known: Rectified | None = None,
) -> Fitted:
    """Normal equations that make a part's output before its final activation equal to given targets.

    Args:
        part: One input, one output.
        tail: Its tail.
        inputs: Chunks that enter the part.
        targets: For each chunk the wanted value at `tail.pre`.
        known: A rectifier follows, so what is wanted depends on what the part puts out now.
    """
    nodes = [tail.features, tail.pre] if tail.skip is None else [tail.features, tail.pre, tail.skip]
    watch = observer(part, nodes)
    layer = fetch(part, tail.affine)

    def rows() -> Iterable[tuple[Tensor, Tensor]]:
        for x, wanted in zip(inputs, targets, strict=True):
            features, now, *skip = watch(x)
            goal = wanted if known is None else rectified_target(wanted, now, known.ceiling)
            yield features, undo(part, tail, goal - skip[0] if skip else goal)

    return accumulate(layer, rows(), len(inputs), None if known is None else known.sums)


@torch.no_grad()
def reader_equations(part: fx.GraphModule, site: Site, inputs: Sequence[Tensor]) -> Fitted:
    """Normal equations that make a layer reproduce the output that it has now."""
    watch = observer(part, [site.features, site.output])
    return accumulate(fetch(part, site.layer), (watch(x) for x in inputs), len(inputs))


@torch.no_grad()
def accumulate(
    layer: nn.Module, rows: Iterable[tuple[Tensor, Tensor]], chunks: int, known: Fitted | None = None
) -> Fitted:
    """Sum the rows of all chunks; every fourth is held out, the last of two or three, none where there is only one.

    Args:
        layer: The affine layer to be refitted.
        rows: Its inputs and its wanted outputs, chunk by chunk.
        chunks: How many there are.
        known: What the same inputs gave with other targets; saves most of the work.
    """
    sums: dict[bool, Sums] = {} if known is None else known.without_targets()
    add = NormalEquations.add if not sums else NormalEquations.add_targets
    most = max(1, rows_wanted(layer) // chunks)
    few: bool | None = None
    for index, (features, outputs) in enumerate(rows):
        z, t = sample_rows(layer, features, outputs, most, index)
        last = min(HELD_OUT_EVERY, chunks) - 1
        held = chunks > 1 and index % HELD_OUT_EVERY == last
        few = few_enough(len(z) * chunks, z.shape[1]) if few is None else few
        if few:
            sums[held] = FewRows(z, t) if held not in sums else sums[held] + FewRows(z, t)  # type: ignore[operator]
            continue
        added = sums.setdefault(held, NormalEquations(z.shape[1], t.shape[1]))
        assert isinstance(added, NormalEquations)
        add(added, z, t)
    return Fitted(sums[False], sums.get(True, sums[False]))


def rows_wanted(layer: nn.Module) -> int:
    """How many rows make the normal equations of a layer: more positions of the same images add little."""
    features = int(layer.weight[0].numel())  # type: ignore[index]
    return MOST_ROWS if features > MOST_FEATURES else max(FEWEST_ROWS, ROWS_PER_FEATURE * features)


def few_enough(rows: int, features: int) -> bool:
    """Whether rows are so few that keeping them is cheaper than normal equations."""
    return rows < min(features, MOST_ROWS + MOST_ROWS // 8)


def too_large(layer: nn.Module) -> str | None:
    """Why a layer can't be refitted within bounded memory, or None."""
    weights = layer.weight.numel()  # type: ignore[operator]
    return f"{weights} weights are too many to refit (limit {MOST_WEIGHTS})" if weights > MOST_WEIGHTS else None


def feature_columns(layer: nn.Module, reader: Reader | None, channels: int, features: int) -> Tensor:
    """Which feature rows belong to each channel (channels, features per channel).

    Args:
        layer: The layer that reads.
        reader: torch-pruning's word on its input positions; None: channels lie one after the other.
        channels: Channels of the group.
        features: All features of the layer.
    """
    if reader is None:
        return torch.arange(features).reshape(channels, -1)
    positions = torch.tensor(reader.positions)
    taps = layer.kernel_size[0] * layer.kernel_size[1] if isinstance(layer, nn.Conv2d) else 1
    return (positions.unsqueeze(2) * taps + torch.arange(taps)).flatten(1)


def kept_channels(
    readers: Sequence[tuple[Sums, Tensor, Tensor]], counts: Sequence[int], penalty: float
) -> dict[int, Tensor]:
    """Which channels of a group stay at each count.

    Args:
        readers: For each reader its equations, solution (features, targets) and columns (channels, each).
        counts: Channel counts wanted.
        penalty: Relative ridge penalty of the surgeon's inverse.
    """
    if all(len(weight) <= EXACT_FEATURES for _, weight, _ in readers):
        return surgeon_path([Consumer(*reader, penalty=penalty) for reader in readers], counts)
    loss = torch.stack([_uncompensated_loss(*reader) for reader in readers]).sum(0)
    order = torch.argsort(loss, descending=True)
    return {count: order[:count].sort().values for count in counts}


def _uncompensated_loss(equations: Sums, weight: Tensor, columns: Tensor) -> Tensor:
    """Rise of the squared error when a channel becomes its mean and nothing makes up for it (channels,)."""
    blocks = equations.blocks(columns)
    parts = weight[columns]
    return ((blocks @ parts) * parts).sum((1, 2))


def masked(solution: Solution, kept: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """A solution on some features, as a weight over all of them with zeros elsewhere."""
    weight = torch.zeros(features, solution.weight.shape[1], dtype=torch.float64)
    weight[kept] = solution.weight
    return weight, solution.bias


def write_solution(
    part: fx.GraphModule, layer: str, norm: str | None, solution: tuple[Tensor, Tensor], sums: Sums
) -> None:
    """Put a refitted affine map into a part's layer and batch norm (in place)."""
    write_affine(fetch(part, layer), None if norm is None else fetch(part, norm), solution, sums)


def current_affine(part: fx.GraphModule, layer: str, norm: str | None) -> tuple[Tensor, Tensor]:
    """The affine map that a part's layer and batch norm compute now."""
    return effective_affine(fetch(part, layer), None if norm is None else fetch(part, norm))


def tail_too_large(part: fx.GraphModule) -> str | None:
    """Why the last affine layer of a part can't be refitted within bounded memory, or None."""
    tail = find_tail(part)
    return too_large(fetch(part, tail.affine)) if isinstance(tail, Tail) else None


def affine_layers(part: fx.GraphModule) -> list[str]:
    """Paths of the layers of a part that can be refitted and whose weights are used once, in graph order."""
    called = [str(node.target) for node in part.graph.nodes if is_affine(get_module(part, node))]
    return [layer for layer in dict.fromkeys(called) if used_once(part, layer)]


def channel_axis(layer: nn.Module) -> int:
    """Where a layer's output has its channels: dimension 1 behind a convolution, the last behind a linear layer."""
    return 1 if isinstance(layer, nn.Conv2d) else -1


def inner_groups(groups: Iterable[ChannelGroup], modules: Sequence[str]) -> list[ChannelGroup]:
    """The groups that lie wholly inside a set of modules: written, passed on and read there."""
    inside = set(modules)
    return [
        group
        for group in groups
        if inside.issuperset(group.writers)
        and inside.issuperset(group.passing)
        and inside.issuperset(reader.layer for reader in group.readers)
    ]
