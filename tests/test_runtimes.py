import builtins
import sys

import numpy as np
import pytest
import torch
from torch import nn

from causal_compress.deploy.onnx import export_onnx
from causal_compress.deploy.package import save_pt2
from causal_compress.deploy.runtimes import OnnxRuntime, TorchRuntime, open_runtime, torch_threads
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
