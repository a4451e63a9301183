"""What rounding does to each layer: the mean shift of its output, biases that take it up, layers that stay in FP32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from causal_compress.deploy.calibration import open_outputs

_PREFIX = "twin/"


def fewest(holds: Callable[[int], bool], most: int) -> int | None:
    """The smallest number that holds, found in about 2 log2(most) questions.

    Args:
        holds: Asked with 1, 2, 4, .. and then between the last that failed and the first that held.
        most: Largest number that may be asked.

    Returns:
        The number; None if not even `most` holds.

    Limits: taken as monotonous; where it is not, the answer holds but may not be the smallest.
    """
    failed, tried = 0, min(1, most)
    while tried > failed and not holds(tried):
        failed, tried = tried, min(2 * tried, most)
    if tried == failed:
        return None
    while tried - failed > 1:
        middle = (failed + tried) // 2
        if holds(middle):
            tried = middle
        else:
            failed = middle
    return tried


def mean_shifts(
    model: Any, quantized: Any, batches: Iterable[NDArray[np.float32]], *, threads: int
) -> dict[str, NDArray[np.float32]]:
    """How far rounding moves each layer's output on average, layer by layer: each one reads the FP32 network's inputs.

    Args:
        model: onnx.ModelProto in FP32.
        quantized: The same model with QuantizeLinear and DequantizeLinear, nodes named alike.
        batches: N x ..., normalised.
        threads: Threads inside an operator.

    Returns:
        Layer -> mean of (rounded - FP32) over inputs and positions, one number per output channel; layers whose
        weights and inputs are not both rounded are left out.

    Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2 (empirical bias correction); here all layers are measured
        in one pass, since none sees another's rounding.
    """
    twins, names = _twins(model, quantized)
    if not names:
        return {}
    run = open_outputs(twins, [f"{_PREFIX}{name}/shift" for name in names], threads=threads)
    sums: list[NDArray[np.float64]] = [np.zeros(1)] * len(names)
    seen = 0
    for x in batches:
        sums = [total + len(x) * shift.astype(np.float64) for total, shift in zip(sums, run(x), strict=True)]
        seen += len(x)
    return {name: (total / max(seen, 1)).astype(np.float32) for name, total in zip(names, sums, strict=True)}


def with_biases(model: Any, shifts: Mapping[str, NDArray[np.float32]]) -> tuple[Any, tuple[str, ...]]:
    """The model with each layer's bias lowered by the mean shift of its output.

    Args:
        model: What `prepare` gave; left as it was.
        shifts: Layer -> one number per output channel.

    Returns:
        The model, and the layers that could be corrected: a product of activations, or a layer whose bias is shared or
        computed, could not.
    """
    import onnx

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes = {node.name: node for node in changed.graph.node}
    done = tuple(name for name, shift in shifts.items() if _lower_bias(changed.graph, nodes[name], shift))
    return changed, done


def _twins(model: Any, quantized: Any) -> tuple[Any, list[str]]:
    """The FP32 model, and beside each layer a rounded one on the same input; nothing reads the rounded ones."""
    import onnx

    both = onnx.ModelProto()
    both.CopyFrom(model)
    rounded = {node.name: node for node in quantized.graph.node if node.name}
    makers = {name: node for node in quantized.graph.node for name in node.output}
    constants = {weight.name: weight for weight in quantized.graph.initializer}
    names = []
    for node in model.graph.node:
        twin = rounded.get(node.name)
        sources = [makers[name] for name in twin.input[:2] if name in makers] if twin is not None else []
        if len(sources) == 2 and all(source.op_type == "DequantizeLinear" for source in sources):
            entry, weights = sources
            if weights.input[0] in constants and entry.input[0] not in constants:
                _add_twin(both.graph, node, (entry, weights), constants)
                names.append(node.name)
    return both, names


def _add_twin(graph: Any, node: Any, sources: tuple[Any, Any], constants: dict[str, Any]) -> None:
    import onnx
    from onnx import helper, numpy_helper

    entry, weights = sources
    own = f"{_PREFIX}{node.name}/"
    for name in (*entry.input[1:], *weights.input):
        copied = onnx.TensorProto()
        copied.CopyFrom(constants[name])
        copied.name = own + name
        graph.initializer.append(copied)
    scale = [own + name for name in entry.input[1:]]
    axis = [attribute for attribute in weights.attribute if attribute.name == "axis"]
    unrolled = helper.make_node("DequantizeLinear", [own + name for name in weights.input], [own + "weights"])
    unrolled.attribute.extend(axis)
    twin = onnx.NodeProto()
    twin.CopyFrom(node)
    twin.name = own + "node"
    twin.input[0], twin.input[1], twin.output[0] = own + "x", own + "weights", own + "y"
    graph.initializer.append(numpy_helper.from_array(_all_but_channels(graph, node), own + "axes"))
    graph.node.extend(
        [
            helper.make_node("QuantizeLinear", [node.input[0], *scale], [own + "steps"]),
            helper.make_node("DequantizeLinear", [own + "steps", *scale], [own + "x"]),
            unrolled,
            twin,
            helper.make_node("Sub", [own + "y", node.output[0]], [own + "difference"]),
            helper.make_node("ReduceMean", [own + "difference", own + "axes"], [own + "shift"], keepdims=0),
        ]
    )


def _all_but_channels(graph: Any, node: Any) -> NDArray[np.int64]:
    """Axes over which a layer's output is averaged; channels come second in images, last in sequences."""
    if node.op_type == "Gemm":
        return np.array([0], dtype=np.int64)
    if node.op_type in ("Conv", "ConvTranspose"):
        kernel = next(weight for weight in graph.initializer if weight.name == node.input[1])
        return np.array([0, *range(2, len(kernel.dims))], dtype=np.int64)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.output)}
    return np.arange(len(shapes[node.output[0]]) - 1, dtype=np.int64)


def _lower_bias(graph: Any, node: Any, shift: NDArray[np.float32]) -> bool:
    from onnx import numpy_helper

    weights = {weight.name: weight for weight in graph.initializer}
    scale = next((attribute.f for attribute in node.attribute if attribute.name == "beta"), 1.0)
    holder = _addition(graph, node) if node.op_type == "MatMul" else node
    if holder is None or scale == 0.0:
        return False
    place = _bias_place(holder, weights) if holder is not node else 2
    if len(holder.input) <= place or not holder.input[place]:
        del holder.input[place:]
        holder.input.append(f"{node.name}_bias")
        graph.initializer.append(numpy_helper.from_array(-shift / np.float32(scale), holder.input[place]))
        return True
    name = holder.input[place]
    uses = sum(list(other.input).count(name) for other in graph.node)
    if name not in weights or uses != 1 or list(weights[name].dims) != [len(shift)]:
        return False
    lowered = numpy_helper.to_array(weights[name]) - shift / np.float32(scale)
    weights[name].CopyFrom(numpy_helper.from_array(lowered.astype(np.float32), name))
    return True


def _addition(graph: Any, node: Any) -> Any:
    """The one addition of a constant that follows, which is a linear layer's bias on sequences; None without one."""
    readers = [other for other in graph.node if node.output[0] in other.input]
    constants = {weight.name for weight in graph.initializer}
    alone = len(readers) == 1 and readers[0].op_type == "Add" and constants.intersection(readers[0].input)
    return readers[0] if alone else None


def _bias_place(addition: Any, weights: Mapping[str, Any]) -> int:
    return next(place for place, name in enumerate(addition.input) if name in weights)
