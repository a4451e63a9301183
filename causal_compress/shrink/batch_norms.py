"""Batch norm statistics of a student, taken anew from its own activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from causal_compress.understand.tail import BATCH_NORMS


def reestimate_batch_norms(graph: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Set running statistics to the average over chunks of inputs, every input with the same weight (in place).

    Args:
        graph: In evaluation mode afterwards.
        inputs: Chunks of two inputs or more.

    Returns:
        Whether there was any batch norm.
    """
    norms = [
        module for module in graph.modules() if isinstance(module, BATCH_NORMS) and module.running_mean is not None
    ]
    momenta = [norm.momentum for norm in norms]
    rows = dict.fromkeys(norms, 0)

    def weigh(norm: nn.BatchNorm2d, given: tuple[Tensor]) -> None:
        rows[norm] += len(given[0])
        norm.momentum = len(given[0]) / rows[norm]

    hooks = [norm.register_forward_pre_hook(weigh) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        with torch.no_grad():
            for x in inputs if norms else ():
                graph(x)
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    return bool(norms)
