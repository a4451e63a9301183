"""Forms of an ONNX file: what precision it has, its FP16 form, and forms that Turing GPUs can build."""

from __future__ import annotations

from typing import Any, Literal

from causal_compress.errors import ExportError

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")


def precision_of(content: bytes) -> Precision:
    """Precision of an ONNX model, read from its operators and weights.

    Args:
        content: The file.

    Returns:
        int8 where it holds QuantizeLinear, fp16 where it holds 16-bit weights, fp32 otherwise.

    Raises:
        ExportError: it is no ONNX model.
    """
    import onnx

    graph = parse_onnx(content).graph
    if any(node.op_type == "QuantizeLinear" for node in graph.node):
        return "int8"
    half = any(weight.data_type == onnx.TensorProto.FLOAT16 for weight in graph.initializer)
    return "fp16" if half else "fp32"


def to_fp16(content: bytes) -> bytes:
    """The model with weights and arithmetic in 16 bits; inputs and logits stay float32.

    Args:
        content: An FP32 ONNX model.

    Returns:
        The FP16 model.

    Raises:
        ExportError: a weight is beyond what 16 bits hold (65,504), so logits would turn infinite.

    Source: onnxruntime.transformers.float16, kept up by ONNX Runtime, which this package needs anyway; NVIDIA's
        nvidia-modelopt does it too, but brings a stack of its own.
    Limits: activations can still overflow; the parity of the FP16 file on real inputs would show it.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = parse_onnx(content)
    _refuse_large_weights(model)
    half = convert_float_to_float16(model, keep_io_types=True)
    converted: bytes = half.SerializeToString(deterministic=True)
    return converted


def linears_as_convolutions(content: bytes) -> tuple[bytes, int]:
    """The model with every Gemm of constant weights as a 1x1 convolution, which computes the same.

    Args:
        content: An ONNX model.

    Returns:
        The model, and how many were replaced.

    Limits: only y = x W + b (alpha = beta = 1) on N x features; products of two activations stay.
    """
    model = parse_onnx(content)
    weights = {weight.name: weight for weight in model.graph.initializer}
    scaled = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    nodes: list[Any] = []
    count = 0
    for node in model.graph.node:
        dequantize = scaled.get(node.input[1]) if _is_plain_gemm(node) else None
        stored = node.input[1] if dequantize is None and _is_plain_gemm(node) else dequantize and dequantize.input[0]
        if stored in weights:
            nodes += _as_convolution(node, weights[stored], dequantize, model.graph)
            count += 1
        else:
            nodes.append(node)
    return _with_nodes(model, nodes), count


def products_in_half(content: bytes) -> tuple[bytes, int]:
    """The model with its matrix products in 16 bits between casts, those of dequantized values too.

    Args:
        content: An ONNX model, FP32 or INT8.

    Returns:
        The model, and how many were changed.

    Limits: values beyond what 16 bits hold (65,504) turn infinite; the parity of the engine would show it.
    """
    from onnx import TensorProto, helper

    model = parse_onnx(content)
    nodes: list[Any] = []
    count = 0
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            nodes.append(node)
            continue
        count += 1
        name, (result,) = node.name or node.output[0], node.output
        halves = [f"{name}_half_{index}" for index in range(len(node.input))]
        for value, half in zip(node.input, halves, strict=True):
            nodes.append(helper.make_node("Cast", [value], [half], name=f"{half}_cast", to=TensorProto.FLOAT16))
        del node.input[:]
        node.input.extend(halves)
        node.output[0] = f"{name}_half"
        back = helper.make_node("Cast", [f"{name}_half"], [result], name=f"{name}_back", to=TensorProto.FLOAT)
        nodes += [node, back]
    return _with_nodes(model, nodes), count


def _with_nodes(model: Any, nodes: list[Any]) -> bytes:
    import onnx

    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # shapes and types of before
    onnx.checker.check_model(model)
    changed: bytes = model.SerializeToString(deterministic=True)
    return changed


def parse_onnx(content: bytes) -> Any:
    """An ONNX model from a file's content.

    Args:
        content: The file.

    Returns:
        onnx.ModelProto.

    Raises:
        ExportError: it is no ONNX model.
    """
    import onnx

    found = "no graph in it"
    model: Any = None
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf has several implementations, each with its own
        found = str(error).partition("\n")[0]
    if model is None or not model.graph.node or not model.graph.input:
        raise ExportError("that is no ONNX model", found=found, remedy="give a file that export wrote")
    return model


def _refuse_large_weights(model: Any) -> None:
    import numpy as np
    from onnx import TensorProto, numpy_helper

    for weight in model.graph.initializer:
        if weight.data_type == TensorProto.FLOAT:
            largest = float(np.max(np.abs(numpy_helper.to_array(weight)), initial=0.0))
            if not largest <= float(np.finfo(np.float16).max):
                raise ExportError(
                    f"{weight.name} can't be held in 16 bits",
                    found=f"a weight of {largest:.3g}",
                    wanted="at most 65,504",
                    remedy="export --precision fp32, or int8",
                )


def _is_plain_gemm(node: Any) -> bool:
    if node.op_type != "Gemm":
        return False
    given = {attribute.name: attribute for attribute in node.attribute}
    scaled = any(given[name].f != 1.0 for name in ("alpha", "beta") if name in given)
    return not scaled and not ("transA" in given and given["transA"].i)


def _as_convolution(node: Any, weight: Any, dequantize: Any, graph: Any) -> list[Any]:
    """The nodes that stand for a Gemm; a quantized weight stays quantized, with its scales on the outputs."""
    from onnx import helper, numpy_helper

    matrix = numpy_helper.to_array(weight)
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    name = node.name or node.output[0]
    kernel = (matrix if transposed else matrix.T)[:, :, None, None].copy()
    values = {"kernel": kernel, "in": _int64(0, -1, 1, 1), "out": _int64(0, -1)}
    graph.initializer.extend(numpy_helper.from_array(value, f"{name}_{key}") for key, value in values.items())
    before, used = [], f"{name}_kernel"
    if dequantize is not None:
        used = f"{name}_scaled"
        inputs = [f"{name}_kernel", *dequantize.input[1:]]
        before = [helper.make_node("DequantizeLinear", inputs, [used], name=f"{name}_scale", axis=0)]
    bias = [node.input[2]] if len(node.input) > 2 else []
    return [
        *before,
        helper.make_node("Reshape", [node.input[0], f"{name}_in"], [f"{name}_image"], name=f"{name}_to_image"),
        helper.make_node("Conv", [f"{name}_image", used, *bias], [f"{name}_sum"], name=f"{name}_as_conv"),
        helper.make_node("Reshape", [f"{name}_sum", f"{name}_out"], [node.output[0]], name=f"{name}_to_rows"),
    ]


def _int64(*values: int) -> Any:
    import numpy as np

    return np.array(values, dtype=np.int64)
