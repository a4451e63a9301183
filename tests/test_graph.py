"""Surgery on graphs: pieces cut out and put together, in-place operations made pure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny import Residual, Stages, images, random_norms
from torch import Tensor, nn

from causal_compress.understand.graph import (
    common_name,
    compose_with_ends,
    ends,
    extract,
    fetch,
    observer,
    run_in_chunks,
)
from causal_compress.understand.trace import site_activations, trace


class Around(nn.Module):
    """One convolution, then whatever is tested, then a classifier."""

    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc, self.inner = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3, 2), inner
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(self.conv(x)).mean((2, 3)))


def _result_unused(x: Tensor) -> Tensor:
    x.relu_()
    return x


def _function_unused(x: Tensor) -> Tensor:
    torch.relu_(x)
    F.relu(x, True)
    return x


def _alias(x: Tensor) -> Tensor:
    same = x
    same.add_(1)
    return x + same


def _number(x: Tensor) -> Tensor:
    size = x.size(2)
    larger = size
    larger += 1
    return x * size / larger


_INPLACE = [
    lambda x: x.add_(1).mul_(2),
    lambda x: x.sub_(1).clamp_(min=0),
    lambda x: F.relu(x, inplace=True),
    _number,
    _result_unused,
    _function_unused,
    _alias,
]


@pytest.mark.parametrize("inner", _INPLACE)
def test_in_place_operations_become_pure_and_keep_their_meaning(inner: Callable[[Tensor], Tensor]) -> None:
    model, x = Around(inner).eval(), images(2, 1, 5)
    network = trace(model, x)
    with torch.no_grad():
        wanted = model(x.clone())
        torch.testing.assert_close(network.graph(x), wanted)
        torch.testing.assert_close(site_activations(network, x)[-1], wanted)
    targets = [str(getattr(node.target, "__name__", node.target)) for node in network.graph.graph.nodes]
    assert not [target for target in targets if target.endswith("_") and not target.endswith("__")]


def test_extracted_pieces_put_together_are_the_network() -> None:
    model, x = random_norms(Stages()), images(2, 1, 8)
    network = trace(model, x)
    whole, names = compose_with_ends([region.module for region in network.regions])
    with torch.no_grad():
        assert torch.allclose(whole(x), model(x), atol=1e-6)
    assert len(names) == len(network.regions)
    assert fetch(whole, "down.weight") is fetch(network.graph, "down.weight")
    ended = observer(whole, [node for name in names for node in whole.graph.nodes if node.name == name])(x)
    assert all(torch.equal(a, b) for a, b in zip(ended, site_activations(network, x), strict=True))


def test_a_piece_whose_input_can_be_bypassed_is_refused() -> None:
    network = trace(Residual(blocks=1), images(2, 1, 6))
    block = network.regions[1].module
    inner = next(node for node in block.graph.nodes if node.op == "call_module")
    with pytest.raises(ValueError, match="does not depend on"):
        extract(block, inner, ends(block)[1])


def test_a_piece_may_be_empty() -> None:
    network = trace(Stages(), images(2, 1, 8))
    entry = ends(network.graph)[0]
    x = images(2, 1, 8)
    assert torch.equal(extract(network.graph, entry, entry)(x), x)


def test_names_and_chunks() -> None:
    assert common_name(["layer1.0.conv1", "layer1.0.conv2"], "?") == "layer1.0"
    assert common_name(["conv"], "?") == "conv"
    assert common_name(["a.b", "c.d"], "?") == "a"
    assert common_name([], "region7") == "region7"
    x = torch.rand(7, 3)
    assert torch.equal(run_in_chunks(nn.Identity(), x, 2), x)
