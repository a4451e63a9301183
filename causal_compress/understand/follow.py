"""From a module's code to a graph that computes the same: torch.fx follows it, and what it can't follow is left whole.

What fx says it followed is not believed before the graph has answered as the module does: code that asks what kind of
thing its input is, or writes into a view of an activation, is traced without an error into something else.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from causal_compress.results import Skip
from causal_compress.understand.graph import make_pure

_MOST_LEAVES = 50
_RELATIVE = 1e-3  # of the largest output; the graph makes the same calls in the same order
_OTHERWISE = "traced by torch.fx it answers otherwise: it asks what its input is, or writes into a view; left whole"


class _LeafTracer(fx.Tracer):
    """A tracer that treats named modules as leaves and remembers in which module tracing failed."""

    def __init__(self, leaves: Collection[str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.failed: str | None = None

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """One placeholder: all that `forward` takes besides its input keeps its default, as when it is called.

        The module is called, not its class's `forward`: hooks and a `forward` of its own are part of what it does.
        """
        del root_fn, is_module, concrete_args
        assert isinstance(self.root, nn.Module)
        name = next(iter(inspect.signature(self.root.forward).parameters))
        return lambda root, x: root(x), [self.root, self.create_proxy("placeholder", name, (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m is self.root:
            return False
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None and m is not self.root:
                self.failed = self.path_of_module(m)
            raise


def follow(model: nn.Module, example: Tensor) -> tuple[fx.GraphModule, tuple[Skip, ...]]:
    """A graph without in-place operations that answers as the model does.

    Args:
        model: In evaluation mode, of one input tensor; the graph shares its parameters.
        example: At least two inputs; left as they are, whatever the model does to its own.

    Returns:
        The graph, and what it holds as opaque modules, with reasons: the smallest that fx can't follow, if need be the
        whole model.
    """
    seen = _watch(model, example)
    flags = [(module, module.inplace) for module in model.modules() if hasattr(module, "inplace")]
    graph, skips = _trace(model, example, ())
    if seen[""].told_by(graph):
        return graph, skips
    wrong = _followed_wrongly(model, seen, skips)
    _restore(flags)
    graph, skips = _trace(model, example, (*skips, *(Skip(what=path, reason=_OTHERWISE) for path in wrong)))
    if seen[""].told_by(graph):
        return graph, skips
    _restore(flags)
    return _pure(_opaque(model), example), (Skip(what="the whole model", reason=_OTHERWISE),)


def _restore(flags: Sequence[tuple[nn.Module, Any]]) -> None:
    """Modules work in place again as they did before they became part of a graph."""
    for module, inplace in flags:
        module.__dict__["inplace"] = inplace


def _trace(model: nn.Module, example: Tensor, known: tuple[Skip, ...]) -> tuple[fx.GraphModule, tuple[Skip, ...]]:
    """As fx follows it, modules at which it fails left whole beside those known to need it."""
    skips = list(known)
    for _ in range(_MOST_LEAVES):
        leaves = {skip.what for skip in skips}
        tracer = _LeafTracer(leaves)
        try:
            return _pure(fx.GraphModule(model, tracer.trace(model)), example), tuple(skips)
        except Exception as error:
            reason = (
                f"torch.fx can't follow it ({type(error).__name__}: {str(error).splitlines()[0][:120]}); left whole"
            )
            if tracer.failed is None or tracer.failed in leaves:
                skips.append(Skip(what="the whole model", reason=reason))
                break
            skips.append(Skip(what=tracer.failed, reason=reason))
    return _pure(_opaque(model), example), tuple(skips)


def _opaque(model: nn.Module) -> fx.GraphModule:
    """A graph that calls the model and does nothing else."""
    whole = nn.Module()
    whole.add_module("model", model)
    graph = fx.Graph()
    graph.output(graph.call_module("model", (graph.placeholder("x"),)))
    return fx.GraphModule(whole, graph)


class _Overwriting(ShapeProp):
    """Propagates shapes, and notes which modules change a tensor that they are given."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: list[nn.Module] = []

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        before = [tensor._version for tensor in tensors]
        result = super().call_module(target, args, kwargs)
        if before != [tensor._version for tensor in tensors]:
            self.found.append(self.module.get_submodule(str(target)))
        return result


def _copied(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook: the module works on copies of its inputs."""
    del module
    return tuple(map(_copy, args)), {name: _copy(value) for name, value in kwargs.items()}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _pure(graph: fx.GraphModule, example: Tensor) -> fx.GraphModule:
    """The graph with nothing left in place; opaque modules that overwrite their inputs are given copies."""
    run = _Overwriting(graph)
    with torch.no_grad():
        run.propagate(example.clone())  # the model may overwrite its input
    for module in run.found:
        if not hasattr(module, "inplace"):  # those are made pure as they are
            module.register_forward_pre_hook(_copied, with_kwargs=True)
    make_pure(graph)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


@dataclass(frozen=True)
class _Seen:
    """What a module was given when the model ran, and what it made of it."""

    given: Tensor
    answer: Any

    def told_by(self, graph: nn.Module) -> bool:
        """Whether the graph answers the same."""
        ours, wanted = _answer(graph, self.given), self.answer
        if not (isinstance(ours, Tensor) and isinstance(wanted, Tensor) and ours.shape == wanted.shape):
            return False
        sizes = wanted.detach().abs().nan_to_num(0.0, 0.0, 0.0)
        scale = sizes.max().item() if sizes.numel() else 0.0
        return torch.allclose(ours, wanted, rtol=_RELATIVE, atol=_RELATIVE * scale, equal_nan=True)


def _watch(model: nn.Module, example: Tensor) -> dict[str, _Seen]:
    """What every module that takes one tensor does in its first call, by path; the model's own is "".

    It is seen before anything is traced: a module that no longer works in place can change what its model answers.
    """
    given: dict[str, Tensor] = {}
    seen: dict[str, _Seen] = {}

    def before(path: str, args: tuple[Any, ...]) -> None:
        if path not in seen and len(args) == 1 and isinstance(args[0], Tensor):
            given[path] = args[0].clone()

    def after(path: str, answer: Any) -> None:
        if path in given and path not in seen:
            seen[path] = _Seen(given[path], _copy(answer))

    hooks = []
    for path, module in model.named_modules():
        if path:
            hooks.append(module.register_forward_pre_hook(lambda _, args, path=path: before(path, args)))
            hooks.append(module.register_forward_hook(lambda _, args, answer, path=path: after(path, answer)))
    try:
        seen[""] = _Seen(example, _answer(model, example))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _answer(model: nn.Module, x: Tensor) -> Any:
    """What a module makes of inputs; chance (a dropout that never rests) is the same each time."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(x.clone())


def _followed_wrongly(model: nn.Module, seen: Mapping[str, _Seen], skips: Sequence[Skip]) -> list[str]:
    """The smallest modules that answer otherwise when traced, by path."""
    leaves = [skip.what for skip in skips]
    wrong: list[str] = []
    for path, module in reversed(list(model.named_modules())):  # what is inside comes first
        if path not in seen or not path or fx.Tracer().is_leaf_module(module, path):
            continue
        inside = {leaf.removeprefix(f"{path}.") for leaf in (*leaves, *wrong) if leaf.startswith(f"{path}.")}
        try:
            graph = _pure(fx.GraphModule(module, _LeafTracer(inside).trace(module)), seen[path].given)
            followed = seen[path].told_by(graph)
        except Exception:  # what can't be traced is left whole for that, or called in another way
            continue
        if not followed:
            wrong.append(path)
    return wrong
