"""Running TensorRT engines: checked against their description when loaded, inputs and outputs held by PyTorch."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from causal_compress.deploy.absent import no_gpu
from causal_compress.deploy.tensorrt import (
    EngineOptions,
    TensorRTName,
    build_engine,
    import_tensorrt,
    listener,
    sidecar,
)
from causal_compress.errors import ExportError, RunFolderError, UsageError
from causal_compress.files import sha256_of_file
from causal_compress.results import EngineInfo

_BATCHES_HERE = (1, 8, 256)
_WARM_UP_ROUNDS = 10


@dataclass(frozen=True)
class EngineRuntime:
    """An engine on the GPU of this machine.

    Args:
        trt: TensorRT's module.
        context: Execution context; it keeps the engine alive.
        info: What the engine is.
    """

    trt: Any
    context: Any
    info: EngineInfo

    @staticmethod
    def load(path: Path, name: TensorRTName, *, batches: tuple[int, ...] | None = None) -> EngineRuntime:
        """Load an engine, or build one from an .onnx file for the GPU here.

        Args:
            path: An engine with its description beside it, or an .onnx file.
            name: Which TensorRT.
            batches: What an engine from an .onnx file is built for (None: 1 to 256); one that is built has its own.

        Returns:
            The runtime.

        Raises:
            MissingPackageError: the package or a GPU is not here.
            RunFolderError: the file or its description is missing or damaged.
            ExportError: the engine was built for another GPU or version, or it can't be built.

        Limits: a version-compatible engine runs code from the file; load only those of people you trust.
        """
        trt = import_tensorrt(name)
        if path.suffix != ".onnx":
            info = read_engine_info(path)
            _refuse_foreign(info, name, str(trt.__version__))
        if (absent := no_gpu(name)) is not None:
            raise absent
        if path.suffix == ".onnx":
            with tempfile.TemporaryDirectory() as folder:
                engine = Path(folder) / "built.engine"
                info = build_engine(path, engine, EngineOptions(runtime=name, batches=batches or _BATCHES_HERE))
                return EngineRuntime(trt, _context(trt, engine, info), info)
        _refuse_other_gpu(info)
        return EngineRuntime(trt, _context(trt, path, info), info)

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest batch that it can run."""
        return self.info.profile[0], self.info.profile[2]

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of a batch, copies to the GPU and back included.

        Args:
            x: N x ..., normalised.

        Returns:
            N x classes.

        Raises:
            UsageError: a batch beyond the engine's profile, or inputs of another shape.
        """
        import torch

        stream = torch.cuda.current_stream()
        inputs = torch.from_numpy(x).cuda(non_blocking=True)
        outputs = self._bind(inputs)
        self._enqueue(stream.cuda_stream)
        stream.synchronize()
        logits: NDArray[np.float32] = outputs.float().cpu().numpy()
        return logits

    def device_ms(self, x: NDArray[np.float32], *, rounds: int = 100, graph: bool = True) -> NDArray[np.float64]:
        """Time of the GPU's own work, without copies, by CUDA events.

        Args:
            x: One batch.
            rounds: Timed runs, after 10 to warm up.
            graph: Replay a captured CUDA graph, which takes the cost of launching kernels away.

        Returns:
            Milliseconds of each run.

        Raises:
            UsageError: a batch beyond the engine's profile.
        """
        import torch

        stream = torch.cuda.Stream()
        inputs = torch.from_numpy(x).cuda()
        outputs = self._bind(inputs)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_ROUNDS):
                self._enqueue(stream.cuda_stream)
            stream.synchronize()
            captured = torch.cuda.CUDAGraph() if graph else None
            if captured is not None:
                with torch.cuda.graph(captured, stream=stream):
                    self._enqueue(stream.cuda_stream)
            events = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)
            ]
            for start, end in events:
                start.record(stream)
                if captured is None:
                    self._enqueue(stream.cuda_stream)
                else:
                    captured.replay()
                end.record(stream)
            stream.synchronize()
        del outputs  # bound to the context until here
        return np.array([start.elapsed_time(end) for start, end in events])

    def describe(self) -> str:
        """Version, GPU, precision and profile.

        Returns:
            One line for people.
        """
        import torch

        info = self.info
        return (
            f"{info.runtime} {info.version}, {torch.cuda.get_device_name()}, {info.precision}, batches "
            f"{info.profile[0]} to {info.profile[2]} (tuned for {info.profile[1]})"
        )

    def _bind(self, inputs: Any) -> Any:
        import torch

        smallest, largest = self.limits
        if not smallest <= len(inputs) <= largest:
            raise UsageError(
                f"the engine can't run a batch of {len(inputs)}",
                wanted=f"{smallest} to {largest}",
                remedy="build it again with export --batch that names this size",
            )
        if tuple(inputs.shape[1:]) != tuple(self.info.input_shape):
            raise UsageError(
                "the engine can't run inputs of this shape",
                found=str(tuple(inputs.shape[1:])),
                wanted=str(tuple(self.info.input_shape)),
                remedy="give --data with inputs of the shape that it was built for, or measure it alone",
            )
        engine = self.context.engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.context.set_input_shape(names[0], tuple(inputs.shape))
        outputs = torch.empty(tuple(self.context.get_tensor_shape(names[1])), dtype=torch.float32, device="cuda")
        self.context.set_tensor_address(names[0], inputs.data_ptr())
        self.context.set_tensor_address(names[1], outputs.data_ptr())
        return outputs

    def _enqueue(self, stream: int) -> None:
        if not self.context.execute_async_v3(stream):
            raise ExportError("the engine failed while running", remedy="build it again on this machine")


def read_engine_info(path: Path) -> EngineInfo:
    """The description of an engine, after checking that it belongs to it.

    Args:
        path: The engine.

    Returns:
        What was written when it was built.

    Raises:
        RunFolderError: engine or description are missing, damaged, or not of each other.
    """
    beside = sidecar(path)
    try:
        info = TypeAdapter(EngineInfo).validate_json(beside.read_bytes())
        found = "" if sha256_of_file(path) == info.engine_sha256 else f"{path.name} is not the engine it describes"
    except OSError as error:
        found = f"{error.filename}: {error.strerror}"
    except ValidationError as error:
        found = f"{beside.name}: {error.errors(include_url=False)[0]['msg']}"
    if found:
        raise RunFolderError(
            f"can't use the engine {path}",
            found=found,
            wanted=f"the engine and {beside.name} as they were written together",
            remedy="copy both files, or build it again with causal-compress export",
        )
    return info


def _refuse_foreign(info: EngineInfo, name: TensorRTName, version: str) -> None:
    if info.runtime != name or not (info.version == version or _is_compatible(info, version)):
        raise ExportError(
            f"the engine was built by {info.runtime} {info.version}",
            found=f"{name} {version} here",
            wanted="the same package and version",
            remedy=f"build it again here with causal-compress export --to {name}, or install that version",
        )


def _is_compatible(info: EngineInfo, version: str) -> bool:
    """Version-compatible engines run on the same major version, at the minor version that built them or a newer one."""
    built, here = ([int(part) for part in re.findall(r"\d+", text)[:2]] for text in (info.version, version))
    return info.version_compatible and len(built) == len(here) == 2 and built[0] == here[0] and built[1] <= here[1]


def _refuse_other_gpu(info: EngineInfo) -> None:
    import torch

    major, minor = torch.cuda.get_device_capability()
    ampere_or_newer = info.hardware_compatible and major >= 8
    if info.capability != f"SM{major}{minor}" and not ampere_or_newer:
        raise ExportError(
            f"the engine was built for {info.capability}",
            found=f"{torch.cuda.get_device_name()}, SM{major}{minor}",
            remedy=f"build it with causal-compress export --to {info.runtime} --capability SM{major}{minor}",
        )


def _context(trt: Any, path: Path, info: EngineInfo) -> Any:
    ears = listener(trt)
    runtime = trt.Runtime(ears)
    if info.version_compatible:  # such an engine brings a part of TensorRT along, which is run
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    context = engine.create_execution_context() if engine is not None else None
    if context is None:
        raise ExportError(
            f"TensorRT refuses the engine {path.name}",
            found=(ears.errors or ["no reason given"])[-1][:400],
            remedy="build it again on this machine with causal-compress export",
        )
    return context
