"""Networks so small that distilling them takes a moment, and stand-ins for the data."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from causal_compress.recipe import DistillSection
from causal_compress.recover.distill import distill

CLASSES, SIZE = 3, 8


@dataclass(frozen=True)
class Rows:
    """A split whose rows are tensors in memory."""

    x: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, batch_size: int, *, limit: int | None = None, shuffle_seed: int | None = None, augment: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self))
        if shuffle_seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(shuffle_seed))
        for chosen in order[:limit].split(batch_size):
            yield self.x[chosen], self.labels[chosen]


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.mix = nn.Conv2d(width, 4, 1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mix(F.relu(self.bn(self.conv(x)))))
        return self.head(x.mean((2, 3)))


BOUNDARY = (("relu_1", "relu_1"),)


def network(width: int, seed: int) -> fx.GraphModule:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        net = Net(width)
        nn.init.uniform_(net.bn.weight, 0.5, 1.5)
        nn.init.uniform_(net.bn.running_mean, -0.2, 0.2)
        nn.init.uniform_(net.bn.running_var, 0.5, 1.5)
        net.mix.weight.mul_(3.0)
        net.head.weight.mul_(3.0)
    return fx.symbolic_trace(net.eval())


def rows(count: int, teacher: nn.Module, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, SIZE, SIZE, generator=generator) + 2.0 * torch.randn(count, 2, 1, 1, generator=generator)
    with torch.no_grad():
        return Rows(x, teacher(x).argmax(1))


def data(teacher: nn.Module) -> Any:
    features = SimpleNamespace(
        kind="image", names=(), columns=(), zero=torch.zeros(2, 1, 1), mean=torch.full((2, 1, 1), 0.1)
    )
    train = rows(128, teacher, 1)
    return SimpleNamespace(
        train=train,
        validation=rows(64, teacher, 2),
        features=features,
        kind="image",
        input_shape=(2, SIZE, SIZE),
        example_input=train.x[:2],
        fingerprint="rows 1 and 2",
    )


def section(**changes: Any) -> DistillSection:
    return DistillSection(**{"epochs": 3, "batch_size": 32, "precision": "fp32", **changes})


def run(student: nn.Module, teacher: nn.Module, settings: DistillSection, **changes: Any) -> Any:
    boundaries = changes.pop("boundaries", BOUNDARY)
    source = changes.pop("data", None) or data(teacher)
    usual = {"seed": 0, "device": "cpu", "progress_dir": None}
    return distill(student, teacher, boundaries, source, settings, **{**usual, **changes})


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def teacher() -> fx.GraphModule:
    return network(12, 0)


@pytest.fixture
def student() -> fx.GraphModule:
    return network(6, 1)
