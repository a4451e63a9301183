"""A multi-layer perceptron for tables: `--arch examples/mlp.py:mlp --set model.args.inputs=118`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def mlp(inputs: int, hidden: Sequence[int] = (256, 128), classes: int = 2) -> nn.Sequential:
    """Linear layers with ReLU between them; logits come out.

    Args:
        inputs: Encoded columns of the table.
        hidden: Width of each hidden layer.
        classes: Number of logits.
    """
    layers: list[nn.Module] = []
    width = inputs
    for wider in hidden:
        layers += [nn.Linear(width, wider), nn.ReLU()]
        width = wider
    return nn.Sequential(*layers, nn.Linear(width, classes))
