"""What a runtime needs and whether it is here: the refusals, each with the command that installs what is absent."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Any, Literal

from causal_compress.errors import MissingPackageError
from causal_compress.recipe import RuntimeName

Provider = Literal["CPU", "CUDA", "Tensorrt"]

PROVIDERS: dict[RuntimeName, Provider] = {
    "onnxruntime": "CPU",
    "onnxruntime-cuda": "CUDA",
    "onnxruntime-tensorrt": "Tensorrt",
}
"""Runtimes that are ONNX Runtime, and what computes in each."""
_GPU_BUILD = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"


def absence(name: RuntimeName) -> MissingPackageError | None:
    """Why a runtime can't run here; nothing heavy is imported for packages that are not installed.

    Args:
        name: Which runtime.

    Returns:
        The error that opening it would raise, with the command that installs what is absent; None if all is here.
    """
    match name:
        case "torch":
            return None
        case "torch-compiled":
            return None if _compiler() else no_compiler("no C++ compiler on the PATH")
        case "openvino":
            return None if importlib.util.find_spec("openvino") else not_installed("OpenVINO", "openvino")
        case "tensorrt" | "tensorrt-rtx":
            if importlib.util.find_spec(name.replace("-", "_")) is None:
                return not_installed("TensorRT" if name == "tensorrt" else "TensorRT-RTX", name)
            return no_gpu(name)
        case _:
            wanted = f"{PROVIDERS[name]}ExecutionProvider"
            there = wanted in import_onnxruntime().get_available_providers()
            return None if there else no_provider(wanted)


def refuse_absent(names: Sequence[RuntimeName]) -> None:
    """Raises for the first runtime that can't run here.

    Args:
        names: Runtimes that will be measured.

    Raises:
        MissingPackageError: one is absent; the message has the command that installs it.
    """
    for name in names:
        if (error := absence(name)) is not None:
            raise error


def not_installed(what: str, extra: str) -> MissingPackageError:
    """The refusal of a package that is an extra of this one.

    Args:
        what: Its name for people.
        extra: Its name among the extras.

    Returns:
        To be raised.
    """
    remedy = f"pip install 'causal-compress[{extra}]'"
    return MissingPackageError(f"{what} is not installed", found=f"no package for runtime {extra}", remedy=remedy)


def no_gpu(name: str) -> MissingPackageError | None:
    """The refusal of a runtime that needs an NVIDIA GPU where there is none.

    Args:
        name: The runtime.

    Returns:
        To be raised; None where PyTorch reaches a GPU.
    """
    import torch

    if torch.cuda.is_available():
        return None
    return MissingPackageError(
        f"{name} can't run here",
        found=f"no NVIDIA GPU that torch {torch.__version__} can use",
        wanted="an NVIDIA GPU with its driver, and a CUDA build of torch, which holds inputs and outputs",
        remedy="run it on the machine with the GPU (engines can be built here with export --to tensorrt-rtx)",
    )


def import_onnxruntime() -> Any:
    """ONNX Runtime's module.

    Returns:
        `onnxruntime`.

    Raises:
        MissingPackageError: not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError(
            "ONNX Runtime is not installed",
            found=str(error),
            remedy="pip install onnxruntime, or set benchmark.runtimes to [torch]",
        ) from error
    return onnxruntime


def no_provider(wanted: str) -> MissingPackageError:
    """The refusal of an execution provider that this ONNX Runtime doesn't have.

    Args:
        wanted: Its name.

    Returns:
        To be raised.
    """
    return MissingPackageError(
        f"this ONNX Runtime can't use {wanted}",
        found="a build without it, or one whose GPU libraries can't be loaded",
        wanted="onnxruntime-gpu and an NVIDIA GPU with its driver",
        remedy=_GPU_BUILD,
    )


def no_compiler(found: str) -> MissingPackageError:
    """The refusal of compiled PyTorch.

    Args:
        found: What went wrong.

    Returns:
        To be raised.
    """
    return MissingPackageError(
        "nothing here can compile for torch-compiled",
        found=found,
        wanted="a C++ compiler",
        remedy="install one (Debian: apt-get install g++), or leave out the runtime torch-compiled",
    )


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")
