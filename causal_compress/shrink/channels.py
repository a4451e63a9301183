"""Channel groups: which channels can only go together. The only importer of torch_pruning.

torch-pruning says what is coupled; what goes, and how its readers are repaired, is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from causal_compress.results import Keep, Skip
from causal_compress.understand.tail import is_affine
from causal_compress.understand.trace import HEAVY

logger = logging.getLogger(__name__)

_NARROWED = (nn.Conv2d, nn.Linear)
_PASSING = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)


@dataclass(frozen=True)
class Reader:
    """An affine layer that reads a group: the layer's path and, for each channel, its input positions."""

    layer: str
    positions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that go together: whoever writes, passes on and reads them.

    Attributes:
        producer: Path of the layer that names the group.
        channels: How many channels it has.
        writers: Layers whose outputs shrink (producer first).
        passing: Layers in between whose channels shrink alike (batch norms, depthwise convolutions).
        readers: Affine layers whose inputs shrink.
    """

    producer: str
    channels: int
    writers: tuple[str, ...]
    passing: tuple[str, ...]
    readers: tuple[Reader, ...]


def find_groups(graph: fx.GraphModule, example_input: Tensor) -> tuple[tuple[ChannelGroup, ...], tuple[Skip, ...]]:
    """All channel groups of a network whose readers can be repaired in closed form.

    Args:
        graph: A traced network; left as it is.
        example_input: At least one input.

    Returns:
        Groups in graph order, and what can't be narrowed with the reason. The classifier's outputs are never a group.
    """
    paths = {id(module): path for path, module in graph.named_modules()}
    dependencies = dependencies_of(graph, example_input)
    order = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    roots = [path for path in dict.fromkeys(order) if type(graph.get_submodule(path)) in _NARROWED]
    groups: list[ChannelGroup] = []
    skips = [
        Skip(what=f"width of {path}", reason=f"the inside of a {type(module).__name__} is not narrowed")
        for path in dict.fromkeys(order)
        if isinstance(module := graph.get_submodule(path), HEAVY) and type(module) not in _NARROWED
    ]
    grouped: set[str] = set()
    for path in roots[:-1]:
        if path in grouped:
            continue
        found = _describe(dependencies, graph, path, paths)
        if isinstance(found, str):
            skips.append(Skip(what=f"width of {path}", reason=found))
            continue
        grouped.update(found.writers)
        groups.append(found)
    return tuple(groups), tuple(skips)


def dependencies_of(graph: fx.GraphModule, example_input: Tensor) -> Any:
    """torch-pruning's dependency graph of a network; opaque, for `remove_channels`."""
    import torch_pruning as tp

    with torch.enable_grad(), _quiet():
        return tp.DependencyGraph().build_dependency(
            graph,
            example_inputs=(example_input[:1],),
            ignored_layers=[],
            customized_pruners={},
            ignored_params=[],
            verbose=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _pruning_group(dependencies: Any, module: nn.Module, channels: list[int]) -> Any:
    import torch_pruning as tp

    prune = tp.prune_conv_out_channels if isinstance(module, nn.Conv2d) else tp.prune_linear_out_channels
    return dependencies.get_pruning_group(module, prune, idxs=channels)


def _describe(dependencies: Any, graph: fx.GraphModule, path: str, paths: dict[int, str]) -> ChannelGroup | str:
    module = graph.get_submodule(path)
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "a grouped convolution passes channels on; the group of its source decides"
    channels = len(module.weight)  # type: ignore[arg-type]
    try:
        items = list(_pruning_group(dependencies, module, list(range(channels))))
    except Exception as error:  # torch-pruning raises whatever its handlers meet
        return f"torch-pruning can't follow its channels ({type(error).__name__}: {str(error)[:80]})"
    found: dict[str, list[Any]] = {"writer": [path], "passing": [], "reader": [], "operation": []}
    for dependency, positions in items:
        target = paths.get(id(dependency.target.module))
        role = _role(dependencies, dependency, target)
        if role == "foreign":
            return f"its channels reach {_foreign(dependency.target, target)}, which can't be narrowed"
        found[role].append((str(target), list(positions)) if role == "reader" else str(target))
    return _readable(path, channels, found)


def _readable(path: str, channels: int, found: dict[str, list[Any]]) -> ChannelGroup | str:
    """The group, if every reader can be told which of its inputs belong to which channel."""
    mixed = next((layer for layer, positions in found["reader"] if len(positions) % channels), None)
    if mixed is not None:
        return f"its channels are mixed before {mixed}"
    readers = tuple(_reader(layer, positions, channels) for layer, positions in found["reader"])
    if len({reader.layer for reader in readers}) != len(readers):
        return "a layer reads its channels twice"
    if not readers:
        return "no layer that can be refitted reads its channels"
    return ChannelGroup(
        path, channels, tuple(dict.fromkeys(found["writer"])), tuple(dict.fromkeys(found["passing"])), readers
    )


def _reader(layer: str, positions: list[int], channels: int) -> Reader:
    each = len(positions) // channels
    return Reader(layer, tuple(tuple(map(int, positions[i * each : (i + 1) * each])) for i in range(channels)))


def _role(dependencies: Any, dependency: Any, target: str | None) -> str:
    module, handler = dependency.target.module, dependency.handler
    if target is None:
        harmless = type(module).__module__.startswith("torch_pruning") and not isinstance(module, nn.Parameter)
        return "operation" if harmless else "foreign"
    if isinstance(module, _PASSING):
        return "passing"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "passing" if module.groups == module.in_channels == module.out_channels else "foreign"
    if is_affine(module):
        return "writer" if dependencies.is_out_channel_pruning_fn(handler) else "reader"
    return "operation" if next(module.parameters(), None) is None else "foreign"


def _foreign(node: Any, path: str | None) -> str:
    """A node that can't be narrowed, in a reader's words."""
    if isinstance(node.module, nn.Parameter):
        return f"a bare parameter of shape {tuple(node.module.shape)}"
    kind = type(node.module).__name__
    return kind if path is None else f"{path} ({kind})"


def remove_channels(graph: fx.GraphModule, dependencies: Any, keep: Keep) -> None:
    """Take channels out of a graph for good.

    Args:
        graph: Changed in place: weights are cut, none is refitted.
        dependencies: From `dependencies_of(graph, ...)`; stays valid for further removals.
        keep: The producer and the output channels that stay.
    """
    module = graph.get_submodule(keep.producer)
    stays = set(keep.channels)
    gone = [channel for channel in range(len(module.weight)) if channel not in stays]  # type: ignore[arg-type]
    if gone:
        with _quiet():
            _pruning_group(dependencies, module, gone).prune()
