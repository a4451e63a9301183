"""What refits aim at: the teacher's values before a region's final activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causal_compress.understand.graph import ends, observer
from causal_compress.understand.tail import find_tail
from causal_compress.understand.trace import Network


def before_and_after(network: Network, index: int, entering: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """A region's values before its final activation (empty where it has no affine tail) and its outputs."""
    piece = network.regions[index].module
    tail = find_tail(piece)
    nodes = [ends(piece)[1]] if isinstance(tail, str) else [ends(piece)[1], tail.pre]
    watch = observer(piece, nodes)
    with torch.no_grad():
        values = [watch(x) for x in entering]
    return [value[1] for value in values if len(value) > 1], [value[0] for value in values]
