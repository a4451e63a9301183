"""What a network costs: multiply-adds of one input, and parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from causal_compress.errors import TraceError


def count_params(model: nn.Module) -> int:
    """Number of parameters; shared ones once, buffers (batch-norm statistics) not at all.

    Args:
        model: Any network.

    Returns:
        Number of scalars.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """Multiply-adds that one input costs in evaluation mode.

    Args:
        model: Any network; left as it was, on its device.
        example_input: One or more inputs; only the first is used.

    Returns:
        MACs of convolutions, linears, matrix products and attention: PyTorch's floating-point operations, halved.

    Raises:
        TraceError: the network can't be run on the input.

    Source: torch.utils.flop_counter, whose convention is two operations for one multiply-add.
    Limits: element-wise operations, normalisation, pooling and `nn.Bilinear` are not counted; MACs are not speed.
    """
    counter = FlopCounterMode(display=False)
    try:
        # The counter knows matrix products but not the CPU's fused attention and recurrent layers.
        attention, recurrence = sdpa_kernel(SDPBackend.MATH), _plain_recurrence()
        with evaluating(model), plain_attention(), attention, recurrence, torch.no_grad(), counter:
            model(example_input[:1])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise TraceError(
            "the network can't be run on one input",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            wanted=f"a network that takes a batch of shape {tuple(example_input[:1].shape)}",
            remedy="check data.image_size, data.channels and the columns against the architecture",
        ) from error
    return int(counter.get_total_flops()) // 2


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards each module has its own mode again.

    Args:
        model: Any network; the flags are set directly, since exported graphs refuse `eval()`.

    Yields:
        Nothing.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention modules without their fused fast path, which is opaque to counters and exporters.

    Yields:
        Nothing.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _plain_recurrence() -> Iterator[None]:
    """Recurrent layers as the matrix products that they consist of."""
    before = torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(before[0])
