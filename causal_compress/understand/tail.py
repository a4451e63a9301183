"""Where a region ends: its last affine layer, the skip branch added to it, and what follows.

A region's output is post( T( affine(features) ) + skip ), where T (a batch norm, a permutation, a layer scale) can be
undone or folded. So a target for the output before `post` is a target for the affine layer: what a refit needs.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from causal_compress.understand.graph import ancestors, get_module, shape_of, used_once

_ADDS = (operator.add, torch.add)
_PASSING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.AlphaDropout)
_PASSING_FUNCTIONS = ("dropout", "stochastic_depth")
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.Sigmoid, nn.Tanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.PReLU,
)  # fmt: skip
_ACTIVATION_NAMES = {
    "relu", "relu6", "leaky_relu", "gelu", "silu", "mish", "elu", "selu", "sigmoid", "tanh",
    "hardswish", "hardsigmoid", "hardtanh", "softplus",
}  # fmt: skip
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_ZERO = 1e-12  # nothing can be divided by what is smaller


@dataclass(frozen=True)
class Tail:
    """The last affine layer of a region.

    Attributes:
        affine: Path of the convolution or linear layer.
        norm: Path of the batch norm right behind it, or None.
        features: The node that feeds it.
        undo: Nodes between the affine layer and `pre` that are undone to turn a target at `pre` into one for the layer.
        skip: The node added to it, or None.
        pre: The node whose value is target of a refit: the last one before activations and norms of sums.
    """

    affine: str
    norm: str | None
    features: fx.Node
    undo: tuple[fx.Node, ...]
    skip: fx.Node | None
    pre: fx.Node


def find_tail(piece: fx.GraphModule) -> Tail | str:
    """The tail of a region, or the reason why it has none that can be refitted.

    Args:
        piece: A region's module: one placeholder, one output.
    """
    node = next(node for node in piece.graph.nodes if node.op == "output").args[0]
    assert isinstance(node, fx.Node)
    while _is_activation(piece, node) or _is_passing(piece, node) or _is_late_norm(piece, node):
        node = node.all_input_nodes[0]
    if node.op == "call_function" and node.target in _ADDS and len(node.all_input_nodes) == 2:
        return _tail_of_sum(piece, node)
    straight = _walk_back(piece, node)
    if straight is None:
        return f"it ends with {describe(piece, node)}, which is not affine"
    return _tail(piece, straight, None, node)


def _tail_of_sum(piece: fx.GraphModule, node: fx.Node) -> Tail | str:
    if node.kwargs.get("alpha", 1) != 1:
        return f"its last addition takes one summand times {node.kwargs['alpha']}"
    found = [(branch, _walk_back(piece, branch)) for branch in node.all_input_nodes]
    tails = [(branch, walked) for branch, walked in found if walked is not None]
    if not tails:
        return "no summand of its last addition ends with a convolution or linear layer"
    whole = [(branch, walked) for branch, walked in tails if shape_of(branch) == shape_of(node)]
    if not whole:
        return f"its last addition repeats what {tails[0][1][0].target} puts out over a larger shape"
    branch, walked = max(whole, key=lambda item: len(ancestors(item[0])))
    skip = next((other for other in node.all_input_nodes if other is not branch), None)
    return _tail(piece, walked, skip, node)


def _tail(piece: fx.GraphModule, walked: list[fx.Node], skip: fx.Node | None, pre: fx.Node) -> Tail:
    affine, *between = walked
    norm = next((str(node.target) for node in between if isinstance(get_module(piece, node), BATCH_NORMS)), None)
    undo = tuple(node for node in between if not isinstance(get_module(piece, node), BATCH_NORMS))
    return Tail(str(affine.target), norm, affine.all_input_nodes[0], undo, skip, pre)


def _walk_back(piece: fx.GraphModule, node: fx.Node) -> list[fx.Node] | None:
    """From a node back to an affine layer through what can be undone: the nodes from the layer on, or None."""
    walked: list[fx.Node] = []
    while True:
        walked.insert(0, node)
        module = get_module(piece, node)
        if len(node.users) > 1:  # another reader may be what the skip is made of: a refit would change its own target
            return None
        if is_affine(module):
            return walked if used_once(piece, str(node.target)) else None
        if isinstance(module, BATCH_NORMS):
            if not is_folded(piece, node) or module.running_mean is None:
                return None
        elif not (_is_passing(piece, node) or _can_divide(piece, node) or _is_permute(piece, node)):
            return None
        node = next(source for source in node.all_input_nodes if source.op != "get_attr")


def is_affine(module: nn.Module | None) -> bool:
    """Whether a closed-form refit of the module exists: a linear layer, or an ungrouped, zero-padded Conv2d."""
    if type(module) is nn.Conv2d:  # a subclass may do anything with its weights
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def is_folded(piece: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a batch norm right behind an affine layer, and its channels are that layer's outputs.

    Args:
        piece: A module whose shapes were propagated.
        node: A node of its graph.
    """
    norm = get_module(piece, node)
    if not isinstance(norm, BATCH_NORMS) or not norm.affine:  # without parameters nothing can be written into it
        return False
    layer = get_module(piece, node.all_input_nodes[0])
    # Behind a linear layer on sequences (samples, positions, features) the norm's channels are the positions.
    return is_affine(layer) and (isinstance(layer, nn.Conv2d) or len(shape_of(node)) == 2)


