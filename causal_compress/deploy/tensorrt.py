"""TensorRT: engines from ONNX files, for the GPU here or (TensorRT-RTX) for named generations without any GPU.

Networks are strongly typed: the ONNX file says what is FP32, FP16 or INT8 (`deploy/precision.py` and quantize write
it), and the builder changes nothing. Beside each engine lies a JSON file that says what it is; see `engines.py`.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from causal_compress.deploy.absent import no_gpu, not_installed
from causal_compress.deploy.precision import (
    Precision,
    linears_as_convolutions,
    parse_onnx,
    precision_of,
    products_in_half,
)
from causal_compress.errors import ExportError, MissingPackageError, RunFolderError, UsageError
from causal_compress.files import atomic_write_bytes, atomic_write_text, sha256_of_file
from causal_compress.results import EngineInfo

logger = logging.getLogger(__name__)

TensorRTName = Literal["tensorrt", "tensorrt-rtx"]
CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120")
"""GPU generations that TensorRT-RTX builds for without a GPU: Turing, Ampere (A100; RTX 30), Ada, Blackwell."""
CURRENT = "CURRENT"


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built; batches are sorted: smallest, middle (which is tuned for) and largest."""

    runtime: TensorRTName = "tensorrt-rtx"
    capability: str = CURRENT
    batches: tuple[int, ...] = (1, 8, 64)
    workspace_bytes: int = 2**30
    timing_cache: Path | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False


def build_engine(onnx: Path, path: Path, options: EngineOptions) -> EngineInfo:
    """Build an engine from an ONNX file, and write it with its description beside it.

    Args:
        onnx: FP32, FP16 (from `to_fp16`) or INT8 with QDQ nodes (symmetric signed activations, no quantized biases).
        path: The engine to write; its description is `sidecar(path)`.
        options: For what GPU, batches and limits.

    Returns:
        What was built.

    Raises:
        MissingPackageError: the package is not installed, or a GPU is needed and not here.
        UsageError: a capability, batch or option that this TensorRT does not have.
        ExportError: TensorRT can't parse the model (the message names the node) or can't build it.
        RunFolderError: the ONNX file is missing.

    Source: NVIDIA TensorRT developer guide: strongly typed networks, optimisation profiles, timing cache.
    """
    trt = import_tensorrt(options.runtime)
    _check(trt, options)
    if not onnx.is_file():
        raise RunFolderError(f"can't read the model {onnx}", found="no such file", remedy="run export first")
    content = onnx.read_bytes()
    precision = precision_of(content)
    generation = _generation(options.capability)
    content, notes = _for_generation(content, precision, options.runtime, generation)
    started = time.perf_counter()
    built, shape = _build(trt, content, options, onnx.name)
    atomic_write_bytes(path, built)
    info = EngineInfo(
        runtime=options.runtime,
        version=str(trt.__version__),
        capability=generation,
        precision=precision,
        onnx_sha256=sha256_of_file(onnx),
        engine_sha256=sha256_of_file(path),
        input_shape=shape,
        profile=_profile(options.batches),
        workspace_bytes=options.workspace_bytes,
        hardware_compatible=options.hardware_compatible,
        version_compatible=options.version_compatible,
        build_seconds=time.perf_counter() - started,
        size_bytes=len(built),
        notes=notes,
    )
    from pydantic_core import to_json

    atomic_write_text(sidecar(path), to_json(info, indent=2).decode() + "\n")
    return info


def sidecar(engine: Path) -> Path:
    """Where the description of an engine lies.

    Args:
        engine: The engine file.

    Returns:
        The same name with .json appended.
    """
    return engine.with_name(engine.name + ".json")


def import_tensorrt(name: TensorRTName) -> Any:
    """TensorRT's Python module.

    Args:
        name: Which of the two.

    Returns:
        `tensorrt` or `tensorrt_rtx`; they share one API.

    Raises:
        MissingPackageError: not installed.
    """
    try:
        return importlib.import_module(name.replace("-", "_"))
    except ImportError as error:
        raise not_installed("TensorRT" if name == "tensorrt" else "TensorRT-RTX", name) from error


def listener(trt: Any) -> Any:
    """A TensorRT logger that keeps errors for the message and passes warnings on to our log.

    Args:
        trt: The module.

    Returns:
        An ILogger with a list `errors`.
    """

    class Listener(trt.ILogger):  # type: ignore[misc]  # TensorRT takes only its own subclasses
        """Keeps what TensorRT complains of."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT."""
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                logger.info("TensorRT: %s", message)

    return Listener()


def _check(trt: Any, options: EngineOptions) -> None:
    if not options.batches or min(options.batches) < 1:
        raise UsageError("an engine needs batch sizes", found=str(options.batches), remedy="give --batch 1,8,64")
    known = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")] if _named(trt) else []
    if options.capability == CURRENT:
        if (absent := no_gpu(options.runtime)) is not None:
            raise _needs_capability(options.runtime, absent)
        _refuse_gpu_here(options.runtime, known)
        return
    if options.capability not in known:
        raise UsageError(
            f"{options.runtime} can't build for {options.capability}",
            found=f"TensorRT {trt.__version__}",
            wanted=f"one of {', '.join(known)}" if known else "no --capability: it builds for the GPU here only",
            remedy=f"give one of these with --capability, such as --capability {known[0]}"
            if known
            else "use --to tensorrt-rtx, or build on the machine with the GPU",
        )
    if options.runtime == "tensorrt-rtx" and (options.hardware_compatible or options.version_compatible):
        raise UsageError(
            "TensorRT-RTX has no hardware- or version-compatible engines",
            remedy="leave --compatible out and name each generation with --capability",
        )


