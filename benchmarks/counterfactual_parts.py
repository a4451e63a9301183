"""Parts of counterfactual.py: the networks that are trained for the measurement, and autoencoders for IM1 and IM2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_compress.inputs.data import Data


def cnn(width: int, kernel: int, classes: int = 10) -> nn.Module:
    """A small convolutional network for 28 x 28 grey images."""
    pad = kernel // 2
    return nn.Sequential(
        nn.Conv2d(1, width, kernel, padding=pad),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, kernel, padding=pad),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 49, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def mlp(inputs: int, hidden: Sequence[int], classes: int = 2) -> nn.Module:
    """A fully connected network for encoded rows."""
    widths = [inputs, *hidden]
    layers: list[nn.Module] = []
    for few, many in pairwise(widths):
        layers += [nn.Linear(few, many), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def train_classifier(model: nn.Module, data: Data, *, seed: int, epochs: int) -> nn.Module:
    """Train in place (Adam, one cycle); the seed gives the order, initial weights are the caller's."""
    batch = 128
    total = epochs * math.ceil(len(data.train) / batch)
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=total)
    for epoch in range(epochs):
        for x, y in data.train.batches(batch, shuffle_seed=1000 * seed + epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


class Autoencoder(nn.Module):
    """A fully connected autoencoder with a narrow middle."""

    def __init__(self, shape: Sequence[int], hidden: int, code: int) -> None:
        super().__init__()
        size = math.prod(shape)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, code))
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, size))

    def forward(self, x: Tensor) -> Tensor:
        """Inputs to their reconstructions."""
        return self.decoder(self.encoder(x)).view_as(x)


def autoencoders(x: Tensor, label: Tensor, classes: int, *, steps: int, seed: int) -> list[nn.Module]:
    """One autoencoder for each class, and one for all classes at the end.

    Args:
        x: Real inputs, normalised.
        label: Their classes.
        classes: How many.
        steps: Training steps of each, at 128 inputs.
        seed: Of weights and order.
    """
    torch.manual_seed(seed)
    pools = [x[label == klass] for klass in range(classes)]
    return [_autoencoder(pool, steps) for pool in (*pools, x)]


def _autoencoder(x: Tensor, steps: int) -> nn.Module:
    model = Autoencoder(x.shape[1:], hidden=128, code=16)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (128,))]
        optimizer.zero_grad()
        F.mse_loss(model(batch), batch).backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)
