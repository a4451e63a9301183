"""Copies of networks made ready for distillation: boundary activations beside the logits, batch norms folded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from causal_compress.errors import TraceError
from causal_compress.understand.graph import get_module, make_pure, used_once

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def observed(network: nn.Module, nodes: Sequence[str], *, role: str) -> nn.Module:
    """A copy whose forward returns the logits and, beside them, the activations of some nodes.

    Built into the graph, so that watching costs nothing per node.

    Args:
        network: Left unchanged; a torch.fx.GraphModule where nodes are asked for.
        nodes: Names of torch.fx nodes.
        role: "student" or "teacher", for the error.

    Returns:
        A network that answers (logits, (activation, ...)), or the logits alone where no nodes are asked for.

    Raises:
        TraceError: the network is not traced, or has no node of that name.
    """
    network = copy.deepcopy(network)
    if not nodes:
        return network
    known = {node.name: node for node in network.graph.nodes} if isinstance(network, fx.GraphModule) else {}
    absent = sorted(set(nodes) - set(known))
    if absent:
        raise TraceError(
            f"distill: the {role} has no graph nodes {', '.join(absent)}",
            found=f"{len(known)} nodes" if known else "a network that is not traced",
            wanted="a torch.fx.GraphModule and names of its nodes as boundaries",
            remedy="trace the network first, or pass no boundaries",
        )
    graph = cast(fx.GraphModule, network)
    make_pure(graph)
    output = next(node for node in graph.graph.nodes if node.op == "output")
    output.args = ((output.args[0], tuple(known[name] for name in nodes)),)
    graph.recompile()
    return graph


def unobserved(network: nn.Module) -> nn.Module:
    """The same layers, not copies of them, without the boundary activations: for steps in which nothing looks at them.

    Args:
        network: From `observed`; its modules and parameters are shared.

    Returns:
        A network that answers with the logits alone; the one passed in if it does so already.
    """
    if not isinstance(network, fx.GraphModule):
        return network
    graph = copy.deepcopy(network.graph)
    output = next(node for node in graph.nodes if node.op == "output")
    if not isinstance(output.args[0], tuple):
        return network
    output.args = (output.args[0][0],)
    return fx.GraphModule(network, graph)


def answer(network: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits and boundary activations of an `observed` network; the latter empty where it has none.

    Args:
        network: From `observed`.
        x: Inputs (samples, ...).
    """
    output = network(x)
    return output if isinstance(output, tuple) else (output, ())


def fold_batch_norms(network: nn.Module, only: Callable[[str], bool] = lambda _: True) -> nn.Module:
    """Multiply batch norms into the convolution or linear before them; for a network that only answers.

    Args:
        network: In evaluation mode; the caller's own copy, changed in place. Untraced networks stay as they are.
        only: Says of a batch norm's path whether it is folded.

    Returns:
        The same network, which computes the same function up to rounding.
    """
    if not isinstance(network, fx.GraphModule):
        return network
    for node in list(network.graph.nodes):
        folded = _folded(network, node) if only(str(node.target)) else None
        if folded is not None:
            network.set_submodule(str(node.args[0].target), folded)
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _folded(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The layer that does the work of a batch norm and of the layer before it, or None where it can't be folded.

    A subclass may do anything with its weights (standardise them, say), so it is left alone.
    """
    norm, before = get_module(network, node), node.args[0] if node.args else None
    if not isinstance(norm, BATCH_NORMS) or norm.running_mean is None or not isinstance(before, fx.Node):
        return None
    layer = get_module(network, before)
    # A layer that others use too, by node or by module, must go on answering as it does.
    if layer is None or len(before.users) > 1 or not used_once(network, str(before.target)):
        return None
    with torch.no_grad():
        if isinstance(layer, _CONVOLUTIONS) and type(layer) in _CONVOLUTIONS:
            return fuse_conv_bn_eval(layer, norm)
        if type(layer) is nn.Linear and isinstance(norm, nn.BatchNorm1d) and is_flat(before):
            return fuse_linear_bn_eval(layer, norm)
    return None


def is_flat(node: fx.Node) -> bool:
    """Whether a linear's output is known to be (samples, features); on sequences a batch norm means another axis."""
    shape = getattr(node.meta.get("tensor_meta"), "shape", ())
    return len(shape) == 2
