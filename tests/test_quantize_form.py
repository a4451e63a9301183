"""The rounded graph: its form for each family of hardware, and biases that take up the shifts of rounding."""

import numpy as np
import onnx
import pytest
import quantize_sample
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from quantize_sample import Data, Residual, Sequence, arrays, ranged, trained
from torch import nn

from causal_compress.deploy.calibration import collect
from causal_compress.deploy.onnx import export_onnx
from causal_compress.deploy.qdq import FORMS, compact, insert, layers, prepare
from causal_compress.deploy.runtimes import OnnxRuntime
from causal_compress.deploy.sensitivity import mean_shifts, with_biases
from causal_compress.errors import DataError, ExportError

student, onnx_path = quantize_sample.student, quantize_sample.onnx_path  # fixtures


def exported(model: nn.Module, folder):
    export_onnx(model, Data().example_input, folder / "m.onnx", opset=18)
    return (folder / "m.onnx").read_bytes()


def answers(content: bytes, folder, x) -> np.ndarray:
    (folder / "run.onnx").write_bytes(content)
    return OnnxRuntime.load(folder / "run.onnx").run(x)


def scale_zero(model) -> dict[str, np.ndarray]:
    return {weight.name: numpy_helper.to_array(weight) for weight in model.graph.initializer}


def test_no_calibration_inputs_are_refused(onnx_path):
    with pytest.raises(DataError, match="calibrate"):
        collect(prepare(onnx_path.read_bytes(), "cpu"), [])


@pytest.mark.parametrize("family", ["cpu", "tensorrt"])
def test_weights_are_stored_as_bytes_per_channel_and_biases_as_floats(onnx_path, family):
    model = prepare(onnx_path.read_bytes(), family)
    quantized = onnx.load_model_from_string(compact(insert(model, ranged(model), FORMS[family])))
    weights, makers = scale_zero(quantized), {name: node for node in quantized.graph.node for name in node.output}
    found = [node for node in quantized.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(found) == 4
    for node in found:
        source = makers[node.input[1]]
        assert source.op_type == "DequantizeLinear"
        stored, scale, zero = (weights[name] for name in source.input)
        assert stored.dtype == np.int8
        assert not zero.any()
        assert scale.shape == (stored.shape[0],)
        assert np.abs(stored.astype(int)).max(axis=tuple(range(1, stored.ndim))).min() >= 126  # each uses its range
        if len(node.input) == 3:
            assert weights[node.input[2]].dtype == np.float32
    assert sum(weight.size for weight in weights.values() if weight.dtype == np.float32) < 200
    assert not [weight for weight in weights.values() if weight.dtype == np.int32]


def test_tensorrt_gets_signed_symmetric_activations_before_layers_only_and_no_products(onnx_path):
    model = prepare(onnx_path.read_bytes(), "tensorrt")
    quantized = insert(model, ranged(model), FORMS["tensorrt"])
    weights = scale_zero(quantized)
    roundings = [node for node in quantized.graph.node if node.op_type == "QuantizeLinear"]
    assert roundings
    for node in roundings:
        zero = weights[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
    kinds = [node.op_type for node in quantized.graph.node]
    assert "Gemm" not in kinds
    assert kinds.count("Relu") == 3  # only a runtime without negative steps can drop them


def test_cpus_get_unsigned_activations_and_float_logits(onnx_path):
    model = prepare(onnx_path.read_bytes(), "cpu")
    quantized = insert(model, ranged(model), FORMS["cpu"])
    weights = scale_zero(quantized)
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear":
            assert weights[node.input[2]].dtype == np.uint8
    assert next(node.op_type for node in quantized.graph.node if "logits" in node.output) == "Gemm"


def test_compacting_keeps_answers_and_names_that_count(onnx_path, tmp_path):
    model = prepare(onnx_path.read_bytes(), "cpu")
    quantized = insert(model, ranged(model), FORMS["cpu"])
    small = compact(quantized)
    x = Data().validation.x[:5].numpy()
    np.testing.assert_array_equal(answers(small, tmp_path, x), answers(quantized.SerializeToString(), tmp_path, x))
    assert len(small) < 0.8 * quantized.ByteSize()
    again = onnx.load_model_from_string(small)
    assert (again.graph.input[0].name, again.graph.output[0].name) == ("input", "logits")
    assert set(layers(model)) <= {node.name for node in again.graph.node}
    assert not again.graph.value_info
    assert small == compact(quantized)


def test_what_is_no_model_is_refused():
    with pytest.raises(ExportError, match="prepared for INT8"):
        prepare(b"nothing", "cpu")


# ---- bias correction


@pytest.mark.parametrize("build", [Residual, Sequence])
def test_biases_take_up_the_shifts_of_all_layers(build, tmp_path):
    model = prepare(exported(trained(build()), tmp_path), "cpu")
    shifts = mean_shifts(model, insert(model, ranged(model), FORMS["cpu"]), arrays(Data().calibration), threads=1)
    assert set(shifts) == set(layers(model))
    assert all(np.abs(shift).max() > 0 for shift in shifts.values())
    lowered, done = with_biases(model, shifts)
    assert set(done) == set(layers(model))
    before, after = scale_zero(model), scale_zero(lowered)
    moved = {name: before.get(name, 0) - value for name, value in after.items() if before.get(name) is not value}
    taken = [value for value in moved.values() if value.dtype == np.float32 and np.abs(value).max() > 0]
    for shift in shifts.values():
        assert any(value.shape == shift.shape and np.allclose(value, shift, atol=1e-6) for value in taken)
    assert len(taken) == len(shifts)


def test_a_shift_by_hand(onnx_path, student):
    """The first layer reads the input itself, so torch can repeat what its twin does."""
    model = prepare(onnx_path.read_bytes(), "cpu")
    ranges = ranged(model)
    data = torch.from_numpy(np.concatenate(arrays(Data().calibration)))
    shifts = mean_shifts(model, insert(model, ranges, FORMS["cpu"]), [data.numpy()], threads=1)
    low, high = ranges["input"]
    scale = (high - low) / 255
    zero = round(-low / scale)
    rounded = (torch.clamp(torch.round(data / scale) + zero, 0, 255) - zero) * scale
    weight = student.first.weight
    steps = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    whole = torch.round(weight / steps) * steps
    wanted = (F.conv2d(rounded, whole, padding=1) - F.conv2d(data, weight, padding=1)).mean((0, 2, 3))
    np.testing.assert_allclose(shifts[layers(model)[0]], wanted.numpy(), atol=2e-5)


def test_a_shared_bias_stays_as_it_is(onnx_path):
    model = prepare(onnx_path.read_bytes(), "cpu")
    convolutions = [node for node in model.graph.node if node.op_type == "Conv" and len(node.input) == 3]
    convolutions[1].input[2] = convolutions[0].input[2]
    _, done = with_biases(model, {convolutions[0].name: np.ones(8, np.float32)})
    assert done == ()
