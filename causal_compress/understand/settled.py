"""Weights as surgery wants them: plain ones, none of them computed on each call, and each used in one place."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from causal_compress.results import Skip
from causal_compress.understand.graph import fetch

_NOTE = "its weights are used in {} places; the smaller network holds them apart, each to be changed by itself"
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def settled_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode; its weights are the parameters they are computed to be in that mode.

    Args:
        model: Left unchanged. Parametrizations and the older forward hooks of `torch.nn.utils` (`weight_norm`,
            `spectral_norm`, `prune`) are settled.
    """
    twin = copy.deepcopy(model, _computed_tensors(model)).eval()
    for module in list(twin.modules()):
        _settle_hooks(module)
        if parametrize.is_parametrized(module):
            _settle_parametrizations(module)
    return twin


def _computed_tensors(model: nn.Module) -> dict[int, object]:
    """Copies of what hooks left on modules as plain attributes: PyTorch itself refuses to copy results of a graph.

    Returns:
        From each tensor's id to its copy, as `copy.deepcopy` takes what it needn't copy any more.
    """
    left = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return {id(tensor): tensor.detach().clone() for tensor in left if not tensor.is_leaf}


def _settle_hooks(module: nn.Module) -> None:
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
            _forget_loading(module)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)


def _forget_loading(module: nn.Module) -> None:
    """What spectral norm does while weights are loaded; PyTorch wraps that hook and then no longer knows it again."""
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
            del hooks[key]


def _settle_parametrizations(module: nn.Module) -> None:
    """PyTorch's own `remove_parametrizations` would take them off the model's copies too, which share its classes."""
    names = [name for name, _ in module.get_submodule("parametrizations").named_children()]
    settled = {name: getattr(module, name).detach().clone() for name in names}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in settled.items():
        module.register_parameter(name, nn.Parameter(value))


@dataclass(frozen=True, eq=False)
class _Use:
    """One place where a network uses something of its own: a call of a layer, or a piece's reads of one tensor."""

    path: str
    value: Any
    nodes: list[fx.Node]

    def weights(self) -> set[int]:
        """Ids of the tensors that surgery and training change, a norm's statistics among them."""
        if isinstance(self.value, nn.Module):
            return {id(tensor) for tensor in (*self.value.parameters(), *self.value.buffers())}
        return {id(self.value)} if isinstance(self.value, nn.Parameter) else set()


def separated(pieces: Sequence[fx.GraphModule]) -> tuple[list[fx.GraphModule], tuple[Skip, ...]] | None:
    """Pieces that compute what they did with weights of their own, each used in one place only.

    Surgery changes each piece for itself. So every call of a layer gets a layer of its own, and so does every reader of
    a parameter: the smaller network may hold them apart, and has as many more parameters. A layer `rec` that is called
    twice becomes `rec.use1` and `rec.use2`, so that a pattern that names `rec` still speaks for both. What has no
    weights may be called anywhere. Batch norms get the scale and the shift that they can do without (1 and 0), because
    a refit writes them.

    Args:
        pieces: In order, as `extract` cuts them out; used up. Their modules are left as they are.

    Returns:
        The pieces and a note on each thing that was shared; None where nothing had to change.
    """
    uses = _uses(pieces)
    places = _places(uses)
    if not places and not any(_lacks_affine(use.value) for use in uses):
        return None
    own = _renamed(uses, set(places))
    notes = tuple(Skip(what=use.path, reason=_NOTE.format(count)) for use, count in places.items())
    return [_holding(own, piece) for piece in pieces], tuple(dict.fromkeys(notes))


def _uses(pieces: Sequence[fx.GraphModule]) -> list[_Use]:
    uses: list[_Use] = []
    for piece in pieces:
        reads: dict[str, _Use] = {}
        for node in piece.graph.nodes:
            path = str(node.target)
            if node.op == "call_module":
                uses.append(_Use(path, fetch(piece, path), [node]))
            elif node.op == "get_attr" and path in reads:
                reads[path].nodes.append(node)
            elif node.op == "get_attr":
                reads[path] = _Use(path, fetch(piece, path), [node])
                uses.append(reads[path])
    return uses


def _places(uses: Sequence[_Use]) -> dict[_Use, int]:
    """Those that share weights with another, and how many use the same ones."""
    counted = Counter(tensor for use in uses for tensor in use.weights())
    most = {use: max((counted[tensor] for tensor in use.weights()), default=0) for use in uses}
    return {use: count for use, count in most.items() if count > 1}


def _renamed(uses: Sequence[_Use], shared: set[_Use]) -> dict[str, Any]:
    """Give nodes that share weights a path of their own (in place); returns a copy of what is at each path."""
    own: dict[str, Any] = {}
    seen: Counter[str] = Counter()
    # how much is used at each path or inside of it: a layer can't stand where something else has to
    taken = Counter(around for use in uses for around in accumulate(f"{part}." for part in use.path.split(".")))
    for use in uses:
        seen[use.path] += 1
        path = use.path
        if use in shared and taken[f"{path}."] > 1:
            path = f"{path}.use{seen[path]}"
        if path not in own:
            own[path] = _with_affine(use.value) if _lacks_affine(use.value) else copy.deepcopy(use.value)
        for node in use.nodes:
            node.target = path
    return own


def _holding(own: dict[str, Any], piece: fx.GraphModule) -> fx.GraphModule:
    """A piece's graph over other modules and tensors, in evaluation mode."""
    paths = [str(node.target) for node in piece.graph.nodes if node.op in ("call_module", "get_attr")]
    return fx.GraphModule({path: own[path] for path in paths}, piece.graph).eval()


def _lacks_affine(module: Any) -> bool:
    """Whether it is a batch norm of known statistics without scale and shift."""
    return type(module) in _BATCH_NORMS and module.running_mean is not None and module.weight is None


def _with_affine(norm: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    twin = copy.deepcopy(norm)
    assert twin.running_mean is not None
    twin.affine = True
    twin.weight = nn.Parameter(torch.ones_like(twin.running_mean))
    twin.bias = nn.Parameter(torch.zeros_like(twin.running_mean))
    return twin