def _is_activation(piece: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(get_module(piece, node), _ACTIVATIONS)
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _ACTIVATION_NAMES


def activations_before(piece: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, tuple[str, ...]]:
    """Walk back through activations that treat every channel alike: the node before them, and what they are.

    Args:
        piece: A region's module.
        node: A value in it.

    Returns:
        The node, and the activations from the last to the first in words that are equal for equal ones.
    """
    found: list[str] = []
    while len(node.users) == 1 and (
        _is_passing(piece, node) or (_is_activation(piece, node) and not _learns(piece, node))
    ):
        if not _is_passing(piece, node):
            found.append(_told(piece, node))
        node = node.all_input_nodes[0]
    return node, tuple(found)


def _learns(piece: fx.GraphModule, node: fx.Node) -> bool:
    module = get_module(piece, node)
    return module is not None and any(True for _ in module.parameters())


def _told(piece: fx.GraphModule, node: fx.Node) -> str:
    module = get_module(piece, node)
    if module is not None:
        return repr(module)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return f"{name} {node.args[1:]} {sorted(node.kwargs.items())}"


def rectifier_ceiling(piece: fx.GraphModule, node: fx.Node) -> float | None:
    """Where the rectifier that alone reads a node ends (infinity for ReLU, 6 for ReLU6), or None without one.

    Args:
        piece: A region's module.
        node: A value in it.
    """
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None:
        return None
    module = get_module(piece, reader)
    name = reader.target if reader.op == "call_method" else getattr(reader.target, "__name__", "")
    if isinstance(module, nn.ReLU6) or (reader.op == "call_function" and name == "relu6"):
        return 6.0
    if isinstance(module, nn.ReLU) or (reader.op in ("call_function", "call_method") and name == "relu"):
        return math.inf
    return None


def _is_passing(piece: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node hands its input on unchanged in evaluation mode."""
    if node.op == "call_module":
        module = get_module(piece, node)
        return isinstance(module, _PASSING) or type(module).__name__ == "StochasticDepth"
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _PASSING_FUNCTIONS


def _is_late_norm(piece: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is a norm that can't be folded into an affine layer right before it: it stays as it is."""
    module = get_module(piece, node)
    if isinstance(module, BATCH_NORMS):
        return not is_folded(piece, node)
    return isinstance(module, nn.LayerNorm | nn.GroupNorm)


def _is_scale(node: fx.Node) -> bool:
    """Whether the node multiplies by a parameter (a layer scale)."""
    sources = node.all_input_nodes
    multiplies = node.op == "call_function" and node.target in (operator.mul, torch.mul)
    return multiplies and len(sources) == 2 and sum(source.op == "get_attr" for source in sources) == 1


def _can_divide(piece: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node multiplies by a parameter that hides nothing and repeats nothing."""
    if not _is_scale(node):
        return False
    scaled = next(source for source in node.all_input_nodes if source.op != "get_attr")
    seen = bool((_scale(piece, node).double().abs() > _ZERO).all())
    return seen and shape_of(scaled) == shape_of(node)


def _scale(piece: fx.GraphModule, node: fx.Node) -> Tensor:
    source = next(source for source in node.all_input_nodes if source.op == "get_attr")
    return _attribute(piece, str(source.target)).detach()


def _is_permute(piece: fx.GraphModule, node: fx.Node) -> bool:
    return _permutation(piece, node) is not None


def _permutation(piece: fx.GraphModule, node: fx.Node) -> list[int] | None:
    module = get_module(piece, node)
    dims: Any
    if type(module).__name__ == "Permute":
        dims = getattr(module, "dims")  # noqa: B009  (torchvision's Permute is not imported for its type)
    elif (node.op == "call_method" and node.target == "permute") or node.target is torch.permute:
        given: Any = node.kwargs.get("dims", node.args[1:])
        dims = given[0] if isinstance(given[0], tuple | list) else given
    else:
        return None
    return [int(dim) % len(dims) for dim in dims]  # -1 is the last


def undo(piece: fx.GraphModule, tail: Tail, value: Tensor) -> Tensor:
    """Carry a target at `tail.pre` (its skip already subtracted) back to the affine layer's output.

    Args:
        piece: The region's module.
        tail: Its tail.
        value: Target (samples, ...) before activations.
    """
    for node in reversed(tail.undo):
        order = _permutation(piece, node)
        if order is not None:
            value = value.permute(*torch.argsort(torch.tensor(order)).tolist())
        elif _is_scale(node):
            value = value / _scale(piece, node)
    return value


def _attribute(piece: fx.GraphModule, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    value = getattr(piece.get_submodule(owner), name)
    assert isinstance(value, Tensor)
    return value


def describe(piece: fx.GraphModule, node: fx.Node) -> str:
    """A node in a reader's words: its layer's path and type, or its function's name."""
    module = get_module(piece, node)
    if module is not None:
        grouped = isinstance(module, nn.Conv2d) and module.groups > 1
        return f"{node.target} ({'grouped ' if grouped else ''}{type(module).__name__})"
    return str(node.target) if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))
