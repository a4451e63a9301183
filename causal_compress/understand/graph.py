"""Surgery on torch.fx graphs that knows no recipe: cut a piece out, put pieces together, make ops pure."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_PURE_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def make_pure(graph: fx.GraphModule) -> None:
    """Replace in-place operations, so that an observed activation is never overwritten later.

    What read an overwritten value afterwards reads the operation's result instead, whether or not the code used it.

    Args:
        graph: Changed in place; it must be the caller's own copy. Shapes are propagated, no dead code is taken out yet.

    Limits: a value that is overwritten through a view of it is not followed.
    """
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    for node, position in order.items():
        if _overwrites(graph, node):
            _purify(node)
            source = node.all_input_nodes[0]
            if "tensor_meta" in source.meta:  # `n += 1` overwrites a tensor, but not a number
                source.replace_all_uses_with(node, lambda user, after=position: order[user] > after)
    for node in order:
        module = get_module(graph, node)
        if getattr(module, "inplace", None) is True:
            module.__dict__["inplace"] = False
    graph.recompile()


def _overwrites(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node changes its first input."""
    match node.op:
        case "call_module":
            return getattr(get_module(graph, node), "inplace", None) is True
        case "call_method":
            return _pure_name(str(node.target)) is not None
        case "call_function":
            return node.target in _PURE_OPERATORS or _pure_function(node) is not None or _inplace_argument(node) is True
    return False


def _purify(node: fx.Node) -> None:
    if node.op == "call_method":
        node.target = str(_pure_name(str(node.target)))
    elif node.op == "call_function" and _inplace_argument(node) is True:
        position = _inplace_position(node)
        node.args = tuple(value for index, value in enumerate(node.args) if index != position)
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    elif node.op == "call_function":
        node.target = _PURE_OPERATORS.get(node.target) or _pure_function(node) or node.target


def _pure_name(name: str) -> str | None:
    """The method without the underscore that says "in place", where there is one."""
    pure = name.removesuffix("_")
    return pure if pure != name and not name.endswith("__") and callable(getattr(torch.Tensor, pure, None)) else None


def _pure_function(node: fx.Node) -> Any:
    name = getattr(node.target, "__name__", "")
    pure = name.removesuffix("_")
    if pure == name or name.endswith("__"):
        return None
    return getattr(torch, pure, None) or getattr(F, pure, None)


def _inplace_position(node: fx.Node) -> int | None:
    try:
        return list(inspect.signature(node.target).parameters).index("inplace")  # type: ignore[arg-type]
    except (ValueError, TypeError):  # a builtin without a signature, or no such argument
        return None


def _inplace_argument(node: fx.Node) -> Any:
    position = _inplace_position(node)
    given = position is not None and position < len(node.args)
    return node.args[position] if given else node.kwargs.get("inplace")  # type: ignore[index]


