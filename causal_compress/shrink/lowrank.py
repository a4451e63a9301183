"""Low rank: an affine layer as two thinner ones, by the principal components of what it puts out on real inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from causal_compress.results import Factor
from causal_compress.shrink.refit import Sums, projected, sample_mean, write_affine
from causal_compress.understand.graph import fetch


@dataclass(frozen=True)
class Components:
    """Principal components of an affine layer's output.

    Attributes:
        basis: (targets, targets), orthonormal columns, the largest first.
        left: Share of the output's variance that the first r components leave, for r = 0 .. targets; 1 to 0.
    """

    basis: Tensor
    left: Tensor

    def rank_for(self, share: float, multiple: int) -> int:
        """The smallest rank, a multiple of some number, that leaves at most a share of the variance."""
        enough = int((self.left > share).sum())
        return max(multiple, -(-enough // multiple) * multiple)


def components(sums: Sums, weight: Tensor) -> Components:
    """Principal components of z W over the rows that sums were taken of.

    Args:
        sums: Over the layer's inputs z.
        weight: (features, targets).

    Source: Zhang et al. 2016, "Accelerating very deep convolutional networks for classification and detection",
        whose responses these are.
    """
    values, vectors = torch.linalg.eigh(sums.output_covariance(weight))
    values = values.flip(0).clamp_min(0.0)
    left = 1.0 - torch.cat([torch.zeros(1, dtype=values.dtype), values.cumsum(0) / values.sum().clamp_min(1e-12)])
    return Components(vectors.flip(1), left.clamp_min(0.0))


def reduced(sums: Sums, weight: Tensor, bias: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """An affine map whose output is kept on some components, with the mean of its output left as it was.

    Args:
        sums: Over the layer's inputs.
        weight: (features, targets).
        bias: (targets,).
        basis: (targets, rank), orthonormal columns.
    """
    low = weight @ basis @ basis.T
    return low, bias + sample_mean(sums) @ (weight - low)


def cost_share(fan_in: int, outputs: int, rank: int) -> float:
    """What two factors cost relative to the layer, in MACs as in weights.

    Args:
        fan_in: Inputs that each output of the layer is made of.
        outputs: Outputs.
        rank: Between the factors.
    """
    return rank * (fan_in + outputs) / (fan_in * outputs)


def split(graphs: Sequence[fx.GraphModule], factor: Factor) -> tuple[str, str]:
    """Put two layers in the place of one, with weights yet to be written (in place).

    The first has the layer's kernel and `rank` outputs, the second is pointwise and has the bias, if there is one. What
    read the layer reads the second under the same node.

    Args:
        graphs: The first calls the layer; others may, and share its module.
        factor: Which layer, and the rank.

    Returns:
        The paths of both.
    """
    layer = fetch(graphs[0], factor.layer)
    pair = nn.Sequential(*_pair(layer, factor.rank)).train(layer.training)
    first, second = f"{factor.layer}.0", f"{factor.layer}.1"
    for graph in graphs:
        calls = [node for node in graph.graph.nodes if node.op == "call_module" and str(node.target) == factor.layer]
        if not calls:
            continue
        graph.set_submodule(factor.layer, pair)
        for node in calls:
            with graph.graph.inserting_before(node):
                before = graph.graph.call_module(first, node.args)
            node.target, node.args = second, (before,)
        graph.recompile()
    return first, second


def _pair(layer: nn.Conv2d | nn.Linear, rank: int) -> tuple[nn.Module, nn.Module]:
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=bias)
    kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
    first = nn.Conv2d(layer.in_channels, rank, kernel, stride, padding, layer.dilation, bias=False)  # type: ignore[arg-type]
    return first, nn.Conv2d(rank, layer.out_channels, 1, bias=bias)


def write_factors(
    pair: tuple[Any, Any], norm: nn.Module | None, solution: tuple[Tensor, Tensor], basis: Tensor, sums: Sums
) -> None:
    """Put an affine map, kept on some components of its output, into two layers and the batch norm behind them.

    Args:
        pair: What `split` made; changed in place.
        norm: The batch norm behind the second, or None.
        solution: weight (features, targets) and bias (targets,) of layer and norm together.
        basis: (targets, rank), orthonormal columns.
        sums: Over the first one's inputs.
    """
    weight, bias = solution
    first, second = pair
    thin = weight @ basis
    _, bias = reduced(sums, weight, bias, basis)
    with torch.no_grad():
        first.weight.copy_(thin.T.reshape(first.weight.shape))
    write_affine(second, norm, (basis.T, bias), projected(sums, thin))
