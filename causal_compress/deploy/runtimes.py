"""Where a model runs: one small class per runtime, all with the same two methods.

torch, onnxruntime, openvino and TensorRT are imported only by the runtime that needs them, so that the memory of one
is measured without the others in the process. What is absent is refused with the command that installs it; no runtime
falls back to another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

import causal_compress.recipe as recipe
from causal_compress.deploy.absent import PROVIDERS, Provider, import_onnxruntime, no_compiler, no_provider
from causal_compress.errors import ExportError, RunFolderError

if TYPE_CHECKING:
    from torch import nn

RuntimeName = recipe.RuntimeName

RUNTIMES: tuple[RuntimeName, ...] = (
    "torch",
    "torch-compiled",
    "onnxruntime",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
)


class Runtime(Protocol):
    """A loaded model on one runtime."""

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits, N x classes, of a batch of inputs, N x ... (normalised)."""
        ...

    def describe(self) -> str:
        """Runtime, version, device and threads, for people."""
        ...


@dataclass(frozen=True)
class TorchRuntime:
    """PyTorch without compilation, in inference mode, on the CPU.

    Args:
        model: A network in evaluation mode.

    Limits: the number of threads is PyTorch's own, for the whole process; see `torch_threads`.
    """

    model: nn.Module

    @staticmethod
    def load(path: Path) -> TorchRuntime:
        """Load a .pt2 file.

        Args:
            path: Written by `save_pt2`.

        Returns:
            The runtime.

        Raises:
            RunFolderError: missing or damaged.
        """
        from causal_compress.deploy.package import load

        return TorchRuntime(load(path))

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of a batch.

        Args:
            x: N x ..., normalised.

        Returns:
            N x classes.

        Raises:
            ExportError: inputs that the network can't take.
        """
        import torch

        try:
            with torch.inference_mode():
                logits: NDArray[np.float32] = self.model(torch.from_numpy(x)).numpy()
        except RuntimeError as error:
            raise _cant_run("PyTorch", x, error) from error
        return logits

    def describe(self) -> str:
        """Version, device and threads.

        Returns:
            One line for people.
        """
        import torch

        return f"torch {torch.__version__}, eager, CPU, {torch.get_num_threads()} thread(s)"


@dataclass(frozen=True)
class CompiledRuntime:
    """PyTorch compiled for each shape it meets (torch.compile), on the CPU.

    Args:
        compiled: A network in evaluation mode, given to torch.compile as one graph.

    Limits: the first batch of each shape takes half a minute; graph breaks and too many shapes are errors, because
        torch would go on uncompiled otherwise.
    """

    compiled: Any

    @staticmethod
    def of(model: nn.Module) -> CompiledRuntime:
        """Prepare a network; nothing is compiled before the first batch.

        Args:
            model: A network in evaluation mode.

        Returns:
            The runtime.
        """
        import torch

        return CompiledRuntime(torch.compile(model, dynamic=False, fullgraph=True))

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of a batch.

        Args:
            x: N x ..., normalised.

        Returns:
            N x classes.

        Raises:
            MissingPackageError: nothing here can compile.
            ExportError: inputs that the network can't take, or a network that can't be compiled whole.
        """
        import torch
        import torch._dynamo
        from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

        limits = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
        try:
            with torch.no_grad(), torch._dynamo.config.patch(limits):
                logits: NDArray[np.float32] = self.compiled(torch.from_numpy(x)).numpy()
        except (InvalidCxxCompiler, CppCompileError) as error:
            raise no_compiler(str(error).strip().partition("\n")[0]) from error
        except RuntimeError as error:
            raise _cant_run("torch.compile", x, error) from error
        return logits

    def describe(self) -> str:
        """Version, device and threads.

        Returns:
            One line for people.
        """
        import torch

        return f"torch-compiled {torch.__version__}, CPU, {torch.get_num_threads()} thread(s)"


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime, operators one after the other.

    Args:
        session: An onnxruntime.InferenceSession.
        threads: Threads inside an operator.
        provider: What computes.
    """

    session: Any
    threads: int
    provider: Provider = "CPU"

    @staticmethod
    def load(path: Path, *, threads: int = 1, provider: Provider = "CPU") -> OnnxRuntime:
        """Load an .onnx file.

        Args:
            path: The file.
            threads: Threads inside an operator.
            provider: What computes; the others are switched off.

        Returns:
            The runtime.

        Raises:
            MissingPackageError: onnxruntime is not installed, or without this provider.
            RunFolderError: the file is missing.
            ExportError: ONNX Runtime refuses the file.
        """
        if not path.is_file():
            raise RunFolderError(f"can't read the model {path}", found="no such file", remedy="run export first")
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        # Idle workers would otherwise spin on while the other model of an interleaved measurement runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        wanted = f"{provider}ExecutionProvider"
        if wanted not in onnxruntime.get_available_providers():
            raise no_provider(wanted)
        try:
            session = onnxruntime.InferenceSession(os.fspath(path), options, providers=[wanted])
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise ExportError(
                f"ONNX Runtime refuses {path.name}",
                found=str(error).splitlines()[0],
                remedy="try another export.opset, or update onnxruntime",
            ) from error
        if session.get_providers()[0] != wanted:  # onnxruntime falls back when a library of the GPU can't be loaded
            raise no_provider(wanted)
        return OnnxRuntime(session, threads, provider)

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of a batch.

        Args:
            x: N x ..., normalised.

        Returns:
            N x classes.

        Raises:
            ExportError: inputs of another shape or number than the model's.
        """
        entry = self.session.get_inputs()[0]
        try:
            logits: NDArray[np.float32] = self.session.run(None, {entry.name: x})[0]
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise _cant_run("ONNX Runtime", x, error, wanted=f"{entry.type} of shape {entry.shape}") from error
        return logits

    def describe(self) -> str:
        """Version, device and threads.

        Returns:
            One line for people.
        """
        device = "CPU" if self.provider == "CPU" else f"GPU ({self.provider})"
        return f"onnxruntime {import_onnxruntime().__version__}, {device}, {self.threads} thread(s)"


