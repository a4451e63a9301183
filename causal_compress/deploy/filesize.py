"""How large a network's ONNX file is before there are weights for it; for plans, not for the scorecard."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from causal_compress.deploy.onnx import export_onnx
from causal_compress.deploy.qdq import FORMS, compact, insert, prepare
from causal_compress.recipe import QuantizeSection

_OPSET = 18


def in_int8(section: QuantizeSection | None) -> bool:
    """Whether the file that a budget is about has 8 bits: the INT8 form for CPUs is made."""
    return section is not None and "cpu" in section.families


def bytes_each(section: QuantizeSection | None) -> int:
    """What a weight takes in the file."""
    return 1 if in_int8(section) else 4


def sizer_for(section: QuantizeSection | None, example_input: Tensor) -> Callable[[nn.Module], int]:
    """What tells the size of a network's file [bytes], by writing it.

    Args:
        section: Says whether there will be an INT8 form; None: there will not.
        example_input: Two or more inputs.
    """
    return partial(file_bytes, example_input=example_input, eight=in_int8(section))


def file_bytes(model: nn.Module, example_input: Tensor, *, eight: bool) -> int:
    """Size of the FP32 or INT8 file [bytes].

    Args:
        model: The network; its weights do not matter.
        example_input: Two or more inputs.
        eight: INT8, all layers, with ranges made up.

    Raises:
        ExportError: the network can't be exported or quantized.

    Limits: layers that quantizing leaves in FP32 for their accuracy make the file larger than foreseen here.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_onnx(model, example_input, path, opset=_OPSET)
        if not eight:
            return path.stat().st_size
        prepared = prepare(path.read_bytes(), "cpu")
    values = [*prepared.graph.input, *prepared.graph.value_info, *prepared.graph.output]
    names = {value.name for value in values} | {name for node in prepared.graph.node for name in node.output}
    return len(compact(insert(prepared, dict.fromkeys(names, (-1.0, 1.0)), FORMS["cpu"])))
