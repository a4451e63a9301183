"""Where a region ends, and what stands between its last affine layer and the value that a refit aims at."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import random_norms
from torch import Tensor, nn

from causal_compress.shrink.repair import current_affine, find_site, reader_equations, tail_equations
from causal_compress.shrink.targets import before_and_after
from causal_compress.understand.tail import Tail, find_tail
from causal_compress.understand.trace import Network, trace

CHANNELS = 6


class Ending(nn.Module):
    """A stem, a region that ends as is tested, and a classifier."""

    def __init__(self, end: Callable[[Ending, Tensor], Tensor], scale: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, CHANNELS, 3, padding=1)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.linear = nn.Linear(CHANNELS, CHANNELS)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.scale = nn.Parameter(torch.full((CHANNELS, 1, 1), 0.5) if scale is None else scale)
        self.fc = nn.Linear(CHANNELS, 3)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.end(self, torch.relu(self.stem(x)))).mean((2, 3)))  # type: ignore[no-any-return]


class Sequence(nn.Module):
    """Positions of features through a linear layer and a batch norm, whose channels are the positions."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner = nn.Linear(4, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.norm, self.fc = nn.BatchNorm1d(positions), nn.Linear(CHANNELS, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.inner(torch.relu(self.stem(x))))).mean(1))  # type: ignore[no-any-return]


class Rows(Sequence):
    """The same of single rows, where the norm's channels are the features."""

    def __init__(self) -> None:
        super().__init__(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.inner(torch.relu(self.stem(x))))))  # type: ignore[no-any-return]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def traced(model: nn.Module, x: Tensor) -> tuple[Network, Tail | str]:
    network = trace(random_norms(model), x[:2])
    return network, find_tail(network.regions[1].module)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def last_first(net: Ending, x: Tensor) -> Tensor:
    return x + net.linear(x.permute(0, 2, 3, 1)).permute(0, -1, 1, 2)  # type: ignore[no-any-return]


def read_twice(net: Ending, x: Tensor) -> Tensor:
    y = net.norm(net.conv(x))
    return y + torch.sigmoid(y) * x  # type: ignore[no-any-return]


IMAGES, SEQUENCES = (64, 2, 5, 5), (64, 9, 4)


@pytest.mark.parametrize(
    ("model", "shape", "layer", "norm"),
    [
        pytest.param(Ending(lambda net, x: x + net.conv(x)), IMAGES, "conv", None, id="sum"),
        pytest.param(Ending(lambda net, x: torch.add(x, net.conv(x), alpha=1)), IMAGES, "conv", None, id="sum times 1"),
        pytest.param(Ending(lambda net, x: pooled(x) + net.conv(x)), IMAGES, "conv", None, id="smaller skip"),
        pytest.param(Ending(lambda net, x: x + net.scale * net.conv(x)), IMAGES, "conv", None, id="scaled summand"),
        pytest.param(Ending(last_first), IMAGES, "linear", None, id="axis counted from the end"),
        pytest.param(Sequence(9), SEQUENCES, "inner", None, id="norm of positions"),
        pytest.param(Sequence(CHANNELS), (64, CHANNELS, 4), "inner", None, id="as many positions as features"),
        pytest.param(Rows(), (256, 4), "inner", "norm", id="norm of features"),
    ],
)
def test_the_teachers_own_layer_meets_the_teachers_own_target(
    model: nn.Module, shape: tuple[int, ...], layer: str, norm: str | None
) -> None:
    chunks = list(noise(*shape).split(shape[0] // 4))
    network, tail = traced(model, chunks[0])
    assert isinstance(tail, Tail)
    assert (tail.affine, tail.norm) == (layer, norm)
    entering = before_and_after(network, 0, chunks)[1]
    targets = before_and_after(network, 1, entering)[0]
    part = network.regions[1].module
    sums = tail_equations(part, tail, entering, targets).heldout
    assert sums.error(*current_affine(part, layer, norm)) / sums.target_variance() < 1e-4


@pytest.mark.parametrize(
    ("end", "scale", "reason"),
    [
        pytest.param(lambda net, x: x + net.conv(pooled(x)), None, "repeats what conv puts out", id="smaller summand"),
        pytest.param(lambda net, x: torch.add(x, net.conv(x), alpha=0.3), None, "times 0.3", id="weighted summand"),
        pytest.param(read_twice, None, "no summand", id="summand that the skip is made of"),
        pytest.param(lambda net, x: net.conv(x) * net.scale, torch.eye(5), "ends with mul", id="mask"),
        pytest.param(
            lambda net, x: x + net.conv(pooled(x)) * net.scale,
            torch.ones(5, 5),
            "no summand",
            id="scale of a larger shape",
        ),
    ],
)
def test_what_can_not_be_undone_has_no_tail_and_a_reason(
    end: Callable[[Ending, Tensor], Tensor], scale: Tensor | None, reason: str
) -> None:
    _, tail = traced(Ending(end, scale), noise(*IMAGES))
    assert isinstance(tail, str)
    assert reason in tail


@pytest.mark.parametrize(("positions", "rows"), [(9, False), (CHANNELS, False), (CHANNELS, True)])
def test_a_layer_inside_a_region_is_seen_with_its_norm_only_where_they_have_the_same_channels(
    positions: int, rows: bool
) -> None:
    class Inner(Sequence):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            x = torch.relu(x + self.last(torch.relu(self.norm(self.inner(x)))))
            return self.fc(x if rows else x.mean(1))  # type: ignore[no-any-return]

    model = Inner(positions)
    model.last = nn.Linear(CHANNELS, CHANNELS)
    chunks = list(noise(*((256, 4) if rows else (64, positions, 4))).split(16))
    network = trace(random_norms(model), chunks[0][:2])
    entering = before_and_after(network, 0, chunks)[1]
    part = network.regions[1].module
    site = find_site(part, "inner")
    assert site.norm == ("norm" if rows else None)
    sums = reader_equations(part, site, entering).heldout
    assert sums.error(*current_affine(part, "inner", site.norm)) / sums.target_variance() < 1e-4