def _cant_run(runtime: str, x: NDArray[np.float32], error: Exception, *, wanted: str = "") -> ExportError:
    return ExportError(
        f"{runtime} can't run the model on inputs of shape {x.shape}",
        found=" ".join(str(error).split())[:400],
        wanted=wanted,
        remedy="give --batch and --data of the shape that the model takes, or export it with a free batch size",
    )


def open_runtime(name: RuntimeName, path: Path, *, threads: int, batches: tuple[int, ...] | None = None) -> Runtime:
    """Load the file of one model into one runtime.

    Args:
        name: Which runtime.
        path: .pt2 for torch; .onnx for onnxruntime and openvino (which reads .xml too); an engine for TensorRT, or an
            .onnx file from which one is built for the GPU here.
        threads: Threads for onnxruntime and openvino; torch's are set by `torch_threads`.
        batches: Batch sizes that TensorRT builds an engine for, where one is built; None: 1 to 256.

    Returns:
        The runtime.

    Raises:
        MissingPackageError: the runtime or its device is not here.
        RunFolderError: the file is missing or damaged.
        ExportError: the runtime refuses the file.
    """
    if name in PROVIDERS:
        return OnnxRuntime.load(path, threads=threads, provider=PROVIDERS[name])
    match name:
        case "openvino":
            from causal_compress.deploy.openvino import OpenVinoRuntime

            return OpenVinoRuntime.load(path, threads=threads)
        case "tensorrt" | "tensorrt-rtx":
            from causal_compress.deploy.engines import EngineRuntime

            return EngineRuntime.load(path, name, batches=batches)
        case _:
            eager = TorchRuntime.load(path)
            return CompiledRuntime.of(eager.model) if name == "torch-compiled" else eager


def for_any_batch(
    runtime: Runtime, *, fixed: int | None = None
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """A runtime's `run` that takes batches of every size.

    Args:
        runtime: Any; an engine runs only batches within its profile.
        fixed: The one batch size that the model takes, where it takes one only.

    Returns:
        A function from inputs to logits; where the batch is beyond the profile it is cut, or filled up with its last
        row, whose further answers are dropped.
    """
    limits: tuple[int, int] | None = getattr(runtime, "limits", None) if fixed is None else (fixed, fixed)
    return runtime.run if limits is None else partial(_in_parts, runtime.run, *limits)


def _in_parts(
    run: Callable[[NDArray[np.float32]], NDArray[np.float32]], low: int, high: int, x: NDArray[np.float32]
) -> NDArray[np.float32]:
    rows = []
    for part in (x[start : start + high] for start in range(0, len(x), high)):
        filled = np.concatenate([part, np.repeat(part[-1:], max(0, low - len(part)), axis=0)])
        rows.append(run(filled)[: len(part)])
    return np.concatenate(rows)


def open_module(name: RuntimeName, model: nn.Module, path: Path, *, threads: int) -> Runtime:
    """As `open_runtime`, but PyTorch runs a network that is in memory already.

    Args:
        name: Which runtime.
        model: The network, in evaluation mode; run by torch and torch-compiled.
        path: What the other runtimes load.
        threads: Threads for onnxruntime and openvino.

    Returns:
        The runtime.

    Raises:
        MissingPackageError: the runtime or its device is not here.
    """
    if name == "torch":
        return TorchRuntime(model)
    if name == "torch-compiled":
        return CompiledRuntime.of(model)
    return open_runtime(name, path, threads=threads)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """PyTorch uses so many threads inside the block, and as many as before afterwards.

    Args:
        threads: Threads inside an operator.

    Yields:
        Nothing.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