def _refuse_gpu_here(runtime: TensorRTName, known: Sequence[str]) -> None:
    """TensorRT-RTX knows the generations of desktop and edge GPUs; what it says of an H100 doesn't tell why."""
    import torch

    if runtime == "tensorrt-rtx" and known and (here := _generation(CURRENT)) not in known:
        raise UsageError(
            f"TensorRT-RTX can't build for the {torch.cuda.get_device_name()} here",
            found=f"a GPU of {here}",
            wanted=f"one of {', '.join(known)}",
            remedy="use --to tensorrt for this GPU, or name another machine's with --capability SM89",
        )


def _needs_capability(runtime: TensorRTName, absent: MissingPackageError) -> MissingPackageError:
    way = "name a generation: --capability SM89" if runtime == "tensorrt-rtx" else "build on the machine with the GPU"
    return MissingPackageError(
        f"{runtime} can't build for the GPU here", found=absent.args[0].splitlines()[1].strip(), remedy=way
    )


def _named(trt: Any) -> bool:
    return hasattr(trt, "ComputeCapability") and hasattr(trt.IBuilderConfig, "set_compute_capability")


def _for_generation(
    content: bytes, precision: Precision, runtime: TensorRTName, generation: str
) -> tuple[bytes, tuple[str, ...]]:
    """Turing has no FP32 matrix product in TensorRT-RTX, but FP32 convolutions and FP16 products."""
    if runtime != "tensorrt-rtx" or generation != "SM75" or precision == "fp16":
        return content, ()
    content, linears = linears_as_convolutions(content)
    content, products = products_in_half(content)
    reason = "SM75 has no FP32 matrix product in TensorRT-RTX"
    notes = (
        (linears, f"{linears} linear layer(s) built as 1x1 convolutions: {reason}"),
        (products, f"{products} matrix product(s) computed in FP16: {reason}"),
    )
    return content, tuple(note for count, note in notes if count)


def _build(trt: Any, content: bytes, options: EngineOptions, name: str) -> tuple[bytes, tuple[int, ...]]:
    ears = listener(trt)
    builder = trt.Builder(ears)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, ears)
    if not parser.parse(content):
        faults = [parser.get_error(index) for index in range(parser.num_errors)]
        raise _unparsed(name, faults, parse_onnx(content))
    config = _configure(trt, builder, options)
    given = network.get_input(0)
    shape = tuple(int(size) for size in given.shape)[1:]
    smallest, tuned, largest = ((batch, *shape) for batch in _profile(options.batches))
    profile = builder.create_optimization_profile()
    profile.set_shape(given.name, smallest, tuned, largest)
    config.add_optimization_profile(profile)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise _unbuilt(name, ears.errors, options)
    _keep_timing_cache(config, options)
    return bytes(built), shape


def _configure(trt: Any, builder: Any, options: EngineOptions) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if hasattr(trt.BuilderFlag, "TF32"):  # on by default: FP32 products would keep 10 bits of the mantissa
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.capability != CURRENT:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, options.capability), 0)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.timing_cache is not None and options.runtime == "tensorrt":  # RTX times nothing while it builds
        known = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), False)
    return config


def _keep_timing_cache(config: Any, options: EngineOptions) -> None:
    if options.timing_cache is not None and options.runtime == "tensorrt":
        atomic_write_bytes(options.timing_cache, bytes(config.get_timing_cache().serialize()))


def _profile(batches: tuple[int, ...]) -> tuple[int, int, int]:
    ordered = sorted(batches)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _generation(capability: str) -> str:
    if capability != CURRENT:
        return capability
    import torch

    return "SM{}{}".format(*torch.cuda.get_device_capability())


def _unparsed(name: str, faults: Sequence[Any], model: Any) -> ExportError:
    told = []
    for fault in faults:
        index = fault.node()
        node = model.graph.node[index] if 0 <= index < len(model.graph.node) else None
        label = fault.node_name() or (node.name if node is not None else "") or f"number {index}"
        reason = fault.desc() if fault.desc() not in ("", "false") else str(fault.code()).rpartition(".")[2]
        told.append(f"node {label} ({fault.node_operator() or 'unknown operator'}): {reason}")
    return ExportError(
        f"TensorRT can't parse {name}",
        found="; ".join(told[:3])[:600] or "no reason given",
        wanted="operators that TensorRT knows",
        remedy="replace the operator named above in the architecture; INT8 files must be quantized for TensorRT",
    )


def _unbuilt(name: str, errors: Sequence[str], options: EngineOptions) -> ExportError:
    text = " ".join(errors)
    remedy = "try --precision fp16, another --capability, or update TensorRT"
    if "OutOfMemory" in text or "workspace" in text:
        remedy = f"raise --workspace (now {options.workspace_bytes // 2**20} MiB), or lower the largest --batch"
    return ExportError(
        f"TensorRT can't build {name} for {options.capability}",
        found=(errors[-1] if errors else "no reason given")[:400],
        remedy=remedy,
    )
