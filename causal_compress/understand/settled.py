"""Weights computed on each call (weight norm, spectral norm, pruning masks): a copy of the model with plain ones."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


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
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)


def _settle_parametrizations(module: nn.Module) -> None:
    """PyTorch's own `remove_parametrizations` would take them off the model's copies too, which share its classes."""
    names = [name for name, _ in module.get_submodule("parametrizations").named_children()]
    settled = {name: getattr(module, name).detach().clone() for name in names}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in settled.items():
        module.register_parameter(name, nn.Parameter(value))