def get_module(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, or None."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def used_once(graph: fx.GraphModule, path: str) -> bool:
    """Whether one call is all that uses a module's parameters: no second call, no function that reads them, no twin.

    Args:
        graph: Holds the module.
        path: The module's.
    """
    paths = [str(node.target) for node in graph.graph.nodes if node.op in ("call_module", "get_attr")]
    if sum(other == path or other.startswith(f"{path}.") for other in paths) != 1:
        return False
    own = {id(parameter) for parameter in graph.get_submodule(path).parameters()}
    return not any(id(parameter) in own for other in set(paths) - {path} for parameter in _parameters(graph, other))


def _parameters(graph: fx.GraphModule, path: str) -> Iterable[Tensor]:
    found = fetch(graph, path)
    return found.parameters() if isinstance(found, nn.Module) else [found]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape that propagation noted for a node's value; empty where it holds no single tensor."""
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def ancestors(node: fx.Node, until: fx.Node | None = None) -> set[fx.Node]:
    """All nodes that `node` depends on, without itself; of `until` and what lies behind it only what others read."""
    seen: set[fx.Node] = set()
    stack = [] if node is until else list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current not in seen and current is not until:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return seen


def extract(graph: fx.GraphModule, entry: fx.Node, exit_: fx.Node) -> fx.GraphModule:
    """The piece of a graph that computes `exit_` from `entry`, as a module of one input.

    Args:
        graph: Left as it is; the piece shares its modules and parameters. What depends on no input (a parameter, what
            is computed from it) is part of every piece that needs it.
        entry: Every path to `exit_` that starts at an input passes through it.
        exit_: The piece's output; may be `entry`.

    Raises:
        ValueError: a path to `exit_` goes around `entry`.
    """
    inside = ancestors(exit_, until=entry) | ({exit_} - {entry})
    piece = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {entry: piece.placeholder("x")}
    for node in graph.graph.nodes:
        if node in inside:
            if node.op == "placeholder":
                raise ValueError(f"{exit_.name} does not depend on {entry.name} alone")
            mapping[node] = piece.node_copy(node, lambda source: mapping[source])
    piece.output(mapping[exit_])
    return fx.GraphModule(graph, piece)


def compose(parts: Sequence[fx.GraphModule]) -> fx.GraphModule:
    """One graph that runs the parts one after the other, sharing their modules and parameters.

    Args:
        parts: Modules of one input and one output; a module's path names the same object wherever it occurs.
    """
    return compose_with_ends(parts)[0]


def compose_with_ends(parts: Sequence[fx.GraphModule]) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """As `compose`, with the name of the node that ends each part."""
    whole = fx.Graph()
    names: list[str] = []
    attributes: dict[str, Any] = {}
    value = whole.placeholder("x")
    for part in parts:
        mapping: dict[fx.Node, fx.Node] = {}
        for node in part.graph.nodes:
            if node.op == "placeholder":
                mapping[node] = value
            elif node.op == "output":
                value = mapping[node.args[0]]
                names.append(value.name)
            else:
                mapping[node] = whole.node_copy(node, mapping.__getitem__)
                if node.op in ("call_module", "get_attr"):
                    attributes[str(node.target)] = fetch(part, str(node.target))
    whole.output(value)
    return fx.GraphModule(attributes, whole), tuple(names)


def fetch(module: nn.Module, path: str) -> Any:
    """The module, parameter or buffer at a dotted path."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def common_name(modules: Iterable[str], fallback: str) -> str:
    """The dotted prefix that module paths share; the path itself where there is one, `fallback` where there is none."""
    split = [path.split(".") for path in modules]
    if not split:
        return fallback
    shared: list[str] = []
    for level in zip(*split, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared) or split[0][0]


def run_in_chunks(module: nn.Module, x: Tensor, size: int = 128) -> Tensor:
    """Apply a module row-chunk by row-chunk, without gradients: bounds the memory of what lies inside."""
    with torch.no_grad():
        return torch.cat([module(chunk) for chunk in x.split(size)])


def observer(piece: fx.GraphModule, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """A module that returns the values of several nodes of a piece as a tuple, computed in one pass.

    Args:
        piece: A module of one input; left as it is, its modules and parameters are shared.
        nodes: Nodes of its graph.
    """
    wanted: set[fx.Node] = set(nodes)
    for node in nodes:
        wanted |= ancestors(node)
    seen = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in piece.graph.nodes:
        if node in wanted or node.op == "placeholder":
            mapping[node] = seen.node_copy(node, lambda source: mapping[source])
    seen.output(tuple(mapping[node] for node in nodes))
    return fx.GraphModule(piece, seen)


def ends(piece: fx.GraphModule) -> tuple[fx.Node, fx.Node]:
    """A piece's placeholder and the node that it returns."""
    entry = next(node for node in piece.graph.nodes if node.op == "placeholder")
    exit_ = next(node for node in piece.graph.nodes if node.op == "output").args[0]
    assert isinstance(exit_, fx.Node)
    return entry, exit_
