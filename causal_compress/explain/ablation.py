"""A region's own computation, taken apart from the skip connection around it: run, hold, patch and ablate it.

On a chain every path goes through every cut point, so nothing can be said by holding a cut point itself: all that
comes after would stand still. What a node *does* is what it adds: region(x) = close(x, own(x)), where `own` is the
branch that the skip connection goes around. A region without one is its own computation as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from causal_compress.inputs.data import Split
from causal_compress.results import AblationHarm, NodeHarm, Skip
from causal_compress.understand.graph import ends, extract
from causal_compress.understand.observe import network_device
from causal_compress.understand.tail import find_tail
from causal_compress.understand.trace import Network, Region

Ablation = Literal["mean", "bypass"]
_BATCH = 128  # all entries and branches of a batch are kept at a time


@dataclass(frozen=True)
class Parted:
    """A region as own computation and the rest.

    Attributes:
        own: Activation at the region's entry -> what the region itself computes.
        close: (entry, own) -> the region's output, with what goes around `own`.
        around: Whether anything goes around it.
        same_shape: Whether the entry could stand for `own` where nothing goes around.
    """

    own: nn.Module
    close: nn.Module | None
    around: bool
    same_shape: bool

    def run(self, x: Tensor, own: Tensor) -> Tensor:
        """The region's output where its own computation gave `own`."""
        closed: Tensor = own if self.close is None else self.close(x, own)
        return closed


def part(region: Region) -> Parted:
    """Find a region's own computation.

    Args:
        region: Left unchanged; the parts share its modules and parameters.

    Limits: only an addition near the region's end counts as a skip connection; where it is a concatenation
        (DenseNet) or lies further inside (attention blocks), the region counts as its own computation as a whole.
    """
    same = region.info.input_shape == region.info.output_shape
    whole = Parted(region.module, None, around=False, same_shape=same)
    tail = find_tail(region.module)
    if isinstance(tail, str) or tail.skip is None:
        return whole
    branch = next((node for node in tail.pre.all_input_nodes if node is not tail.skip), None)
    entry, _ = ends(region.module)
    if branch is None:
        return whole
    return Parted(
        extract(region.module, entry, branch), _closing(region.module, branch, tail.pre), around=True, same_shape=same
    )


def _closing(piece: fx.GraphModule, branch: fx.Node, addition: fx.Node) -> fx.GraphModule:
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    given: fx.Node | None = None
    for node in piece.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda source: mapping[source])
        if node.op == "placeholder":
            given = graph.placeholder("own")
    assert given is not None, "a region has an entry"
    mapping[addition].replace_input_with(mapping[branch], given)
    closed = fx.GraphModule(piece, graph)  # only a module's graph knows which of its calls are pure
    closed.graph.eliminate_dead_code()
    closed.recompile()
    return closed


def part_network(network: Network) -> tuple[Parted, ...]:
    """All regions of a network, parted."""
    return tuple(part(region) for region in network.regions)


@dataclass(frozen=True)
class Plain:
    """Entries, own computations and exits of all regions for one batch."""

    entries: tuple[Tensor, ...]
    owns: tuple[Tensor, ...]
    logits: Tensor

    def exit_of(self, site: int) -> Tensor:
        """The activation at a site."""
        return self.entries[site + 1] if site + 1 < len(self.entries) else self.logits


def run_parted(parts: Sequence[Parted], x: Float[Tensor, "samples ..."]) -> Plain:
    """Run all regions and keep what flows between them."""
    entries, owns = [], []
    for piece in parts:
        own = piece.own(x)
        entries.append(x)
        owns.append(own)
        x = piece.run(x, own)
    return Plain(tuple(entries), tuple(owns), x)


def run_with(parts: Sequence[Parted], x: Tensor, owns: Sequence[Tensor], span: tuple[int, int], end: int) -> Tensor:
    """From x at the entry of region `span[0]` to site `end`, with the own computations of the span given.

    Args:
        parts: The whole network.
        x: Entry of the span's first region.
        owns: Own computation of every region of the network; only those of the span are used.
        span: First and last region whose own computation is given.
        end: Last region that is run.
    """
    first, last = span
    for number in range(first, end + 1):
        piece = parts[number]
        x = piece.run(x, owns[number].expand(len(x), *owns[number].shape[1:]) if number <= last else piece.own(x))
    return x


