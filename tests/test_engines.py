"""What loads an engine, with a TensorRT that only writes down what is asked of it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from pydantic_core import to_json

from causal_compress.deploy import engines
from causal_compress.deploy.engines import EngineRuntime
from causal_compress.deploy.tensorrt import EngineOptions, sidecar
from causal_compress.errors import ExportError
from causal_compress.files import sha256_of_file
from causal_compress.results import EngineInfo


@pytest.fixture
def runtimes(monkeypatch):
    """Runtimes that were made by a TensorRT 10.3 on a GPU of Ada's generation."""
    made = []

    class Runtime:
        def __init__(self, ears):
            self.engine_host_code_allowed = False
            made.append(self)

        def deserialize_cuda_engine(self, content):
            return SimpleNamespace(create_execution_context=lambda: content)

    severity = SimpleNamespace(ERROR=0, INTERNAL_ERROR=1, WARNING=2)
    logger = type("ILogger", (), {"Severity": severity})
    monkeypatch.setitem(
        sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0.26", Runtime=Runtime, ILogger=logger)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    return made


def engine(path, version, *, compatible):
    path.write_bytes(b"engine")
    info = EngineInfo(
        runtime="tensorrt",
        version=version,
        capability="SM89",
        precision="fp32",
        onnx_sha256="",
        engine_sha256=sha256_of_file(path),
        input_shape=(4,),
        profile=(2, 4, 8),
        workspace_bytes=1,
        hardware_compatible=False,
        version_compatible=compatible,
        build_seconds=0.0,
        size_bytes=6,
    )
    sidecar(path).write_bytes(to_json(info))
    return path


@pytest.mark.parametrize(("version", "compatible"), [("10.3.0.26", False), ("10.1.0.5", True), ("10.3.0.30", True)])
def test_only_version_compatible_engines_may_run_code_of_theirs(runtimes, tmp_path, version, compatible):
    loaded = EngineRuntime.load(engine(tmp_path / "e.engine", version, compatible=compatible), "tensorrt")
    assert loaded.limits == (2, 8)
    assert [runtime.engine_host_code_allowed for runtime in runtimes] == [compatible]


@pytest.mark.parametrize(
    ("version", "compatible"), [("10.1.0.5", False), ("10.4.0.1", True), ("9.9.0.1", True), ("11.0.0", True)]
)
def test_engines_of_other_versions_are_refused(runtimes, tmp_path, version, compatible):
    with pytest.raises(ExportError, match=f"built by tensorrt {version}"):
        EngineRuntime.load(engine(tmp_path / "e.engine", version, compatible=compatible), "tensorrt")
    assert runtimes == []


@pytest.mark.parametrize(("batches", "wanted"), [((1, 512), (1, 512)), (None, (1, 8, 256))])
def test_engines_from_onnx_files_are_built_for_the_batches_that_are_run(
    runtimes, tmp_path, monkeypatch, batches, wanted
):
    asked = []

    def build(onnx, path, options: EngineOptions):
        asked.append(options.batches)
        return engines.read_engine_info(engine(path, "10.3.0.26", compatible=False))

    monkeypatch.setattr(engines, "build_engine", build)
    EngineRuntime.load(tmp_path / "m.onnx", "tensorrt", batches=batches)
    assert asked == [wanted]
