"""INT8 forms of an ONNX file: QuantizeLinear and DequantizeLinear nodes, put in as the runtime wants them.

onnxruntime.quantization does the inserting: it is kept up with the kernels that run the result, knows which operators
pass integers on, and needs no package that this one doesn't need anyway. NNCF (OpenVINO's) and nvidia-modelopt insert
for their own runtimes and bring stacks of their own; torch.ao.quantization is being retired for torchao, whose PT2E
export writes no QDQ that all three runtimes take.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from causal_compress.deploy.package import first_lines, quiet
from causal_compress.deploy.precision import linears_as_convolutions, parse_onnx
from causal_compress.errors import ExportError

Family = Literal["cpu", "tensorrt"]
Ranges = Mapping[str, tuple[float, float]]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PASSING = (
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Slice", "Pad"),
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"),
)
_LOGGERS = ("root", "onnxruntime.quantization.shape_inference")


@dataclass(frozen=True)
class Form:
    """What a runtime family wants.

    Args:
        file: Name in the run folder.
        signed: Activations are signed and symmetric; else unsigned with a zero point.
        operators: What is quantized.
        float_outputs: Operators whose output stays float unless the next one rounds it.
    """

    file: str
    signed: bool
    operators: tuple[str, ...]
    float_outputs: tuple[str, ...]


FORMS: dict[Family, Form] = {
    # Unsigned: x86 kernels multiply unsigned by signed bytes; signed activations are slower than FP32 there.
    "cpu": Form(
        file="model.int8.onnx",
        signed=False,
        operators=(*_LAYERS, "Add", "Relu", "Clip", *_PASSING),
        float_outputs=("Gemm", "MatMul"),
    ),
    # TensorRT fuses convolution, addition and activation by itself where only their inputs are rounded.
    "tensorrt": Form(file="model.int8.trt.onnx", signed=True, operators=_LAYERS, float_outputs=_LAYERS),
}


def prepare(content: bytes, family: Family) -> Any:
    """Prepare an FP32 model as ONNX Runtime advises: shapes inferred, constants and batch norms folded.

    Args:
        content: The .onnx file.
        family: For TensorRT, linear layers become 1x1 convolutions, since Turing GPUs can't build small matrix
            products; all other tensors keep their names and values, so one calibration serves both.

    Returns:
        onnx.ModelProto; every node has a name.

    Raises:
        ExportError: ONNX Runtime refuses the model.
    """
    import onnx
    from onnxruntime.quantization import quant_pre_process
    from onnxruntime.quantization.quant_utils import add_infer_metadata

    if family == "tensorrt":
        content = _without_unused(linears_as_convolutions(content)[0])
    with tempfile.TemporaryDirectory() as folder, quiet(*_LOGGERS):
        source, target = Path(folder) / "model.onnx", Path(folder) / "prepared.onnx"
        source.write_bytes(content)
        try:
            # The exporter knows all shapes, so the symbolic inference, which needs sympy, would add nothing.
            quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
            model = onnx.load(target)
        except Exception as error:  # onnx and onnxruntime have exceptions of several kinds
            raise ExportError(
                "the ONNX model can't be prepared for INT8",
                found=first_lines(error),
                remedy="set quantize to null, or try another export.opset",
            ) from error
    add_infer_metadata(model)  # or every insertion would write the file and infer the shapes again
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    return model


def layers(model: Any) -> tuple[str, ...]:
    """Nodes that multiply: convolutions and matrix products, in order.

    Args:
        model: onnx.ModelProto.

    Returns:
        Node names.
    """
    return tuple(node.name for node in model.graph.node if node.op_type in _LAYERS)


def insert(
    model: Any,
    ranges: Ranges,
    form: Form,
    *,
    excluded: Collection[str] = (),
    only: Sequence[str] = (),
    reduce_range: bool = False,
) -> Any:
    """Quantize a model: weights symmetric, signed, one scale per output channel, stored as bytes; biases stay FP32.

    Args:
        model: What `prepare` gave; left as it was.
        ranges: Tensor name -> range of its values.
        form: What the runtime wants.
        excluded: Layers that stay FP32.
        only: If given, no other layer is quantized.
        reduce_range: 7-bit weights, for x86 CPUs without VNNI, whose 16-bit sums overflow.

    Returns:
        onnx.ModelProto.

    Raises:
        ExportError: the library refuses the model.
    """
    import onnx
    from onnxruntime.quantization import QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    data = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    kept = {*_feeding(model, excluded), *_with_constant(model)}
    options = {
        "ActivationSymmetric": form.signed,
        # TensorRT refuses INT32 biases; ONNX Runtime and OpenVINO round float biases themselves, at equal speed.
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": list(form.float_outputs),
    }
    try:
        with quiet(*_LOGGERS):
            quantizer = QDQQuantizer(
                copied,
                True,  # per channel
                reduce_range,
                QuantType.QInt8,
                QuantType.QInt8 if form.signed else QuantType.QUInt8,
                TensorsData(CalibrationMethod.MinMax, data),
                list(only),
                sorted(kept),
                list(form.operators),
                options,
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()  # the library does so only where it writes the file itself
            return quantizer.model.model
    except Exception as error:  # the library raises whatever it meets
        remedy = "set quantize to null, or update onnxruntime"
        raise ExportError("the model can't be quantized", found=first_lines(error), remedy=remedy) from error


def compact(model: Any) -> bytes:
    """The model as a file without what no runtime reads: inferred shapes, long tensor names, traces of tools.

    Args:
        model: A quantized onnx.ModelProto; left as it was. Inputs, outputs and layers keep their names.

    Returns:
        The content of an .onnx file.

    Raises:
        ExportError: the library wrote an invalid model.
    """
    import onnx

    small = onnx.ModelProto()
    small.CopyFrom(model)
    graph = small.graph
    del graph.value_info[:], small.metadata_props[:], graph.metadata_props[:]
    used = {node.domain for node in graph.node}
    imports = [entry for entry in small.opset_import if entry.domain in used]
    del small.opset_import[:]
    small.opset_import.extend(imports)
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.name = ""
    if not any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        _shorten(graph)
    try:
        onnx.checker.check_model(small, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            "the quantized model is invalid", found=first_lines(error), remedy="set quantize to null, or update onnx"
        ) from error
    content: bytes = small.SerializeToString(deterministic=True)
    return content


def _without_unused(content: bytes) -> bytes:
    """ONNX Runtime would write a line to stderr about each weight that nothing reads."""
    model = parse_onnx(content)
    read = {name for node in model.graph.node for name in node.input}
    weights = [weight for weight in model.graph.initializer if weight.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
    cleaned: bytes = model.SerializeToString()
    return cleaned


def _feeding(model: Any, excluded: Collection[str]) -> set[str]:
    """The excluded layers, and what passes values on to them alone: rounding there would spoil what was spared."""
    kept = set(excluded)
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.name)
    for node in reversed(model.graph.node):
        read = {reader for name in node.output for reader in readers.get(name, ())}
        if node.op_type in (*_PASSING, "Add") and read and read <= kept:
            kept.add(node.name)
    return kept


def _with_constant(model: Any) -> Iterator[str]:
    """Additions of a constant: a bias or part of an activation function, which rounding would only harm."""
    constants = {weight.name for weight in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Add" and constants.intersection(node.input):
            yield node.name


def _shorten(graph: Any) -> None:
    kept = {value.name for value in (*graph.input, *graph.output)}
    fresh = (name for number in itertools.count() if (name := f"t{number:x}") not in kept)
    short: dict[str, str] = {"": "", **{name: name for name in kept}}

    def rename(name: str) -> str:
        if name not in short:
            short[name] = next(fresh)
        return short[name]

    for node in graph.node:
        _rename_all(node.input, rename)
        _rename_all(node.output, rename)
    for weight in graph.initializer:
        weight.name = rename(weight.name)


def _rename_all(names: Any, rename: Callable[[str], str]) -> None:
    for place, name in enumerate(names):
        names[place] = rename(name)
