"""What a part costs at each width: MACs and parameters, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx, nn

from causal_compress.understand.cost import count_macs


@dataclass(frozen=True)
class LayerCost:
    """MACs and parameters of one layer for one input.

    `scales` says which widths MACs and weights are proportional to; `bias` is proportional to the outputs alone.
    `outputs` counts the output channels of what can have a low rank, and is 0 for anything else.
    """

    macs: float
    params: float
    bias: float
    scales: Literal["both", "out", "none"]
    outputs: int = 0


@dataclass(frozen=True)
class FileCosts:
    """What an ONNX file consists of, as far as plans can tell; all in bytes.

    Args:
        each: What a parameter takes.
        graph: What describes each region of the teacher.
        layer: What one more layer takes.
        whole: The teacher's file.
    """

    each: int
    graph: tuple[float, ...]
    layer: float
    whole: int


def layer_costs(part: fx.GraphModule, x: Tensor) -> dict[str, LayerCost]:
    """MACs and parameters of every layer of a part; what belongs to no known layer stands under the empty path.

    Args:
        part: A part.
        x: One input of it (1, ...).
    """
    costs: dict[str, LayerCost] = {}
    outputs: dict[str, Tensor] = {}
    layers = {
        str(node.target): part.get_submodule(str(node.target)) for node in part.graph.nodes if node.op == "call_module"
    }
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, path=path: outputs.__setitem__(path, out))
        for path, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            part(x)
    finally:
        for hook in hooks:
            hook.remove()
    for path, layer in layers.items():
        params = float(sum(parameter.numel() for parameter in layer.parameters()))
        bias = float(layer.bias.numel()) if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None else 0.0
        match layer:
            case nn.Conv2d():
                taps = layer.kernel_size[0] * layer.kernel_size[1]
                macs = float(outputs[path].numel() * layer.in_channels // layer.groups * taps)
                whole = layer.groups == 1
                costs[path] = LayerCost(
                    macs, params - bias, bias, "both" if whole else "out", layer.out_channels if whole else 0
                )
            case nn.Linear():
                macs = float(outputs[path].numel() * layer.in_features)
                costs[path] = LayerCost(macs, params - bias, bias, "both", layer.out_features)
            case nn.modules.batchnorm._NormBase() | nn.LayerNorm() | nn.GroupNorm() | nn.PReLU():
                costs[path] = LayerCost(0.0, params, 0.0, "out")
    total = float(count_macs(part, x)), float(sum(parameter.numel() for parameter in part.parameters()))
    known = sum(cost.macs for cost in costs.values()), sum(cost.params + cost.bias for cost in costs.values())
    costs[""] = LayerCost(max(0.0, total[0] - known[0]), max(0.0, total[1] - known[1]), 0.0, "none")
    return costs


def with_biases(costs: Mapping[str, LayerCost], layers: Collection[str]) -> dict[str, LayerCost]:
    """The same where a refit gives some layers, which have none, a bias."""
    return {path: replace(cost, bias=float(cost.outputs)) if path in layers else cost for path, cost in costs.items()}


def part_costs(
    costs: Mapping[str, LayerCost],
    shares: Mapping[str, tuple[float, float]],
    writers: Collection[str],
    ranks: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Cost of a part whose layers keep some shares of inputs and outputs, split by what its own output width scales.

    Args:
        costs: From `layer_costs`.
        shares: Layer -> (share of inputs, share of outputs) that stay.
        writers: The layers whose outputs shrink with the part's own output, where that can be narrowed.
        ranks: Layer -> rank, where it becomes two.

    Returns:
        The fields macs_fixed, macs_out, params_fixed and params_out of a Candidate.
    """
    result = {"macs_fixed": 0.0, "macs_out": 0.0, "params_fixed": 0.0, "params_out": 0.0}
    for path, cost in costs.items():
        inputs, outputs = shares.get(path, (1.0, 1.0))
        kind = "out" if path in writers else "fixed"
        if ranks and path in ranks:
            first = inputs * ranks[path] / cost.outputs
            second = ranks[path] * outputs * cost.outputs / cost.params  # the layer's weights: fan-in times outputs
            for what, amount in (("macs", cost.macs), ("params", cost.params)):
                result[f"{what}_fixed"] += amount * first
                result[f"{what}_{kind}"] += amount * second
            result[f"params_{kind}"] += cost.bias * outputs
            continue
        factor = {"both": inputs * outputs, "out": outputs, "none": 1.0}[cost.scales]
        result[f"macs_{kind}"] += cost.macs * factor
        result[f"params_{kind}"] += cost.params * factor + cost.bias * outputs
    return result
