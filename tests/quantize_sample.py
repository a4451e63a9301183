"""Small trained networks and their data for the tests of 8 bits, and a timer that says what it is told."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from causal_compress.deploy.calibration import collect
from causal_compress.deploy.onnx import export_onnx

CLASSES = 4


class Residual(nn.Module):
    """Convolutions with and without bias, a padded shortcut, an addition and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.third = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.linear = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        x = F.relu(x + self.second(x))
        x = F.relu(self.third(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.linear(x.mean((2, 3)))


class Sequence(nn.Module):
    """Linear layers on sequences, which ONNX writes as a product and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 16), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.gelu(self.first(x.flatten(2).transpose(1, 2)))).mean(1)


class Split:
    def __init__(self, n: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % CLASSES
        self.x = torch.randn(n, 3, 8, 8, generator=random)
        for label in range(CLASSES):  # a bright corner tells the class
            rows, columns = divmod(label, 2)
            self.x[label::CLASSES, :, 4 * rows : 4 * rows + 4, 4 * columns : 4 * columns + 4] += 0.6

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size, *, limit=None):
        n = len(self) if limit is None else min(limit, len(self))
        for start in range(0, n, batch_size):
            stop = min(n, start + batch_size)
            yield self.x[start:stop], self.labels[start:stop]


class Data:
    """Without a test split: reading it would fail."""

    def __init__(self, n: int = 400) -> None:
        self.calibration, self.validation = Split(128, 1), Split(n, 2)
        self.example_input = self.calibration.x[:2]


def trained(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    train = Split(512, 3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(8):
        for x, y in train.batches(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def student():
    return trained(Residual())


@pytest.fixture(scope="module")
def onnx_path(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "model.onnx"
    export_onnx(student, Data().example_input, path, opset=18)
    return path


def arrays(split: Split) -> list[np.ndarray]:
    return [x.numpy() for x, _ in split.batches(64)]


def ranged(model) -> dict[str, tuple[float, float]]:
    return {name: (one.low, one.high) for name, one in collect(model, arrays(Data().calibration)).items()}


def steady(fp32_ms: float, int8_ms: float):
    """A timer that says so."""

    def timer(fp32, int8, x, section):
        assert fp32.is_file()
        assert int8.is_file()
        assert x.shape == (section.batch, 3, 8, 8)
        jitter = 1 + 0.01 * (np.arange(20) % 3)
        return fp32_ms * jitter, int8_ms * jitter

    return timer
