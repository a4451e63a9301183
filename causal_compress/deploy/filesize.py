"""How large a network's ONNX file is before there are weights for it; for plans, not for the scorecard."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor, nn

from causal_compress.deploy.onnx import export_onnx

FP32_BYTES = 4
INT8_BYTES = 1
_OPSET = 18
_LAYER_BYTES = 1100
"""Scales, zero points and nodes that an INT8 layer brings with it: 600 to 1,050 in files measured (LOG.md)."""


def onnx_bytes(model: nn.Module, example_input: Tensor) -> int:
    """Size of the FP32 file [bytes], by writing it.

    Args:
        model: The network; its weights do not matter.
        example_input: Two or more inputs.

    Raises:
        ExportError: the network can't be exported.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_onnx(model, example_input, path, opset=_OPSET)
        return path.stat().st_size


def int8_bytes(model: nn.Module) -> int:
    """Size of the INT8 file [bytes], estimated, a little too high: quantizing takes weights and inputs.

    Args:
        model: The network; its weights do not matter.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    rest = sum(parameter.numel() for parameter in model.parameters()) - weights
    return INT8_BYTES * weights + FP32_BYTES * rest + _LAYER_BYTES * len(layers)
