"""What refits aim at: the teacher's values before a region's final activation, and what an error there costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from causal_compress.shrink.repair import channel_axis
from causal_compress.understand.graph import ends, fetch, observer
from causal_compress.understand.tail import Tail, find_tail
from causal_compress.understand.trace import Network


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

    The Fisher information of the output, averaged over positions: E[g g'] with g the gradient of the log-probability of
    a class drawn from the network's own output. KL of the output is half its quadratic form, to second order.

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
    axes = {
        index: channel_axis(fetch(network.regions[index].module, tail.affine))
        for index, tail in tails.items()
        if isinstance(tail, Tail)
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
            rows = gradient.movedim(axes[index], -1).flatten(0, -2).double()
            sums[index] = sums.get(index, 0) + rows.T @ rows
    return {index: total / total.diagonal().mean().clamp_min(1e-300) for index, total in sums.items()}
