"""Channel groups: which channels can only go together. The only importer of torch_pruning.

torch-pruning says what is coupled, and every word of it is tried out on a copy of the network before it is believed;
what goes, and how its readers are repaired, is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from causal_compress.results import Keep, Skip
from causal_compress.understand.graph import ends, fetch, get_module, observer
from causal_compress.understand.tail import is_affine
from causal_compress.understand.trace import HEAVY

logger = logging.getLogger(__name__)

_NARROWED = (nn.Conv2d, nn.Linear)
_PASSING = (nn.modules.batchnorm._NormBase, nn.PReLU)
_NORMS_ACROSS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_NORM_FUNCTIONS = ("layer_norm", "group_norm", "rms_norm", "local_response_norm", "normalize")
_ACROSS = "its norm is taken over these channels"
_MOST_POSITIONS, _MOST_DEPENDENCIES = 500_000, 10_000  # VGG's flattened channels are 25,088 positions
_TRIED_INPUTS = 4
_ROUNDING = 1e-3  # relative; ten architectures: at most 1.1e-6 by rounding; one pair swapped of 2048: about 3e-2


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
        Groups in graph order, and what can't be narrowed with the reason. The classifier's outputs are never a group;
        a group is all that its writers write and its readers read, so concatenated channels are none.
    """
    order = list(dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "call_module"))
    roots = [path for path in order if type(graph.get_submodule(path)) in _NARROWED]
    skips = [
        Skip(what=f"width of {path}", reason=f"the inside of a {type(module).__name__} is not narrowed")
        for path in order
        if isinstance(module := graph.get_submodule(path), HEAVY) and type(module) not in _NARROWED
    ]
    try:
        trial = _open_trial(graph, example_input)
    except Exception as error:  # torch-pruning raises whatever its handlers meet
        reason = f"torch-pruning can't follow the network ({_words(error)})"
        return (), (*skips, *(Skip(what=f"width of {path}", reason=reason) for path in roots[:-1]))
    groups, refused = _describe_all(trial, roots[:-1])
    faults = _faults(graph, example_input, groups, trial)
    while faults:  # those that are left are tried out together once more
        refused |= faults
        groups = [group for group in groups if group.producer not in faults]
        faults = _faults(graph, example_input, groups)
    beside = [(group, why) for group in groups if (why := _beside_others(graph, group))]
    refused |= {group.producer: why for group, why in beside}
    groups = [group for group in groups if group.producer not in refused]
    skips += [Skip(what=f"width of {producer}", reason=reason) for producer, reason in refused.items()]
    return tuple(groups), tuple(skips)


def dependencies_of(graph: fx.GraphModule, example_input: Tensor) -> Any:
    """torch-pruning's dependency graph of a network, for `remove_channels`; None where it has none, nor any group."""
    try:
        return _dependencies(graph, example_input)
    except Exception as error:  # `find_groups` says so to the user
        logger.debug("torch-pruning can't follow the network: %s", _words(error))
        return None


def _dependencies(graph: fx.GraphModule, example_input: Tensor) -> Any:
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


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _pruning_group(dependencies: Any, module: nn.Module, channels: list[int]) -> Any:
    import torch_pruning as tp

    prune = tp.prune_conv_out_channels if isinstance(module, nn.Conv2d) else tp.prune_linear_out_channels
    with _bounded():
        return dependencies.get_pruning_group(module, prune, idxs=channels)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Ends torch-pruning's search where its lists explode, as they do where patches are merged (Swin)."""
    from torch_pruning.dependency.group import Group

    def add_dep(self: Any, dep: Any, idxs: Any) -> None:
        if len(idxs) > _MOST_POSITIONS or len(self) > _MOST_DEPENDENCIES:
            raise OverflowError("its lists of positions grow without end")
        plain(self, dep, idxs)

    plain, Group.add_dep = Group.add_dep, add_dep
    try:
        yield
    finally:
        Group.add_dep = plain


