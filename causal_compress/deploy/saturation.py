"""Whether INT8 products overflow on this CPU: x86 without VNNI adds pairs of them in 16 bits."""

from __future__ import annotations

import functools

import numpy as np

from causal_compress.deploy.absent import import_onnxruntime

_LARGEST = (255, 127)
_TERMS, _COLUMNS = 64, 16


@functools.cache
def saturates() -> bool:
    """Whether ONNX Runtime gets the product of the largest 8-bit numbers wrong here: found out by multiplying them.

    Where it does, weights have to do with 7 bits, or networks answer anything at all.
    """
    from onnx import TensorProto, helper, numpy_helper

    weights = np.full((_TERMS, _COLUMNS), _LARGEST[1], dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, _TERMS])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, _COLUMNS])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = import_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, _TERMS), _LARGEST[0], dtype=np.uint8)})
    return bool((found != _TERMS * _LARGEST[0] * _LARGEST[1]).any())
