"""Why fewer multiply-adds bring no speed: what a model costs besides them, and what its latencies say."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from causal_compress.deploy.precision import parse_onnx

_OVERHEAD_SHARE = 0.5  # of the latency at the smallest batch that does not grow with the batch
_FORM = ("QuantizeLinear", "DequantizeLinear", "Cast")
_WORTH_SAYING = 0.75  # a speed-up below this share of the fall in MACs


@dataclass(frozen=True)
class Traffic:
    """What one input costs in an ONNX graph: multiply-adds, operators, and bytes of activations and weights."""

    macs: int
    operators: int
    activation_bytes: int
    weight_bytes: int


def onnx_traffic(content: bytes) -> Traffic | None:
    """Cost of one input, from the graph's shapes.

    Args:
        content: An ONNX file; weights that lie in files beside it are not read.

    Returns:
        The cost; None where the shapes of the graph can't be inferred.

    Limits: MACs of Conv, Gemm and MatMul only; each activation is counted once, as if operators were not fused.
    """
    import onnx

    model = parse_onnx(content)
    batch = declared_batch(model) or 1
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim[:1]:
            if dim.dim_param:
                dim.dim_value = 1
    del model.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {value.name: _shape(value) for value in (*graph.input, *graph.output, *graph.value_info)}
    shapes |= {weight.name: tuple(weight.dims) for weight in graph.initializer}
    computing = [
        node for node in graph.node if node.op_type not in _FORM
    ]  # how numbers are stored is no work of its own
    produced = [shapes.get(name) for node in computing for name in node.output]
    if any(shape is None for shape in produced):
        return None
    weights = _weight_bytes(graph)
    activations = sum(4 * prod(shape) for shape in produced if shape is not None)
    return Traffic(round(_macs(graph, shapes) / batch), len(computing), round(activations / batch), weights)


def declared_batch(model: Any) -> int | None:
    """The batch size that an ONNX model fixes.

    Args:
        model: onnx.ModelProto.

    Returns:
        The first dimension of its input; None where that is free, or the model does not tell.
    """
    weights = {weight.name for weight in model.graph.initializer}  # which older files list among the inputs
    given = next((value for value in model.graph.input if value.name not in weights), None)
    sizes = given.type.tensor_type.shape.dim if given is not None else ()
    return sizes[0].dim_value or None if sizes else None


def why_no_speed(
    reference: Traffic, other: Traffic, speedup: float, latencies_ms: dict[int, tuple[float, float]]
) -> str | None:
    """Why a model with fewer MACs is not as much faster.

    Args:
        reference: The reference's cost.
        other: The other's.
        speedup: Reference's latency over the other's, at the smallest batch.
        latencies_ms: Batch -> medians of reference and other, on one runtime.

    Returns:
        A sentence; None where the speed-up keeps up with the MACs, or MACs did not fall.
    """
    if other.macs <= 0 or reference.macs <= other.macs or speedup >= _WORTH_SAYING * reference.macs / other.macs:
        return None
    told = f"MACs fell {reference.macs / other.macs:.1f}x, latency {speedup:.2f}x: "
    fixed, smallest = _fixed_share(latencies_ms)
    if fixed is not None and fixed > _OVERHEAD_SHARE:
        return told + (
            f"launch-bound: {100 * fixed:.0f} % of its time at batch {smallest} does not grow with the batch "
            f"({other.operators} operators, {reference.operators} before); merging regions removes operators, "
            "narrowing does not"
        )
    bytes_before = reference.activation_bytes + reference.weight_bytes
    moved = (other.activation_bytes + other.weight_bytes) / bytes_before
    if moved > 1.2 * other.macs / reference.macs:
        return told + (
            f"memory-bound: {moved:.2f} of the bytes are still moved for {other.macs / reference.macs:.2f} of the MACs"
        )
    return told + "the kernels run less efficiently on its widths: plan.align: cpu (or tensor-cores) suits them better"


def _fixed_share(latencies_ms: dict[int, tuple[float, float]]) -> tuple[float | None, int]:
    """Share of the smallest batch's latency that a straight line through two batches leaves at batch 0."""
    small, large = min(latencies_ms), max(latencies_ms)
    if large <= small:
        return None, small
    first, last = latencies_ms[small][1], latencies_ms[large][1]
    slope = max(0.0, (last - first) / (large - small))
    return max(0.0, first - slope * small) / first, small


def _shape(value: Any) -> tuple[int, ...] | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or any(not dim.HasField("dim_value") for dim in kind.shape.dim):
        return None
    return tuple(dim.dim_value for dim in kind.shape.dim)


def _weight_bytes(graph: Any) -> int:
    """From dimensions and types, because the numbers themselves may lie in a file beside."""
    from onnx.helper import tensor_dtype_to_np_dtype

    return sum(prod(weight.dims) * tensor_dtype_to_np_dtype(weight.data_type).itemsize for weight in graph.initializer)


def _macs(graph: Any, shapes: dict[str, tuple[int, ...] | None]) -> int:
    total = 0
    sources = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        out = shapes[node.output[0]]
        if node.op_type == "Conv":
            weight = _through(node.input[1], sources, shapes)
            total += prod(out or ()) * prod(weight[1:])
        elif node.op_type in ("Gemm", "MatMul"):
            left = _through(node.input[0], sources, shapes)
            inner = left[0] if _is_transposed(node) else left[-1]
            total += prod(out or ()) * inner
    return total


def _is_transposed(node: Any) -> bool:
    return any(attribute.name == "transA" and attribute.i for attribute in node.attribute)


def _through(name: str, sources: dict[str, Any], shapes: dict[str, tuple[int, ...] | None]) -> tuple[int, ...]:
    """Shape of a value, or of what it was dequantized from."""
    while shapes.get(name) is None and name in sources:
        name = sources[name].input[0]
    return shapes.get(name) or (0,)