def ablation_harm(
    network: Network,
    nodes: Sequence[Sequence[int]],
    split: Split,
    *,
    how: Ablation = "mean",
    inputs: int = 1024,
    seed: int = 0,
) -> AblationHarm:
    """What it really costs to ablate each node: the truth against which causal effects are held.

    Args:
        network: Traced; left unchanged.
        nodes: Sites of each node, neighbours in chain order.
        split: Plain inputs with labels.
        how: mean: the node's own computation becomes its mean over the inputs, position by position; bypass: it becomes
            nothing, so only what goes around it remains (without a skip connection: the entry, if the shape allows it).
        inputs: At most so many.
        seed: Of the bootstrap.

    Returns:
        KL of the ablated network's answers from the untouched one's, mean over inputs with 95 % bootstrap interval, and
        accuracy lost. What can't be bypassed is skipped, with the reason.
    """
    parts, device = part_network(network), network_device(network)
    means = _mean_owns(parts, split, inputs, device) if how == "mean" else None
    able = [node for node in nodes if how == "mean" or all(_can_bypass(parts[site]) for site in node)]
    losses: dict[int, list[Tensor]] = {node[0]: [] for node in able}
    rights: dict[int, list[Tensor]] = {node[0]: [] for node in able}
    right: list[Tensor] = []
    with torch.inference_mode():
        for x, y in split.batches(_BATCH, limit=inputs):
            plain = run_parted(parts, x.to(device))
            right.append(plain.logits.argmax(1).cpu() == y)
            for node in able:
                logits = _ablated(parts, plain, node, means)
                losses[node[0]].append(output_kl(plain.logits, logits).cpu())
                rights[node[0]].append(logits.argmax(1).cpu() == y)
    before = torch.cat(right).double().mean()
    harms = []
    for number, node in enumerate(nodes):
        if node[0] not in losses:
            continue
        kl = torch.cat(losses[node[0]]).numpy()
        low, high = mean_interval(kl, seed=seed)
        drop = 100 * float(before - torch.cat(rights[node[0]]).double().mean())
        sites = tuple(network.regions[site].info.name for site in node)
        harms.append(NodeHarm(index=number, sites=sites, kl=float(kl.mean()), kl_low=low, kl_high=high, drop_pp=drop))
    skipped = tuple(_not_bypassed(network, node) for node in nodes if node[0] not in losses)
    count = len(torch.cat(right))
    forwards = count * (1 + len(able) + (how == "mean"))
    return AblationHarm(how=how, nodes=tuple(harms), inputs=count, forwards=forwards, skipped=skipped)


def _mean_owns(parts: Sequence[Parted], split: Split, inputs: int, device: torch.device) -> tuple[Tensor, ...]:
    totals: list[Tensor] | None = None
    count = 0
    with torch.inference_mode():
        for x, _ in split.batches(_BATCH, limit=inputs):
            sums = [own.double().sum(0, keepdim=True) for own in run_parted(parts, x.to(device)).owns]
            totals = sums if totals is None else [a + b for a, b in zip(totals, sums, strict=True)]
            count += len(x)
    assert totals is not None, "a split is never empty"
    return tuple((total / count).float() for total in totals)


def _can_bypass(piece: Parted) -> bool:
    return piece.around or piece.same_shape


def _not_bypassed(network: Network, node: Sequence[int]) -> Skip:
    return Skip(
        what=", ".join(network.regions[site].info.name for site in node),
        reason="nothing goes around it and its output has another shape than its input, so it can't be bypassed",
    )


def _ablated(parts: Sequence[Parted], plain: Plain, node: Sequence[int], means: tuple[Tensor, ...] | None) -> Tensor:
    first, last = node[0], node[-1]
    if means is not None:
        return run_with(parts, plain.entries[first], means, (first, last), len(parts) - 1)
    x = plain.entries[first]
    for number in node:
        x = parts[number].run(x, torch.zeros_like(plain.owns[number])) if parts[number].around else x
    for piece in parts[last + 1 :]:
        x = piece.run(x, piece.own(x))
    return x


def output_kl(before: Float[Tensor, "samples classes"], after: Float[Tensor, "samples classes"]) -> Tensor:
    """KL(softmax(before) || softmax(after)) of each row [nats], in float64."""
    log_before, log_after = before.double().log_softmax(1), after.double().log_softmax(1)
    return (log_before.exp() * (log_before - log_after)).sum(1).clamp_min(0)


def mean_interval(values: np.ndarray[tuple[int], np.dtype[np.float64]], *, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of a mean, inputs being the independent units; NaN of fewer than two."""
    if len(values) < 2:
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(0, len(values), (500, len(values)))
    low, high = np.percentile(values[draws].mean(1), (2.5, 97.5))
    return float(low), float(high)
