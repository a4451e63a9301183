"""Engines built without a GPU, and refused with the reason where they can't be built or run."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto, helper
from torch import nn

from causal_compress.deploy import tensorrt
from causal_compress.deploy.engines import EngineRuntime, read_engine_info
from causal_compress.deploy.onnx import export_onnx
from causal_compress.deploy.precision import linears_as_convolutions, precision_of, products_in_half, to_fp16
from causal_compress.deploy.runtimes import OnnxRuntime, open_runtime
from causal_compress.deploy.saturation import saturates
from causal_compress.deploy.tensorrt import CAPABILITIES, EngineOptions, build_engine, sidecar
from causal_compress.errors import ExportError, MissingPackageError, RunFolderError, UsageError
from causal_compress.files import sha256_of_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from cifar_resnet import resnet20

rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
no_gpu_here = pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
PRECISIONS = ("fp32", "fp16", "int8")


def quantized(path: Path, x: np.ndarray) -> Path:
    """QDQ as TensorRT wants it: symmetric signed activations, no quantized biases, only matrix products and sums."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Rows(CalibrationDataReader):
        def __init__(self):
            self.left = iter([{"input": x}])

        def get_next(self):
            return next(self.left, None)

    extra = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    out = path.with_suffix(".int8.onnx")
    quantize_static(
        path,
        out,
        Rows(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options=extra,
    )
    return out


def forms(model: nn.Module, shape: tuple[int, ...], folder: Path) -> dict[str, Path]:
    """The model's FP32, FP16 and INT8 ONNX files."""
    path = folder / "m.onnx"
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    export_onnx(model.eval(), x, path, opset=18)
    half = folder / "m.fp16.onnx"
    half.write_bytes(to_fp16(path.read_bytes()))
    return {"fp32": path, "fp16": half, "int8": quantized(path, x.numpy())}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.manual_seed(0)
    return forms(resnet20(), (3, 32, 32), tmp_path_factory.mktemp("r20"))


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # torchvision begins with zeros: all answers would be the same
    return forms(model, (3, 32, 32), tmp_path_factory.mktemp("vit"))


def check_engine(onnx_file: Path, precision: str, capability: str, folder: Path) -> None:
    engine = folder / f"{precision}.{capability}.engine"
    info = build_engine(onnx_file, engine, EngineOptions(capability=capability, batches=(1, 4, 16)))
    assert (info.precision, info.capability, info.profile) == (precision, capability, (1, 4, 16))
    assert info.size_bytes == engine.stat().st_size > 1000
    assert info.onnx_sha256 == sha256_of_file(onnx_file)
    assert read_engine_info(engine) == info


# ---- building


@rtx
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_resnet20_is_built_for_every_generation(small, precision, capability, tmp_path):
    check_engine(small[precision], precision, capability, tmp_path)


LARGE = {
    "alexnet": lambda: torchvision.models.alexnet(weights=None, num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(weights=None, num_classes=10),
    "vit_b_16": lambda: torchvision.models.vit_b_16(weights=None, num_classes=10),
}


@rtx
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", LARGE)
def test_large_networks_are_built_for_every_generation(name, tmp_path):
    torch.manual_seed(0)
    files = forms(LARGE[name](), (3, 224, 224), tmp_path)
    for precision in PRECISIONS:
        for capability in CAPABILITIES:
            check_engine(files[precision], precision, capability, tmp_path)


@rtx
def test_turing_gets_its_linear_layer_as_a_convolution(small, tmp_path):
    info = build_engine(small["fp32"], tmp_path / "e", EngineOptions(capability="SM75"))
    assert "1 linear layer(s) built as 1x1 convolutions" in info.notes[0]
    assert build_engine(small["fp32"], tmp_path / "f", EngineOptions(capability="SM89")).notes == ()


@rtx
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_turing_gets_attention_in_16_bits(attention, precision, tmp_path):
    info = build_engine(attention[precision], tmp_path / "e", EngineOptions(capability="SM75"))
    assert info.precision == precision
    assert "matrix product(s) computed in FP16: SM75 has no FP32 matrix product" in info.notes[-1]
    assert build_engine(attention[precision], tmp_path / "f", EngineOptions(capability="SM80")).notes == ()


@rtx
def test_parser_failure_names_the_node(tmp_path):
    text = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="/first/relu"),
        helper.make_node("StringNormalizer", ["a"], ["y"], name="/second/odd"),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", text[:1], text[1:]), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    (tmp_path / "odd.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"node /second/odd \(StringNormalizer\): UNSUPPORTED_NODE") as caught:
        build_engine(tmp_path / "odd.onnx", tmp_path / "e", EngineOptions(capability="SM89"))
    assert "/first/relu" not in str(caught.value)
    assert not (tmp_path / "e").exists()


