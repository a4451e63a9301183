"""Faster steps of the same training: loops fused by torch.compile on CPUs, passes recorded as CUDA graphs on GPUs.

Fused loops halve a step of a batch-normalised network on two cores. A GPU is done with a small network's layer before
Python has asked for the next one; what is recorded is asked for once.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from causal_compress.errors import MissingPackageError
from causal_compress.recipe import DistillSection

logger = logging.getLogger(__name__)

_WORTHWHILE_REPLAYS = 50  # recording takes about as long as ten steps
_COPIES = 4  # of what one pass needs, to be free before it is recorded: teacher, student with boundaries and without
_WORTHWHILE_STEPS = 2000  # compiling takes a minute on two cores and saves some 0.2 s a step


def is_compiled(section: DistillSection, *, steps: int, device: torch.device, processes: int) -> bool:
    """Whether training will be compiled, as the recipe says; `auto`: on CPUs, where it pays and a compiler is there.

    Args:
        section: Says `compile: auto`, true or false.
        steps: Optimizer steps of the whole run.
        device: Where it trains.
        processes: Gradients exchanged between processes are left as they are.

    Raises:
        MissingPackageError: asked for, but nothing here can compile.
    """
    if section.compile == "auto":
        return device.type == "cpu" and processes == 1 and steps >= _WORTHWHILE_STEPS and _fault(device.type) is None
    if section.compile and (fault := _fault(device.type)) is not None:
        raise MissingPackageError(
            "distill.compile: nothing here can compile",
            found=fault,
            wanted="a C++ compiler for CPUs (Debian: apt-get install g++), triton for CUDA",
            remedy="install one, or set distill.compile to auto or false",
        )
    return bool(section.compile)


@functools.cache
def _fault(device: str) -> str | None:
    """What goes wrong when something small is compiled, or None."""
    about_gpus = logging.getLogger("torch.utils.cpp_extension")  # warns of no CUDA runtime, whatever is compiled
    level = about_gpus.level
    about_gpus.setLevel(logging.ERROR if device == "cpu" else level)
    try:
        torch.compile(_small)(torch.ones(64, device=device))
    except Exception as error:  # whatever a toolchain can raise; the first line says what
        fault = str(error).strip().partition("\n")[0] or type(error).__name__
        logger.info("distill: training is not compiled (%s)", fault)
        return fault
    finally:
        about_gpus.setLevel(level)
    return None


def _small(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x * 2.0 + 1.0)


def compiled(network: nn.Module) -> nn.Module:
    """The network, compiled for the shapes it will see.

    Args:
        network: Its parameters stay where they are and go on being the ones that are trained.
    """
    return cast(nn.Module, torch.compile(network, dynamic=False))


def is_recorded(section: DistillSection, *, steps: int, device: torch.device, processes: int) -> bool:
    """Whether passes will be CUDA graphs: with `compile: auto`, by one process on a GPU.

    Args:
        section: Says `compile: auto`, true or false.
        steps: Optimizer steps of the whole run.
        device: Where it trains.
        processes: Gradients exchanged between processes are left as they are.
    """
    return section.compile == "auto" and device.type == "cuda" and processes == 1 and steps >= _WORTHWHILE_REPLAYS


def record(network: nn.Module, example: torch.Tensor, precision: Callable[[], AbstractContextManager[Any]]) -> bool:
    """Records a network's pass forwards, and backwards where it is trained, to be replayed from then on.

    In the mode that it is in now and for inputs like the example; in the other mode it goes on as before. One that
    waits for the GPU midway, or that fills much of its memory, is left as it was.

    Args:
        network: On a GPU; its forward is replaced. What it answers is overwritten when it answers the next time.
        example: A whole batch as it will come, (samples, ...); its values don't matter, but statistics see them.
        precision: Makes the context to compute in, without a cache of weights.

    Returns:
        Whether it was recorded.
    """
    kept = _Kept.of(network)
    stream = torch.cuda.current_stream(example.device)
    try:
        with torch.cuda.device_of(example), precision(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="The CUDA Graph is empty")
            warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")  # it is another on purpose
            if not _is_suited(network, example) or kept.replaced():
                return False
            _refuse_waiting(network, example)
            torch.cuda.make_graphed_callables(network, (example,), allow_unused_input=True)
    except Exception as error:  # whatever a layer raises that may not be recorded
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        logger.info("distill: steps are not recorded (%s)", why)
        torch.cuda.set_stream(stream)  # a capture that failed leaves its own
        torch.cuda.synchronize()
        return False
    finally:
        kept.put_back()
    return True


@dataclass(frozen=True)
class _Kept:
    """A network's buffers as they were: batch norms look at whatever comes past, and some layers replace theirs."""

    entries: tuple[tuple[nn.Module, str, torch.Tensor, torch.Tensor], ...]

    @classmethod
    def of(cls, network: nn.Module) -> _Kept:
        """The buffers as they are now, and copies of them."""
        found = ((owner, name, value) for owner in network.modules() for name, value in owner._buffers.items())
        return cls(tuple((owner, name, value, value.clone()) for owner, name, value in found if value is not None))

    def replaced(self) -> bool:
        """Whether one is another tensor by now: a replay would go on reading the old one."""
        return any(owner._buffers[name] is not value for owner, name, value, _ in self.entries)

    def put_back(self) -> None:
        """The same tensors with the same numbers."""
        with torch.no_grad():
            for owner, name, value, before in self.entries:
                owner._buffers[name] = value
                value.copy_(before)


def _refuse_waiting(network: nn.Module, example: torch.Tensor) -> None:
    """Raises where a layer waits for the GPU, before a capture is spoilt by it: not all of that can be undone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        network(example)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _is_suited(network: nn.Module, example: torch.Tensor) -> bool:
    """Whether each weight has its own gradient, and the memory of some passes is free; what is recorded keeps it."""
    torch.cuda.reset_peak_memory_stats(example.device)
    before = torch.cuda.memory_allocated(example.device)
    shared = shares_gradients(network, example)
    needed = torch.cuda.max_memory_allocated(example.device) - before
    return not shared and _COPIES * needed < torch.cuda.mem_get_info(example.device)[0]


def shares_gradients(network: nn.Module, example: torch.Tensor) -> bool:
    """Whether some weights are given one gradient between them, as those that are only added up are.

    A replay hands it out as it is, and clipping in place would shrink it twice.

    Args:
        network: May be frozen; its buffers see the example.
        example: A batch, (samples, ...).
    """
    outputs = network(example)
    trained = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        return False
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    found = torch.autograd.grad(logits.sum(), trained, allow_unused=True)
    places = [gradient.data_ptr() for gradient in found if gradient is not None and gradient.numel()]
    return len(set(places)) < len(places)
