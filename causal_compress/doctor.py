"""What is installed here, and which runtimes and devices really work.

Each but torch-compiled is tried on a small piece of work.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from causal_compress.deploy.absent import absence, no_gpu
from causal_compress.provenance import machine, versions

if TYPE_CHECKING:
    from causal_compress.deploy.tensorrt import TensorRTName

Status = Literal["works", "absent", "broken"]
_EXTRAS = {"timm": "timm", "pyarrow": "parquet"}


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Check:
    """One runtime, device or optional package; `detail` says what was tried, `remedy` what would mend it."""

    name: str
    status: Status
    version: str | None
    detail: str
    remedy: str | None


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Diagnosis:
    """All that `causal-compress doctor` found."""

    schema: Literal[1] = 1
    versions: dict[str, str]
    machine: dict[str, Any]
    checks: tuple[Check, ...]


def diagnose() -> Diagnosis:
    """Tries each runtime and device but torch-compiled once; takes seconds, most of them to import them."""
    checks = (
        *_torch(),
        *_onnxruntime(),
        *_openvino(),
        _tensorrt("tensorrt", "tensorrt"),
        _tensorrt("tensorrt_rtx", "tensorrt-rtx"),
        *(_package(module, extra) for module, extra in _EXTRAS.items()),
    )
    return Diagnosis(versions=versions(), machine=machine(), checks=checks)


def _torch() -> Iterator[Check]:
    import torch

    def multiply(device: str) -> str:
        ones = torch.ones(8, 8, device=device)
        assert float((ones @ ones).sum()) == 512.0
        return "a matrix product is right"

    yield _tried("torch cpu", "torch", partial(multiply, "cpu"))
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        remedy = "install an NVIDIA driver" if torch.version.cuda else "install a CUDA build of torch (pytorch.org)"
        yield _absent("torch cuda", f"no usable NVIDIA GPU; {built}", remedy + "; needed only to compute on a GPU")
    compiler = absence("torch-compiled")
    if compiler is None:
        detail = "a C++ compiler is there; it was not tried, compiling takes half a minute"
        yield Check(name="torch-compiled", status="works", version=_version("torch"), detail=detail, remedy=None)
    else:
        yield _absent("torch-compiled", compiler.args[0].splitlines()[1].strip(), compiler.remedy)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = f"torch cuda:{index} ({torch.cuda.get_device_name(index)})"
        yield _tried(name, "torch", partial(multiply, f"cuda:{index}"))


def _onnxruntime() -> Iterator[Check]:
    if importlib.util.find_spec("onnxruntime") is None:
        yield _absent("onnxruntime", "not installed", "pip install causal-compress")
        return
    import onnxruntime

    def run(provider: str) -> str:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(_tiny_onnx(), options, providers=[provider])
        if session.get_providers()[0] != provider:
            raise RuntimeError(f"it fell back to {session.get_providers()[0]}")
        _must_be_two(session.run(None, {"x": _ones()})[0])
        return "a small network runs right"

    # Azure is a remote service, no device of this machine.
    there = [name for name in onnxruntime.get_available_providers() if not name.startswith("Azure")]
    for provider in there:
        yield _tried(f"onnxruntime {provider}", "onnxruntime", partial(run, provider))
    for runtime in ("onnxruntime-cuda", "onnxruntime-tensorrt"):
        error = absence(runtime)
        if error is not None:
            yield _absent(runtime, error.what, f"{error.remedy} (with an NVIDIA GPU)")


def _openvino() -> Iterator[Check]:
    if importlib.util.find_spec("openvino") is None:
        yield _missing("openvino", "openvino")
        return

    def devices() -> list[str]:
        openvino = importlib.import_module("openvino")
        return list(openvino.Core().available_devices)

    def run(device: str) -> str:
        core = importlib.import_module("openvino").Core()
        compiled = core.compile_model(core.read_model(_tiny_onnx()), device)
        _must_be_two(compiled({"x": _ones()})[0])
        return "a small network runs right"

    try:
        found = devices()
    except Exception as error:
        yield _broken("openvino", "openvino", error)
        return
    for device in found:
        yield _tried(f"openvino {device}", "openvino", partial(run, device))


def _tensorrt(module: str, extra: str) -> Check:
    if importlib.util.find_spec(module) is None:
        return _missing(module, extra)

    def build() -> str:
        from causal_compress.deploy.tensorrt import CAPABILITIES, CURRENT, EngineOptions, build_engine

        trt = importlib.import_module(module)
        trt.OnnxParser(trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(0), trt.Logger(trt.Logger.ERROR))
        name: TensorRTName = "tensorrt-rtx" if module == "tensorrt_rtx" else "tensorrt"
        if name == "tensorrt" and no_gpu(name) is not None:
            return "its parser is there"
        capability = CAPABILITIES[-2] if name == "tensorrt-rtx" else CURRENT
        with tempfile.TemporaryDirectory() as folder:
            onnx = Path(folder) / "tiny.onnx"
            onnx.write_bytes(_tiny_onnx())
            options = EngineOptions(runtime=name, capability=capability, batches=(1,), workspace_bytes=2**24)
            build_engine(onnx, Path(folder) / "tiny.engine", options)
        built = f"an engine is built for {capability}"
        return built if no_gpu(name) is None else f"{built}; it was not run: running needs an NVIDIA GPU"

    check = _tried(module, extra, build)
    if module == "tensorrt" and check.status == "works" and no_gpu("tensorrt") is not None:
        detail = f"TensorRT {check.version} is installed, but builds and runs only with an NVIDIA GPU, and none is here"
        return _absent(module, detail, "use it on a machine with an NVIDIA GPU and a CUDA build of torch")
    return check


def _package(module: str, extra: str) -> Check:
    if importlib.util.find_spec(module) is None:
        return _missing(module, extra)
    return _tried(module, module, lambda: f"{importlib.import_module(module).__name__} can be imported")


def _tried(name: str, distribution: str, attempt: Callable[[], str]) -> Check:
    try:
        with _quiet():
            detail = attempt()
    except Exception as error:  # a broken installation can fail in any way, and saying how is the purpose here
        return _broken(name, distribution, error)
    return Check(name=name, status="works", version=_version(distribution), detail=detail, remedy=None)


def _broken(name: str, distribution: str, error: Exception) -> Check:
    detail = (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:300]
    remedy = f"reinstall it: pip install --force-reinstall {distribution}"
    return Check(name=name, status="broken", version=_version(distribution), detail=detail, remedy=remedy)


def _missing(name: str, extra: str) -> Check:
    return _absent(name, "not installed", f"pip install 'causal-compress[{extra}]'")


def _absent(name: str, detail: str, remedy: str) -> Check:
    return Check(name=name, status="absent", version=None, detail=detail, remedy=remedy)


def _version(distribution: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


def _tiny_onnx() -> bytes:
    """A network that adds its input to itself."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def _ones() -> Any:
    import numpy as np

    return np.ones((1, 4), dtype=np.float32)


def _must_be_two(result: Any) -> None:
    if not (result == 2.0).all():
        raise RuntimeError("it computes wrong numbers")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what C++ libraries write to stderr off the screen: a failure is told in one line of the result."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a device, not a path
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