@rtx
def test_what_is_not_onnx_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="no such file"):
        build_engine(tmp_path / "absent.onnx", tmp_path / "e", EngineOptions(capability="SM89"))
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="no ONNX model"):
        build_engine(tmp_path / "bad.onnx", tmp_path / "e", EngineOptions(capability="SM89"))


@rtx
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (EngineOptions(capability="SM42"), "SM89"),
        (EngineOptions(capability="SM89", batches=()), "--batch"),
        (EngineOptions(capability="SM89", batches=(0, 1)), "--batch"),
        (EngineOptions(capability="SM89", hardware_compatible=True), "--capability"),
        (EngineOptions(capability="SM89", version_compatible=True), "--capability"),
    ],
)
def test_wrong_options_are_refused(small, options, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        build_engine(small["fp32"], tmp_path / "e", options)


@rtx
def test_too_little_workspace_names_the_option(small, tmp_path):
    options = EngineOptions(capability="SM89", batches=(1, 8, 512), workspace_bytes=2**16)
    with pytest.raises(ExportError, match="--workspace"):
        build_engine(small["fp32"], tmp_path / "e", options)


@rtx
def test_fp32_is_not_computed_in_tf32():
    import tensorrt_rtx as trt

    config = tensorrt._configure(trt, trt.Builder(tensorrt.listener(trt)), EngineOptions(capability="SM89"))
    assert not config.get_flag(trt.BuilderFlag.TF32)


@rtx
@no_gpu_here
def test_the_gpu_here_is_needed_where_none_is_named(small, tmp_path):
    with pytest.raises(MissingPackageError, match="--capability SM89"):
        build_engine(small["fp32"], tmp_path / "e", EngineOptions())


def test_a_gpu_that_rtx_does_not_know_is_refused_before_the_build(small, monkeypatch, tmp_path):
    capabilities = SimpleNamespace(SM80=0, SM89=1)
    trt = SimpleNamespace(__version__="1.7", ComputeCapability=capabilities)
    trt.IBuilderConfig = SimpleNamespace(set_compute_capability=None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    with pytest.raises(UsageError, match="H100") as told:
        build_engine(small["fp32"], tmp_path / "e", EngineOptions())
    assert told.value.remedy.startswith("use --to tensorrt ")


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_absent_package_has_its_install_command(small, name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name.replace("-", "_"), None)  # importing it fails
    with pytest.raises(MissingPackageError, match=rf"pip install 'causal-compress\[{name}\]'"):
        build_engine(small["fp32"], tmp_path / "e", EngineOptions(runtime=name, capability="SM89"))
    with pytest.raises(MissingPackageError, match=rf"pip install 'causal-compress\[{name}\]'"):
        open_runtime(name, small["fp32"], threads=1)


# ---- the description beside the engine


@rtx
def test_engines_that_are_not_as_described_are_refused(small, tmp_path):
    engine = tmp_path / "m.engine"
    build_engine(small["fp32"], engine, EngineOptions(capability="SM89"))
    content, text = engine.read_bytes(), sidecar(engine).read_text()
    engine.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunFolderError, match="not the engine it describes"):
        EngineRuntime.load(engine, "tensorrt-rtx")
    engine.write_bytes(content)
    sidecar(engine).write_text(json.dumps({**json.loads(text), "version": "0.0.1"}))
    with pytest.raises(ExportError, match=r"built by tensorrt-rtx 0\.0\.1"):
        EngineRuntime.load(engine, "tensorrt-rtx")
    sidecar(engine).unlink()
    with pytest.raises(RunFolderError, match=r"m\.engine\.json"):
        EngineRuntime.load(engine, "tensorrt-rtx")
    with pytest.raises(RunFolderError, match="can't use the engine"):
        EngineRuntime.load(tmp_path / "absent.engine", "tensorrt-rtx")


@rtx
@no_gpu_here
def test_running_without_a_gpu_is_refused(small, tmp_path):
    engine = tmp_path / "m.engine"
    build_engine(small["fp32"], engine, EngineOptions(capability="SM89"))
    for path in (engine, small["fp32"]):
        with pytest.raises(MissingPackageError, match="no NVIDIA GPU"):
            EngineRuntime.load(path, "tensorrt-rtx")


@rtx
@gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_engines_answer_as_onnx_runtime(small, precision):
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)).numpy()
    runtime = EngineRuntime.load(small[precision], "tensorrt-rtx")
    wanted = OnnxRuntime.load(small[precision]).run(x)
    assert np.abs(runtime.run(x) - wanted).max() < {"fp32": 1e-2, "fp16": 5e-2, "int8": 0.2}[precision]
    assert (runtime.device_ms(x, rounds=10) > 0).all()
    with pytest.raises(UsageError, match="1 to 256"):
        runtime.run(np.zeros((257, 3, 32, 32), np.float32))


