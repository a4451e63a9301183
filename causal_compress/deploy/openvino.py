"""OpenVINO on the CPU, and the form in which it keeps a model: an .xml graph beside a .bin of weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from causal_compress.deploy.absent import not_installed
from causal_compress.errors import ExportError, RunFolderError


@dataclass(frozen=True)
class OpenVinoRuntime:
    """OpenVINO on the CPU: one stream, arithmetic as the file says (no silent bfloat16).

    Args:
        request: An openvino.InferRequest.
        threads: Threads inside an operator.
    """

    request: Any
    threads: int

    @staticmethod
    def load(path: Path, *, threads: int = 1) -> OpenVinoRuntime:
        """Load an .onnx or .xml file.

        Args:
            path: The file.
            threads: Threads inside an operator.

        Returns:
            The runtime.

        Raises:
            MissingPackageError: openvino is not installed.
            RunFolderError: the file is missing.
            ExportError: OpenVINO refuses the file.
        """
        if not path.is_file():
            raise RunFolderError(f"can't read the model {path}", found="no such file", remedy="run export first")
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # server CPUs would otherwise compute in bfloat16 and say nothing
        }
        core = _import_openvino().Core()
        try:
            compiled = core.compile_model(_read(core, path), "CPU", properties)
        except RuntimeError as error:
            raise _refused(path, error) from error
        return OpenVinoRuntime(compiled.create_infer_request(), threads)

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of a batch.

        Args:
            x: N x ..., normalised.

        Returns:
            N x classes.
        """
        logits: NDArray[np.float32] = np.array(self.request.infer({0: x})[0])  # the request overwrites its own
        return logits

    def describe(self) -> str:
        """Version, device and threads.

        Returns:
            One line for people.
        """
        return f"openvino {_import_openvino().__version__}, CPU, {self.threads} thread(s)"


def convert_to_openvino(onnx: Path, path: Path, *, half: bool = False) -> None:
    """Write an ONNX model as OpenVINO's .xml and, beside it, .bin.

    Args:
        onnx: The model.
        path: The .xml to write; both files appear at once when complete.
        half: Store weights in 16 bits; CPUs still compute in 32.

    Raises:
        MissingPackageError: openvino is not installed.
        ExportError: OpenVINO refuses the file.
    """
    openvino = _import_openvino()
    unfinished = path.with_name(f".{path.stem}.tmp.xml")
    try:
        openvino.save_model(_read(openvino.Core(), onnx), unfinished, compress_to_fp16=half)
        unfinished.with_suffix(".bin").replace(path.with_suffix(".bin"))
        unfinished.replace(path)
    except RuntimeError as error:
        raise _refused(onnx, error) from error
    finally:
        for left in (unfinished, unfinished.with_suffix(".bin")):
            left.unlink(missing_ok=True)


def _read(core: Any, path: Path) -> Any:
    return core.read_model(path)


def _refused(path: Path, error: Exception) -> ExportError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("Exception from")] or lines
    return ExportError(
        f"OpenVINO refuses {path.name}",
        found=" ".join(told[:2])[:400],
        wanted="an .onnx file, or an .xml with its .bin beside it",
        remedy="try another export.opset, or update openvino",
    )


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise not_installed("OpenVINO", "openvino") from error
    return openvino
