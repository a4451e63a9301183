"""Every runtime gives the model's logits."""

import builtins
import importlib.util
import sys

import numpy as np
import pytest
import torch
from torch import nn

from causal_compress.deploy.absent import absence
from causal_compress.deploy.onnx import export_onnx
from causal_compress.deploy.openvino import convert_to_openvino
from causal_compress.deploy.package import save_pt2
from causal_compress.deploy.runtimes import (
    RUNTIMES,
    OnnxRuntime,
    TorchRuntime,
    open_module,
    open_runtime,
    torch_threads,
)
from causal_compress.errors import ExportError, MissingPackageError, RunFolderError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    folder = tmp_path_factory.mktemp("models")
    x = torch.randn(4, 3, 2, 2)
    export_onnx(model, x, folder / "m.onnx", opset=18)
    save_pt2(model, x, folder / "m.pt2")
    np.savez(folder / "known.npz", x=x.numpy(), y=model(x).detach().numpy())
    return folder


@pytest.mark.parametrize(("name", "file"), [("torch", "m.pt2"), ("onnxruntime", "m.onnx")])
def test_each_runtime_gives_the_models_logits(name, file, folder):
    runtime = open_runtime(name, folder / file, threads=1)
    known = np.load(folder / "known.npz")
    logits = runtime.run(known["x"])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, known["y"], atol=1e-5)
    assert runtime.describe().startswith(f"{name} ")
    assert "1 thread" in runtime.describe() or name == "torch"


@pytest.mark.parametrize(("name", "file"), [("torch", "m.pt2"), ("onnxruntime", "m.onnx")])
def test_inputs_of_another_shape_are_an_error_with_a_remedy(name, file, folder):
    with pytest.raises(ExportError, match=r"can't run the model on inputs of shape \(2, 5\)") as caught:
        open_runtime(name, folder / file, threads=1).run(np.zeros((2, 5), np.float32))
    assert caught.value.found
    assert "--batch" in caught.value.remedy
    assert ("3, 2, 2" in caught.value.wanted) == (name == "onnxruntime")  # the file declares it


def test_onnx_session_is_sequential_with_the_threads_asked_for(folder):
    options = OnnxRuntime.load(folder / "m.onnx", threads=2).session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.execution_mode.name == "ORT_SEQUENTIAL"


def test_torch_threads_are_restored():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="x"), torch_threads(before + 1):
        raise ValueError("x")
    assert torch.get_num_threads() == before


def test_torch_runtime_records_no_gradients():
    logits = TorchRuntime(nn.Linear(3, 2)).run(np.ones((1, 3), dtype=np.float32))
    assert isinstance(logits, np.ndarray)


def test_absent_package_is_named(folder, monkeypatch):
    original = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return original(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match="pip install onnxruntime"):
        OnnxRuntime.load(folder / "m.onnx")


def test_missing_and_damaged_files_are_refused(tmp_path):
    for name in ("torch", "onnxruntime"):
        with pytest.raises(RunFolderError, match="can't read"):
            open_runtime(name, tmp_path / "absent", threads=1)
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="refuses"):
        OnnxRuntime.load(tmp_path / "bad.onnx")


openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")


@openvino
@pytest.mark.filterwarnings("error")
def test_openvino_gives_the_models_logits_from_both_of_its_files(folder, tmp_path):
    known = np.load(folder / "known.npz")
    convert_to_openvino(folder / "m.onnx", tmp_path / "m.xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    for path in (folder / "m.onnx", tmp_path / "m.xml"):
        runtime = open_runtime("openvino", path, threads=1)
        first = runtime.run(known["x"])
        kept = first.copy()
        runtime.run(np.zeros_like(known["x"]))
        np.testing.assert_array_equal(first, kept)  # not overwritten by the next call
        np.testing.assert_allclose(first, known["y"], atol=1e-5)
        np.testing.assert_allclose(runtime.run(known["x"][:1]), known["y"][:1], atol=1e-5)
        assert runtime.describe().startswith("openvino ")


@openvino
def test_openvino_refuses_what_it_cant_read(tmp_path):
    with pytest.raises(RunFolderError, match="can't read"):
        open_runtime("openvino", tmp_path / "absent.onnx", threads=1)
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="OpenVINO refuses"):
        open_runtime("openvino", tmp_path / "bad.onnx", threads=1)


@pytest.mark.slow
def test_compiled_torch_gives_the_models_logits_for_every_shape(folder):
    runtime, known = open_runtime("torch-compiled", folder / "m.pt2", threads=1), np.load(folder / "known.npz")
    for n in (4, 1, 3):
        np.testing.assert_allclose(runtime.run(known["x"][:n]), known["y"][:n], atol=1e-5)
    assert "torch-compiled" in runtime.describe()


def test_compiled_torch_never_goes_on_uncompiled(folder):
    class Broken(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x

    with pytest.raises(Exception, match=r"(?i)graph"):
        open_module("torch-compiled", Broken().eval(), folder / "m.pt2", threads=1).run(np.ones((1, 2), np.float32))


@pytest.mark.parametrize("name", [name for name in RUNTIMES if name != "torch"])
def test_absent_runtimes_are_refused_with_the_command_that_helps(name, folder, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda n, *a: None if n in ("openvino", "tensorrt", "tensorrt_rtx") else real(n, *a),
    )
    for module in ("openvino", "tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["AzureExecutionProvider"])
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    error = absence(name)
    assert isinstance(error, MissingPackageError)
    assert error.exit_code == 1
    remedy = {
        "openvino": "'causal-compress[openvino]'",
        "torch-compiled": "g++",
        "tensorrt": "'causal-compress[tensorrt]'",
    }
    remedy |= {"tensorrt-rtx": "'causal-compress[tensorrt-rtx]'"}
    assert remedy.get(name, "onnxruntime-gpu") in error.remedy
    if name != "torch-compiled":  # that one fails at its first batch
        with pytest.raises(MissingPackageError) as caught:
            open_runtime(name, folder / "m.onnx", threads=1)
        assert caught.value.remedy == error.remedy
