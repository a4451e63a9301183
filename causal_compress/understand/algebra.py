"""Exact algebra: a network that computes the same with less, found before anything is measured.

Two things can be had for nothing. A pooling to more positions than it is given (an adaptive pooling repeats or mixes
what is there) can be left out when the linear layer behind it adds up its weights over the copies. And where every
channel of the input is a copy of the first, the first layer can read that one alone.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from causal_compress.results import Change, Fold
from causal_compress.understand.cost import count_macs, count_params
from causal_compress.understand.graph import get_module, shape_of, used_once
from causal_compress.understand.trace import Network, analyse

_PASSING = (nn.Flatten, nn.Dropout, nn.Identity)


def simplify(network: Network, *, repeated: int = 1, allowed: Callable[[str], bool] = lambda _: True) -> Network:
    """The network with everything folded that can be folded exactly; it remembers itself as it was in `teacher`.

    Args:
        network: As traced; left as it is.
        repeated: How many equal copies of its one channel every input holds; 1: nothing is known of that.
        allowed: Says of a layer's path whether it may change.

    Returns:
        The same network where there is nothing to fold.

    Limits: without its adaptive pooling a network takes inputs of the traced size only, and with one channel read it
        answers to the first alone.
    """
    # of the graph as it was traced: what has weights of its own in `graph` may share them there
    folds = [*_repeating_pools(network.teacher), *_copied_channels(network.teacher, repeated)]
    return folded(network, [fold for fold in folds if allowed(fold.layer)])


def folded(network: Network, folds: Sequence[Fold]) -> Network:
    """Carry out folds on the network as it was traced, without asking whether they are exact.

    Args:
        network: Left as it is; folds that it has already had are not counted.
        folds: From `simplify` on the same architecture.
    """
    if tuple(folds) == network.folds:
        return network
    original = network.teacher
    if not folds:
        return analyse(original, network.example_input, network.untraced)
    graph = copy.deepcopy(original)
    for fold in folds:
        _FOLDING[fold.kind](graph, fold)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    simple = analyse(graph, network.example_input, network.untraced)
    return replace(simple, original=original, folds=tuple(folds))


def saved(network: Network) -> tuple[int, int]:
    """MACs and parameters that the teacher has and the graph has not: fewer than none where that holds copies."""
    if network.original is None:
        return 0, 0
    x, graphs = network.example_input[:1], (network.teacher, network.graph)
    (macs, params), (macs_left, params_left) = ((count_macs(graph, x), count_params(graph)) for graph in graphs)
    return macs - macs_left, params - params_left


def told(folds: Sequence[Fold]) -> tuple[Change, ...]:
    """Folds as lines of the ledger: they do no harm, by construction."""
    why = {
        "pooling": "the pooling before it only repeats or mixes them",
        "channels": "the channels of every input are copies of the first",
    }
    return tuple(
        Change(
            node=fold.layer,
            what=f"reads {fold.kept:,} of {fold.inputs:,} inputs, because {why[fold.kind]} (exact)",
            evidence=None,
            predicted_harm_kl=0.0,
            measured_harm_kl=0.0,
            relative_error=None,
            penalty=None,
        )
        for fold in folds
    )


def _repeating_pools(graph: fx.GraphModule) -> list[Fold]:
    found = [(_reader_of_pool(graph, node), node) for node in graph.graph.nodes if _is_adaptive_pool(graph, node)]
    return [_pool_fold(linear, node) for linear, node in found if linear is not None]


def _pool_fold(linear: fx.Node, pool: fx.Node) -> Fold:
    channels, *before = shape_of(pool.all_input_nodes[0])[1:]
    _, *after = shape_of(pool)[1:]
    positions, copies = before[0] * before[1], after[0] * after[1]
    return Fold(layer=str(linear.target), kind="pooling", inputs=channels * copies, kept=channels * positions)


def _is_adaptive_pool(graph: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(get_module(graph, node), nn.AdaptiveAvgPool2d) or node.target is F.adaptive_avg_pool2d


def _reader_of_pool(graph: fx.GraphModule, pool: fx.Node) -> fx.Node | None:
    """The linear layer that alone reads a pooling to more positions than there are, or None."""
    before, after = shape_of(pool.all_input_nodes[0]), shape_of(pool)
    if len(before) != 4 or after[-2] * after[-1] <= before[-2] * before[-1]:
        return None
    node = pool
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = get_module(graph, node)
        if type(module) is nn.Linear:
            flat = shape_of(node.all_input_nodes[0])[1:] == (after[1] * after[2] * after[3],)
            return node if flat and used_once(graph, str(node.target)) else None
        if not (isinstance(module, _PASSING) or _flattens(node)):
            return None
    return None


def _flattens(node: fx.Node) -> bool:
    """Whether a function or method call makes one row of each input's values, however long that is."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method") or len(shape_of(node)) != 2:
        return False
    return name == "flatten" or (name in ("view", "reshape") and bool(node.args[-1] == -1))


def _leave_out_pool(graph: fx.GraphModule, fold: Fold) -> None:
    pools = [node for node in graph.graph.nodes if _is_adaptive_pool(graph, node)]
    pool = next(node for node in pools if (reader := _reader_of_pool(graph, node)) and reader.target == fold.layer)
    source = pool.all_input_nodes[0]
    height, width = shape_of(source)[-2:]
    positions = torch.eye(height * width).view(-1, 1, height, width)
    after = shape_of(pool)
    copies = F.adaptive_avg_pool2d(positions, (after[-2], after[-1])).flatten(1)  # (positions before, after)
    old = graph.get_submodule(fold.layer)
    assert isinstance(old, nn.Linear)
    with torch.no_grad():
        weight = old.weight.view(old.out_features, -1, copies.shape[1]) @ copies.T.to(old.weight)
    graph.set_submodule(fold.layer, _linear(weight.flatten(1), old.bias))
    pool.replace_all_uses_with(source)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer.eval()


def _copied_channels(graph: fx.GraphModule, repeated: int) -> list[Fold]:
    """The first convolution, if it alone reads the input and every channel is a copy of the first."""
    source = next(node for node in graph.graph.nodes if node.op == "placeholder")
    readers = list(source.users)
    layer = get_module(graph, readers[0]) if len(readers) == 1 else None
    if repeated < 2 or type(layer) is not nn.Conv2d or layer.groups != 1 or layer.in_channels != repeated:
        return []
    if not used_once(graph, str(readers[0].target)):
        return []
    return [Fold(layer=str(readers[0].target), kind="channels", inputs=repeated, kept=1)]


def _read_first_channel(graph: fx.GraphModule, fold: Fold) -> None:
    layer = graph.get_submodule(fold.layer)
    node = next(node for node in graph.graph.nodes if node.target == fold.layer)
    assert isinstance(layer, nn.Conv2d)
    with torch.no_grad():
        layer.weight = nn.Parameter(layer.weight.sum(1, keepdim=True))
    layer.in_channels = 1
    source = node.all_input_nodes[0]
    with graph.graph.inserting_before(node):
        first = graph.graph.call_function(operator.getitem, (source, (slice(None), slice(0, 1))))
    node.replace_input_with(source, first)


_FOLDING = {"pooling": _leave_out_pool, "channels": _read_first_channel}
