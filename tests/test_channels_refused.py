"""Channel groups that torch-pruning names and that can't be narrowed: refused with a reason, in time."""

from __future__ import annotations

import pytest
import torch
from tiny import Plain, images
from torch import Tensor, nn

from causal_compress.shrink import channels
from causal_compress.shrink.channels import find_groups
from causal_compress.understand.trace import trace


class OneLayerResidual(nn.Module):
    """Inside the outer branch, a layer reads the sum that it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.a, self.b, self.c = nn.Linear(10, 3), nn.Linear(10, 48), nn.Linear(48, 48), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.a(x))
        return self.c(inner + torch.relu(self.b(inner))) + self.wide(x)


def test_a_layer_that_reads_what_it_writes_stays() -> None:
    x = torch.randn(4, 10)
    found, skips = find_groups(trace(OneLayerResidual(), x).graph, x)
    assert found == ()
    assert skips[0].reason == "b both reads and writes its channels"


def test_a_vector_that_becomes_a_map_stays() -> None:
    class FromVector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.fc = nn.Linear(10, 36), nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.second(torch.relu(self.first(x)).view(-1, 4, 3, 3))).mean((2, 3)))

    x = torch.randn(4, 10)
    found, skips = find_groups(trace(FromVector(), x).graph, x)
    assert [group.producer for group in found] == ["second"]
    assert [skip.what for skip in skips] == ["width of first"]


def test_a_search_that_would_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_pruning.dependency.group import Group

    plain = Group.add_dep
    monkeypatch.setattr(channels, "_MOST_POSITIONS", 10)  # the flattened map has twelve
    x = images(2, 1, 4)
    found, skips = find_groups(trace(Plain(), x).graph, x)
    assert [group.producer for group in found] == ["conv1"]
    assert [skip.what for skip in skips] == ["width of conv2"]
    assert "lists of positions grow without end" in skips[0].reason
    assert Group.add_dep is plain
