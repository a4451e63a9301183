"""Where a model runs: one small class per runtime, all with the same two methods.

torch and onnxruntime are imported only by the runtime that needs them, so that the memory of one is measured without
the other in the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from causal_compress.errors import ExportError, MissingPackageError, RunFolderError

if TYPE_CHECKING:
    from torch import nn

RuntimeName = Literal["torch", "onnxruntime"]


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
        """
        import torch

        with torch.inference_mode():
            logits: NDArray[np.float32] = self.model(torch.from_numpy(x)).numpy()
        return logits

    def describe(self) -> str:
        """Version, device and threads.

        Returns:
            One line for people.
        """
        import torch

        return f"torch {torch.__version__}, eager, CPU, {torch.get_num_threads()} thread(s)"


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime on the CPU, operators one after the other.

    Args:
        session: An onnxruntime.InferenceSession.
        threads: Threads inside an operator.
    """

    session: Any
    threads: int

    @staticmethod
    def load(path: Path, *, threads: int = 1) -> OnnxRuntime:
        """Load an .onnx file.

        Args:
            path: The file.
            threads: Threads inside an operator.

        Returns:
            The runtime.

        Raises:
            MissingPackageError: onnxruntime is not installed.
            RunFolderError: the file is missing.
            ExportError: ONNX Runtime refuses the file.
        """
        if not path.is_file():
            raise RunFolderError(f"can't read the model {path}", found="no such file", remedy="run export first")
        onnxruntime = _import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        # Idle workers would otherwise spin on while the other model of an interleaved measurement runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise ExportError(
                f"ONNX Runtime refuses {path.name}",
                found=str(error).splitlines()[0],
                remedy="try another export.opset, or update onnxruntime",
            ) from error
        return OnnxRuntime(session, threads)

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of a batch.

        Args:
            x: N x ..., normalised.

        Returns:
            N x classes.
        """
        logits: NDArray[np.float32] = self.session.run(None, {self.session.get_inputs()[0].name: x})[0]
        return logits

    def describe(self) -> str:
        """Version, device and threads.

        Returns:
            One line for people.
        """
        return f"onnxruntime {_import_onnxruntime().__version__}, CPU, {self.threads} thread(s)"


def open_runtime(name: RuntimeName, path: Path, *, threads: int) -> Runtime:
    """Load the file of one model into one runtime.

    Args:
        name: Which runtime.
        path: .pt2 for torch, .onnx for onnxruntime.
        threads: Threads for onnxruntime; torch's are set by `torch_threads`.

    Returns:
        The runtime.

    Raises:
        MissingPackageError: the runtime is not installed.
        RunFolderError: the file is missing or damaged.
    """
    match name:
        case "torch":
            return TorchRuntime.load(path)
        case "onnxruntime":
            return OnnxRuntime.load(path, threads=threads)


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


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError(
            "ONNX Runtime is not installed",
            found=str(error),
            remedy="pip install onnxruntime, or set benchmark.runtimes to [torch]",
        ) from error
    return onnxruntime
