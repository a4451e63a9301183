"""Batch norms for the time of training: put behind layers that have none, and folded into them afterwards.

A network without batch norms is hard to train once few channels are left: one dead channel, one long gradient, and a
tenth of the network is gone. A norm that starts as the identity changes nothing but the way there; in evaluation it is
an affine map, so the layer before it can take it over exactly and the structure stays what the surgery made it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from causal_compress.errors import TraceError
from causal_compress.recover.networks import BATCH_NORMS, fold_batch_norms, is_flat
from causal_compress.understand.graph import get_module, used_once

SUFFIX = "_training_norm"


def with_norms(student: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """A copy with a batch norm behind every convolution or linear layer that has a bias and no norm, but for the last.

    Args:
        student: A torch.fx.GraphModule; left as it is.
        batches: Inputs, in chunks, on which the statistics are taken: there a norm is the identity.

    Returns:
        A network that computes the same in evaluation mode, up to rounding.

    Raises:
        TraceError: the student is not traced.
    """
    if not isinstance(student, fx.GraphModule):
        raise TraceError(
            "distill.norms: the student is not traced",
            found=type(student).__name__,
            wanted="a torch.fx.GraphModule",
            remedy="trace the network first, or set distill.norms to false",
        )
    graph = copy.deepcopy(student).eval()
    with torch.no_grad():
        ShapeProp(graph).propagate(batches[0])
    norms = [_insert(graph, node) for node in _unnormed(graph)]
    graph.recompile()
    _settle(graph, norms, batches)
    return graph


def without_norms(trained: nn.Module, student: nn.Module) -> dict[str, Tensor]:
    """The weights of the student's own structure that compute what the trained copy does in evaluation mode.

    Args:
        trained: From `with_norms`, trained since; left as it is.
        student: The structure.
    """
    folded = copy.deepcopy(trained).eval()
    assert isinstance(folded, fx.GraphModule)
    state = fold_batch_norms(folded, only=lambda path: path.endswith(SUFFIX)).state_dict()
    return {name: state[name] for name in student.state_dict()}


def trained_node(network: nn.Module, name: str) -> str:
    """The node whose value a node of the student will have afterwards: the norm's, where one will be folded into it.

    Args:
        network: From `with_norms`, or any other.
        name: The node in the student's own structure.
    """
    nodes = network.graph.nodes if isinstance(network, fx.GraphModule) else ()
    behind = f"{name}{SUFFIX}"
    return behind if any(node.name == behind for node in nodes) else name


def _unnormed(graph: fx.GraphModule) -> list[fx.Node]:
    """Layers that can have a norm: used once, with a bias, not read by a norm, and not what the output is made of."""
    layers = [node for node in graph.graph.nodes if _is_layer(graph, node)]
    return [
        node
        for node in layers[:-1]
        if _has_bias(graph, node)
        and used_once(graph, str(node.target))
        and not any(isinstance(get_module(graph, user), BATCH_NORMS) for user in node.users)
    ]


def _is_layer(graph: fx.GraphModule, node: fx.Node) -> bool:
    module = get_module(graph, node)
    return type(module) is nn.Conv2d or (type(module) is nn.Linear and is_flat(node))


def _has_bias(graph: fx.GraphModule, node: fx.Node) -> bool:
    return getattr(get_module(graph, node), "bias", None) is not None


def _insert(graph: fx.GraphModule, node: fx.Node) -> nn.Module:
    layer = get_module(graph, node)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    norm = (nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d)(len(layer.weight)).eval()
    path = f"{node.target}{SUFFIX}"
    graph.add_submodule(path, norm)
    with graph.graph.inserting_after(node):
        behind = graph.graph.create_node("call_module", path, (node,), name=f"{node.name}{SUFFIX}")
    node.replace_all_uses_with(behind, delete_user_cb=lambda user: user is not behind)
    return norm


def _settle(graph: fx.GraphModule, norms: Sequence[nn.Module], batches: Sequence[Tensor]) -> None:
    """Give every norm the statistics of what it is fed, and the scale and offset that undo them."""
    seen: dict[nn.Module, list[Tensor]] = {norm: [] for norm in norms}  # fresh norms hand on what they are given

    def note(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        rows = inputs[0].double().transpose(0, 1).flatten(1)
        count = torch.full_like(rows[:, 0], rows.shape[1])
        seen[norm].append(torch.stack([count, rows.sum(1), rows.square().sum(1)]))

    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        with torch.no_grad():
            for x in batches:
                graph(x)
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for norm in norms:
            count, total, squares = torch.stack(seen[norm]).sum(0)
            mean, square = total / count, squares / count
            variance = (square - mean.square()).clamp(min=0)
            norm.load_state_dict(
                {
                    "running_mean": mean,
                    "running_var": variance,
                    "weight": (variance + norm.eps).sqrt(),
                    "bias": mean,
                    "num_batches_tracked": torch.tensor(0),
                }
            )