# ---- precisions


def test_precision_is_read_from_the_file(small):
    assert {name: precision_of(path.read_bytes()) for name, path in small.items()} == {n: n for n in PRECISIONS}


def test_fp16_keeps_inputs_outputs_and_answers(small):
    x = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1)).numpy()
    model = onnx.load(small["fp16"])
    assert {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)} == {TensorProto.FLOAT}
    assert small["fp16"].stat().st_size < 0.6 * small["fp32"].stat().st_size
    half, whole = OnnxRuntime.load(small["fp16"]).run(x), OnnxRuntime.load(small["fp32"]).run(x)
    assert 0 < np.abs(half - whole).max() < 0.05


def test_fp16_refuses_weights_beyond_its_range(tmp_path):
    model = nn.Linear(4, 2)
    nn.init.constant_(model.weight, 1e6)
    export_onnx(model, torch.ones(2, 4), tmp_path / "big.onnx", opset=18)
    with pytest.raises(ExportError, match="16 bits"):
        to_fp16((tmp_path / "big.onnx").read_bytes())


def test_linears_as_convolutions_compute_the_same(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    export_onnx(model, torch.ones(2, 4), tmp_path / "m.onnx", opset=18)
    changed, count = linears_as_convolutions((tmp_path / "m.onnx").read_bytes())
    (tmp_path / "c.onnx").write_bytes(changed)
    assert count >= 1
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    np.testing.assert_allclose(
        OnnxRuntime.load(tmp_path / "c.onnx").run(x), OnnxRuntime.load(tmp_path / "m.onnx").run(x), atol=1e-5
    )


def test_quantized_linears_stay_quantized_as_convolutions(small, tmp_path):
    changed, count = linears_as_convolutions(small["int8"].read_bytes())
    (tmp_path / "c.onnx").write_bytes(changed)
    assert count == 1
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).numpy()
    np.testing.assert_allclose(
        OnnxRuntime.load(tmp_path / "c.onnx").run(x), OnnxRuntime.load(small["int8"]).run(x), atol=1e-4
    )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_products_in_16_bits_change_answers_little(attention, precision, tmp_path):
    if precision == "int8" and saturates():
        pytest.skip("this CPU gets INT8 products of activations wrong, so there is nothing to compare with")
    content = attention[precision].read_bytes()
    changed, count = products_in_half(content)
    assert count == sum(node.op_type in ("MatMul", "Gemm") for node in onnx.load_model_from_string(content).graph.node)
    (tmp_path / "h.onnx").write_bytes(changed)
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).numpy()
    half, whole = (OnnxRuntime.load(path).run(x) for path in (tmp_path / "h.onnx", attention[precision]))
    assert np.abs(half - whole).max() < 0.01 * np.abs(whole).max()
    assert precision == "int8" or (half != whole).any()  # 16 bits may hold quantized values exactly
    assert precision_of(changed) == precision
