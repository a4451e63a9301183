"""What stands for a causal node: a representative, the node's own final activation, an adapter where shapes differ."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from causal_compress.results import Adapter, Merge
from causal_compress.shrink.borrow import borrowed, lenders_of
from causal_compress.understand.graph import compose, ends, extract, fetch
from causal_compress.understand.tail import Tail, find_tail
from causal_compress.understand.trace import HEAVY, Network


def build_part(network: Network, merge: Merge) -> fx.GraphModule | str:
    """The module that takes the place of regions first..last, with the representative's weights as they are.

    Args:
        network: The teacher; left as it is.
        merge: Which regions, which representative, which adapter.

    Returns:
        A deep copy that maps the activation before `first` to one of the shape behind `last`, or why there is none.
    """
    region = network.regions[merge.representative]
    if merge.first == merge.last:
        return copy.deepcopy(region.module)
    tail, last_tail = find_tail(region.module), find_tail(network.regions[merge.last].module)
    for index, found in ((merge.representative, tail), (merge.last, last_tail)):
        if isinstance(found, str):
            return f"{network.regions[index].info.name} can't be refitted: {found}"
    assert isinstance(tail, Tail)
    assert isinstance(last_tail, Tail)
    joined = copy.deepcopy(_joined(network, merge, tail, last_tail))
    match merge.adapter:
        case "reshape":
            return _reshaped(network, merge, joined)
        case "project":
            adapter = _projection(network, merge)
            return adapter if isinstance(adapter, str) else _checked(network, merge, compose([adapter, joined]))
        case "borrow":
            return _borrowing(network, merge, joined)
    return _checked(network, merge, joined)


def _joined(network: Network, merge: Merge, tail: Tail, last_tail: Tail) -> fx.GraphModule:
    """The representative up to its last affine layer and skip, then the final activation of the node's last region."""
    body, last = network.regions[merge.representative].module, network.regions[merge.last].module
    if merge.representative == merge.last:
        return body
    return compose([extract(body, ends(body)[0], tail.pre), extract(last, last_tail.pre, ends(last)[1])])


def _example(network: Network, index: int) -> Tensor:
    """Zeros of the shape that enters a region; two samples."""
    return torch.zeros(2, *network.regions[index].info.input_shape)


def _checked(network: Network, merge: Merge, part: fx.GraphModule) -> fx.GraphModule | str:
    wanted = network.regions[merge.last].info.output_shape
    try:
        with torch.no_grad():
            shape = tuple(part(_example(network, merge.first)).shape[1:])
    except Exception:  # what an operation says of a shape that it was not written for is of any kind
        return _misfit(network, merge)
    return part if shape == wanted else f"shapes don't fit: gives {shape}, wanted {wanted}"


def _misfit(network: Network, merge: Merge) -> str:
    reads, given = (network.regions[index].info for index in (merge.representative, merge.first))
    return f"shapes don't fit: {reads.name} reads {reads.input_shape}, the node is given {given.input_shape}"


def _borrowing(network: Network, merge: Merge, part: fx.GraphModule) -> fx.GraphModule | str:
    """A part with the inner channels of all regions of its node."""
    lenders = lenders_of(network, merge)
    if isinstance(lenders, str):
        return lenders
    found = _checked(network, merge, part)
    return found if isinstance(found, str) else borrowed(found, lenders, network.regions[merge.representative])


def _reshaped(network: Network, merge: Merge, part: fx.GraphModule) -> fx.GraphModule | str:
    """A part of one affine layer whose numbers of inputs and outputs are chosen anew."""
    tail = find_tail(part)
    heavy = [node for node in part.graph.nodes if isinstance(_module(part, node), HEAVY)]
    if isinstance(tail, str) or len(heavy) != 1 or tail.skip is not None or tail.undo:
        return "only a single layer can take another number of channels"
    entry, _ = ends(part)
    try:
        with torch.no_grad():
            features = extract(part, entry, tail.features)(_example(network, merge.first))
    except Exception:  # what an operation says of a shape that it was not written for is of any kind
        return _misfit(network, merge)
    outputs = _tail_outputs(network, merge.last)
    layer = fetch(part, tail.affine)
    if isinstance(layer, nn.Conv2d) != (features.ndim == 4):
        return "the layer reads another kind of activation"
    _replace(part, tail.affine, _like(layer, features.shape[1 if features.ndim == 4 else -1], outputs))
    if tail.norm is not None:
        norm = fetch(part, tail.norm)
        _replace(part, tail.norm, type(norm)(outputs, eps=norm.eps, momentum=norm.momentum).eval())
    return _checked(network, merge, part)


def _module(part: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return part.get_submodule(str(node.target)) if node.op == "call_module" else None


def _tail_outputs(network: Network, index: int) -> int:
    tail = find_tail(network.regions[index].module)
    assert isinstance(tail, Tail)
    return len(fetch(network.regions[index].module, tail.affine).weight)


def _like(layer: nn.Conv2d | nn.Linear, inputs: int, outputs: int) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        geometry: dict[str, Any] = {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
        kernel: Any = layer.kernel_size
        fresh: nn.Module = nn.Conv2d(inputs, outputs, kernel, bias=layer.bias is not None, **geometry)
    else:
        fresh = nn.Linear(inputs, outputs, bias=layer.bias is not None)
    # Zeros are what the refit stays close to: no chance, so a resumed run is equal.
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    return fresh


def _replace(part: fx.GraphModule, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(part.get_submodule(owner), name, module)


def _projection(network: Network, merge: Merge) -> fx.GraphModule | str:
    """The smallest affine map from the shape before the node to the one that the representative reads."""
    given, wanted = (
        network.regions[merge.first].info.input_shape,
        network.regions[merge.representative].info.input_shape,
    )
    name = f"adapter_{merge.first}_{merge.last}"
    layer: nn.Module
    if len(given) == 3 and len(wanted) == 3 and given[1] % wanted[1] == 0 and given[2] % wanted[2] == 0:
        layer = nn.Conv2d(given[0], wanted[0], 1, stride=(given[1] // wanted[1], given[2] // wanted[2]))
    elif len(given) == len(wanted) and given[:-1] == wanted[:-1]:
        layer = nn.Linear(given[-1], wanted[-1])
    else:
        return f"no adapter from {given} to {wanted}"
    root = nn.Module()
    root.add_module(name, layer)
    graph = fx.Graph()
    graph.output(graph.call_module(name, (graph.placeholder("x"),)))
    return fx.GraphModule(root, graph)


def fitting_adapter(
    network: Network, first: int, last: int, representative: int
) -> tuple[Adapter | None, fx.GraphModule] | str:
    """The least adapter with which a region can stand for regions first..last, and the part; or why none can."""
    reasons: list[str] = []
    choices: tuple[Adapter | None, ...] = (None, "reshape", "project")
    for adapter in choices:
        merge = Merge(first=first, last=last, representative=representative, adapter=adapter)
        part = build_part(network, merge)
        if not isinstance(part, str):
            return adapter, part
        reasons.append(part)
        if first == last:
            break
    return reasons[0]
