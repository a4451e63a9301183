"""From an nn.Module to a chain: the torch.fx graph, its cut points (dominators of the output), and the regions between.

A region starts with the first layer that has weights after a cut point and takes along what follows without changing
shape (batch norm, activation); pooling and flattening open the next region. So a site is a block's or a layer's output
after its activation.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from causal_compress.errors import TraceError
from causal_compress.results import Chain, Fold, RegionInfo, Skip
from causal_compress.understand.cost import count_macs
from causal_compress.understand.follow import follow
from causal_compress.understand.graph import common_name, compose_with_ends, extract, get_module
from causal_compress.understand.settled import separated, settled_copy

logger = logging.getLogger(__name__)

HEAVY = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)


@dataclass(frozen=True)
class Region:
    """The sub-graph between two neighbouring cut points; `module` maps the one's activation to the other's."""

    info: RegionInfo
    module: fx.GraphModule


@dataclass(frozen=True)
class Network:
    """A traced network: the whole graph, and the same as a chain of regions that share its parameters.

    `sites` names the graph's node at the end of each region. Where the graph is not as it was traced, but computes the
    same, `original` is: `folds` made it smaller, or layers that shared weights have their own. Inputs as the data
    prepares them can be given to either; any others (generated ones, other sizes) to `teacher` alone.
    """

    graph: fx.GraphModule
    regions: tuple[Region, ...]
    sites: tuple[str, ...]
    untraced: tuple[Skip, ...]
    example_input: Tensor
    original: fx.GraphModule | None = None
    folds: tuple[Fold, ...] = ()

    @property
    def teacher(self) -> fx.GraphModule:
        """The graph as it was traced: what a student is compared with, in cost and in answers."""
        return self.graph if self.original is None else self.original

    def chain(self) -> Chain:
        """The chain without torch: names, shapes, costs, and what could not be traced."""
        return Chain(regions=tuple(region.info for region in self.regions), untraced=self.untraced)


def trace(model: nn.Module, example_input: Tensor) -> Network:
    """Trace a classifier and find its chain.

    Args:
        model: Any nn.Module of one input tensor and one output tensor (samples, classes); left unchanged.
        example_input: At least two real inputs, batch dimension first.

    Returns:
        A network in evaluation mode without in-place operations that answers as the model does. What fx can't follow
        stays one opaque region.

    Raises:
        TraceError: the model can't be run on the example, or does not return one logits tensor.
    """
    model = settled_copy(model)
    check_runs(model, example_input)
    graph, untraced = follow(model, example_input)
    for skip in untraced:
        logger.warning("%s: %s", skip.what, skip.reason)
    return analyse(graph, example_input, (*untraced, *_batch_bound(graph)))


def _batch_bound(graph: fx.GraphModule) -> Iterator[Skip]:
    """A note on every batch norm that has no statistics of its own."""
    for path, module in graph.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            reason = (
                "it normalises by the batch it is given (track_running_stats=False): answers hang on what is beside"
            )
            yield Skip(what=path, reason=f"{reason} an input, and no refit is written into it")


def check_runs(model: nn.Module, example_input: Tensor) -> None:
    """Refuse a model that fails on the example or on one input of it, or returns something else than logits."""
    output = _run(model, example_input, "check model.args (input channels, image size) and the data section")
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(example_input):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TraceError(
            "the model's output is not one logits tensor",
            found=str(shape),
            wanted=f"shape ({len(example_input)}, classes)",
            remedy="wrap the model so that forward(x) returns the logits only",
        )
    _run(model, example_input[:1], "give batch norms running statistics (track_running_stats=True)")


def _run(model: nn.Module, x: Tensor, remedy: str) -> Any:
    try:
        with torch.no_grad():
            return model(x.clone())  # the model may overwrite its input
    except Exception as error:
        raise TraceError(
            f"the model can't be run on {'the data' if len(x) > 1 else 'a single input'}",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else error!r}",
            wanted=f"a forward pass on inputs of shape {tuple(x.shape[1:])}",
            remedy=remedy,
        ) from error


def analyse(graph: fx.GraphModule, example_input: Tensor, untraced: tuple[Skip, ...] = ()) -> Network:
    """Find the chain of a graph that is traced already.

    Args:
        graph: Of one input and one output; shared, not copied, unless some of its weights are used in several places:
            then a copy that holds them apart is cut, and this graph is the network's `original`.
        example_input: At least two inputs.
        untraced: Carried along into the result.
    """
    per_input = _per_input(graph, example_input)
    boundaries = _coarsen(graph, _cut_points(graph, per_input))
    pieces = [extract(graph, entry, exit_) for entry, exit_ in pairwise(boundaries)]
    sites = tuple(node.name for node in boundaries[1:])
    apart = separated(pieces)
    if apart is None:
        return Network(graph, _regions(pieces, example_input), sites, untraced, example_input)
    pieces, notes = apart
    whole, sites = compose_with_ends(pieces)
    with torch.no_grad():
        ShapeProp(whole.eval()).propagate(example_input)
    known = tuple(dict.fromkeys((*untraced, *notes)))
    return Network(whole, _regions(pieces, example_input), sites, known, example_input, original=graph)


def _regions(pieces: list[fx.GraphModule], x: Tensor) -> tuple[Region, ...]:
    regions: list[Region] = []
    for piece in pieces:
        with torch.no_grad():
            output = piece(x)
        regions.append(Region(_describe(len(regions), piece, x, output, regions), piece))
        x = output
    return tuple(regions)


def _per_input(graph: fx.GraphModule, x: Tensor) -> set[fx.Node]:
    """Nodes that hold one float tensor of a row for each input; the graph's shapes are those for `x` afterwards.

    A first dimension of as many rows as there are inputs can be chance; it has to grow with them.
    """
    found = []
    with torch.no_grad():
        for inputs in (torch.cat([x, x[:1]]), x):
            ShapeProp(graph).propagate(inputs)
            found.append({node for node in graph.graph.nodes if _is_activation(node, len(inputs))})
    return found[0] & found[1]


def _cut_points(graph: fx.GraphModule, per_input: Collection[fx.Node]) -> list[fx.Node]:
    """Dominators of the output that hold one float tensor with the batch first, from the input to the logits."""
    nodes = list(graph.graph.nodes)
    source = next(node for node in nodes if node.op == "placeholder")
    logits = next(node for node in nodes if node.op == "output").args[0]
    digraph = nx.DiGraph([(used, node) for node in nodes for used in node.all_input_nodes])
    dominators = nx.immediate_dominators(digraph, source)
    cuts = [logits]
    while cuts[-1] is not source:
        cuts.append(dominators[cuts[-1]])
    return [node for node in reversed(cuts) if node is source or node is logits or node in per_input]


def _is_activation(node: fx.Node, batch: int) -> bool:
    meta: Any = node.meta.get("tensor_meta")
    if not (hasattr(meta, "shape") and hasattr(meta, "dtype")):
        return False
    return meta.dtype.is_floating_point and len(meta.shape) > 1 and meta.shape[0] == batch


def _coarsen(graph: fx.GraphModule, cuts: list[fx.Node]) -> list[fx.Node]:
    """Keep the cut points before which the next layer with weights, or a change of shape, begins."""
    kept = [cuts[0]]
    heavy_inside = False
    for before, after in pairwise(cuts):
        piece = extract(graph, before, after)
        heavy = any(isinstance(get_module(piece, node), HEAVY) for node in piece.graph.nodes) or _is_opaque(piece)
        same_shape = _shape(before) == _shape(after)
        if heavy_inside and (heavy or not same_shape):
            kept.append(before)
            heavy_inside = False
        heavy_inside = heavy_inside or heavy
    if not heavy_inside and len(kept) > 1:
        kept.pop()
    return [*kept, cuts[-1]]


def _is_opaque(piece: fx.GraphModule) -> bool:
    """Whether the piece has weights that are not in a layer we know: untraced modules, bare parameters."""
    known = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
    modules = [module for node in piece.graph.nodes if (module := get_module(piece, node)) is not None]
    return any(list(module.parameters()) and not isinstance(module, known) for module in modules)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape[1:])


def _describe(index: int, module: fx.GraphModule, x: Tensor, y: Tensor, earlier: list[Region]) -> RegionInfo:
    modules = tuple(dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "call_module"))
    weighted = [name for name in modules if next(module.get_submodule(name).parameters(), None) is not None]
    heavy = [name for name in modules if isinstance(module.get_submodule(name), HEAVY)]
    name = common_name(heavy or weighted, f"region{index}")
    if any(region.info.name == name for region in earlier):
        name = f"{name}#{index}"
    return RegionInfo(
        index=index,
        name=name,
        modules=modules,
        input_shape=tuple(x.shape[1:]),
        output_shape=tuple(y.shape[1:]),
        macs=count_macs(module, x[:1]),
        params=sum(parameter.numel() for parameter in module.parameters()),
    )


def site_activations(network: Network, x: Tensor) -> list[Tensor]:
    """The activation at every site, in chain order; the last is the logits.

    Args:
        network: Traced network.
        x: Inputs (samples, ...).
    """
    activations = []
    for region in network.regions:
        x = region.module(x)
        activations.append(x)
    return activations
