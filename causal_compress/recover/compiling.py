"""Compiled training: loops fused by torch.compile, which halves a step of a batch-normalised network on CPUs."""

from __future__ import annotations

import functools
import logging
from typing import cast

import torch
from torch import nn

from causal_compress.errors import MissingPackageError
from causal_compress.recipe import DistillSection

logger = logging.getLogger(__name__)

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
    try:
        torch.compile(_small)(torch.ones(64, device=device))
    except Exception as error:  # whatever a toolchain can raise; the first line says what
        fault = str(error).strip().partition("\n")[0] or type(error).__name__
        logger.info("distill: training is not compiled (%s)", fault)
        return fault
    return None


def _small(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x * 2.0 + 1.0)


def compiled(network: nn.Module) -> nn.Module:
    """The network, compiled for the shapes it will see.

    Args:
        network: Its parameters stay where they are and go on being the ones that are trained.
    """
    return cast(nn.Module, torch.compile(network, dynamic=False))