def _describe_all(trial: _Trial, roots: Sequence[str]) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups that torch-pruning finds, none of them tried out, and why there is none of other producers."""
    paths = {id(module): path for path, module in trial.graph.named_modules()}
    groups: list[ChannelGroup] = []
    refused: dict[str, str] = {}
    grouped: set[str] = set()
    for path in roots:
        if path in grouped:
            continue
        found = _describe(trial.dependencies, trial.graph, path, paths)
        if isinstance(found, str):
            refused[path] = found
            continue
        grouped.update(found.writers)
        groups.append(found)
    return groups, refused


def _describe(dependencies: Any, graph: fx.GraphModule, path: str, paths: dict[int, str]) -> ChannelGroup | str:
    module = graph.get_submodule(path)
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "a grouped convolution passes channels on; the group of its source decides"
    channels = len(module.weight)  # type: ignore[arg-type]
    if channels == 1:
        return "it has one channel"
    try:
        items = list(_pruning_group(dependencies, module, list(range(channels))))
    except Exception as error:  # torch-pruning raises whatever its handlers meet
        return f"torch-pruning can't follow its channels ({_words(error)})"
    found: dict[str, list[Any]] = {"writer": [path], "passing": [], "reader": [], "operation": []}
    for dependency, positions in items:
        target = paths.get(id(dependency.target.module))
        role = _role(dependencies, dependency, target)
        if role == "foreign":
            return f"its channels reach {_foreign(dependency.target, target)}"
        found[role].append((str(target), list(positions)) if role == "reader" else str(target))
    mixed = [layer for layer, to in found["reader"] if len(to) % channels or max(to) >= _inputs(graph, layer)]
    return _reordered(mixed[0]) if mixed else _readable(path, channels, found)


def _inputs(graph: fx.GraphModule, layer: str) -> int:
    return int(graph.get_submodule(layer).weight.shape[1])  # type: ignore[index]


def _reordered(before: str) -> str:
    return f"its channels are reordered or mixed before {before}"


def _readable(path: str, channels: int, found: dict[str, list[Any]]) -> ChannelGroup | str:
    """The group, if every layer that reads it can be refitted."""
    readers = tuple(_reader(layer, positions, channels) for layer, positions in found["reader"])
    if len({reader.layer for reader in readers}) != len(readers):
        return "a layer reads its channels twice"
    if not readers:
        return "no layer that can be refitted reads its channels"
    if both := [reader.layer for reader in readers if reader.layer in found["writer"]]:
        return f"{both[0]} both reads and writes its channels"
    return ChannelGroup(
        path, channels, tuple(dict.fromkeys(found["writer"])), tuple(dict.fromkeys(found["passing"])), readers
    )


def _beside_others(graph: fx.GraphModule, group: ChannelGroup) -> str | None:
    """Why a group is not all that its layers read and write, or None: whoever narrows and refits takes it for that."""
    for reader in group.readers:
        if sum(map(len, reader.positions)) != _inputs(graph, reader.layer):
            return f"{reader.layer} reads other channels beside them"
    for layer in group.writers:
        if len(weight := fetch(graph, layer).weight) != group.channels:
            return f"its {group.channels} channels are added to {len(weight)} of {layer}"
    return None


def _reader(layer: str, positions: list[int], channels: int) -> Reader:
    each = len(positions) // channels
    return Reader(layer, tuple(tuple(map(int, positions[i * each : (i + 1) * each])) for i in range(channels)))


def _role(dependencies: Any, dependency: Any, target: str | None) -> str:
    module, handler = dependency.target.module, dependency.handler
    if target is None:
        harmless = type(module).__module__.startswith("torch_pruning") and not isinstance(module, nn.Parameter)
        return "operation" if harmless else "foreign"
    if isinstance(module, _NORMS_ACROSS):
        return "foreign"
    if isinstance(module, _PASSING):
        return "passing"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "passing" if module.groups == module.in_channels == module.out_channels else "foreign"
    if is_affine(module):
        return "writer" if dependencies.is_out_channel_pruning_fn(handler) else "reader"
    return "operation" if next(module.parameters(), None) is None else "foreign"


def _foreign(node: Any, path: str | None) -> str:
    """A node that can't be narrowed, in a reader's words, and why."""
    if isinstance(node.module, nn.Parameter):
        return f"a bare parameter of shape {tuple(node.module.shape)}, which can't be narrowed"
    kind = type(node.module).__name__
    name = kind if path is None else f"{path} ({kind})"
    across = isinstance(node.module, _NORMS_ACROSS)
    return f"{name}: {_ACROSS}" if across else f"{name}, which can't be narrowed"


@dataclass(frozen=True)
class _Trial:
    """A copy of the network on which channels are taken out for good."""

    graph: fx.GraphModule
    dependencies: Any


def _open_trial(graph: fx.GraphModule, example_input: Tensor) -> _Trial:
    spare = copy.deepcopy(graph).eval()
    return _Trial(spare, _dependencies(spare, example_input))


def _faults(
    graph: fx.GraphModule, example_input: Tensor, groups: Sequence[ChannelGroup], trial: _Trial | None = None
) -> dict[str, str]:
    """Producer -> reason, of groups that torch-pruning is wrong about: some together first, then half of them each."""
    if not groups:
        return {}
    fault = _try_out(trial or _open_trial(graph, example_input), example_input[:_TRIED_INPUTS], groups)
    if fault is None:
        return {}
    if len(groups) == 1:
        return {groups[0].producer: fault}
    half = len(groups) // 2
    found = _faults(graph, example_input, groups[:half]) | _faults(graph, example_input, groups[half:])
    return found or {groups[-1].producer: fault}


@torch.no_grad()
def _try_out(trial: _Trial, x: Tensor, groups: Sequence[ChannelGroup]) -> str | None:
    """Why taking out some channels of each group is not the same as not reading them, or None.

    What surgery builds on: where every reader's weights at a channel's positions are zero, the channel can go, and each
    reader sees what it saw, less those positions. Norms over channels, other orders and mixtures break that; gates and
    sums do not, since what computes them reads as well.

    Args:
        trial: Used up.
        x: Some inputs.
        groups: Of which some channels are taken out.
    """
    gone = {group.producer: _some_channels(group.channels) for group in groups}
    columns = _forget(trial.graph, groups, gone)
    calls = [n for n in trial.graph.graph.nodes if n.op == "call_module" and str(n.target) in columns]
    layers = [str(node.target) for node in calls]
    watch = observer(trial.graph, [*(node.all_input_nodes[0] for node in calls), ends(trial.graph)[1]])
    *reads, output = watch(x)
    wanted = [
        _without(read, trial.graph.get_submodule(layer), columns[layer])
        for read, layer in zip(reads, layers, strict=True)
    ]
    try:
        for group in groups:
            kept = tuple(channel for channel in range(group.channels) if channel not in gone[group.producer])
            remove_channels(trial.graph, trial.dependencies, Keep(producer=group.producer, channels=kept))
        found = watch.forward(x)  # the call itself would print what goes wrong
    except Exception as error:  # whatever an operation says that can't do with fewer channels
        return _why(trial.graph, groups, None, f" ({_words(error)})")
    pairs = zip([*layers, "the output"], found, [*wanted, output], strict=True)
    wrong = next((layer for layer, now, before in pairs if not _same(now, before)), None)
    return None if wrong is None else _why(trial.graph, groups, wrong)


def _why(graph: fx.GraphModule, groups: Sequence[ChannelGroup], layer: str | None, error: str = "") -> str:
    """The reason against some groups.

    Args:
        graph: Their network.
        groups: Of which a reader sees something else, or the network fails.
        layer: The first that sees something else, where the network runs.
        error: What it fails with otherwise.
    """
    if (across := _norm_between(graph, groups)) is not None:
        return f"its channels reach {across}: {_ACROSS}"
    readers = list(dict.fromkeys(reader.layer for group in groups for reader in group.readers))
    return _reordered(layer or (readers[0] if len(readers) == 1 else "its readers")) + error


def _forget(graph: fx.GraphModule, groups: Sequence[ChannelGroup], gone: Mapping[str, set[int]]) -> dict[str, set[int]]:
    """Zero the weights that read some channels (in place); returns the input positions of each reader."""
    columns: dict[str, set[int]] = {}
    for group in groups:
        for reader in group.readers:
            mine = [position for channel in gone[group.producer] for position in reader.positions[channel]]
            graph.get_submodule(reader.layer).weight[:, mine] = 0.0  # type: ignore[operator]
            columns.setdefault(reader.layer, set()).update(mine)
    return columns


def _some_channels(channels: int) -> set[int]:
    """About a quarter of two or more channels, an odd number without pattern: no other order may look the same."""
    return set(random.Random(0).sample(range(channels), channels // 4 | 1))


def _without(x: Tensor, layer: nn.Module, positions: set[int]) -> Tensor:
    """A layer's input less some of its positions."""
    axis = -3 if isinstance(layer, nn.Conv2d) else -1
    stay = [position for position in range(x.shape[axis]) if position not in positions]
    return x.index_select(axis, torch.tensor(stay, dtype=torch.long, device=x.device))


def _same(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and float((found - wanted).norm()) <= _ROUNDING * float(wanted.norm())


def _norm_between(graph: fx.GraphModule, groups: Sequence[ChannelGroup]) -> str | None:
    """What takes a norm over several channels between writers and readers, or None."""
    readers = {reader.layer for group in groups for reader in group.readers}
    writers = {layer for group in groups for layer in group.writers}
    behind: set[fx.Node] = set()
    for node in graph.graph.nodes:
        follows = any(source in behind or str(source.target) in writers for source in node.all_input_nodes)
        if follows and str(node.target) not in readers:
            behind.add(node)
            if isinstance(get_module(graph, node), _NORMS_ACROSS):
                return str(node.target)
            if getattr(node.target, "__name__", "") in _NORM_FUNCTIONS:
                return str(node.name)
    return None


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
