"""Small networks whose regions, costs, tails and channel groups are known by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def random_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms as after some training, not as fresh ones that do next to nothing; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(generator=generator)
    return model.eval()


class Plain(nn.Module):
    """Two convolutions and a classifier: three regions.

    On an input of 1 x 4 x 4: conv1 2*1*9 * 16 = 288 MACs, 20 parameters; conv2 (stride 2) 3*2*9 * 4 = 216 MACs, 54
    parameters, bn2 6; fc 3*4 * 2 = 24 MACs, 26 parameters.
    """

    macs = (288, 216, 24)
    params = (20, 60, 26)
    shapes = ((2, 4, 4), (3, 2, 2), (2,))

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        x = torch.relu_(self.bn2(self.conv2(x)))
        return self.fc(self.dropout(torch.flatten(x, 1)))


class Block(nn.Module):
    """A residual block whose addition and activation overwrite what they are given."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


class Residual(nn.Module):
    """Stem, some equal blocks, average pooling, classifier: regions stem, block1 .., fc."""

    def __init__(self, blocks: int = 2, channels: int = 4, inner: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.Sequential(*[Block(channels, inner) for _ in range(blocks)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(torch.relu(self.stem(x)))).flatten(1))


class Stages(nn.Module):
    """Regions of unlike shapes: 2 x 8 x 8 -> 4 x 4 x 4 -> 4 x 4 x 4 -> 3 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.down = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.same = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.down(x))
        x = torch.relu(self.same(x))
        return self.fc(x.mean((2, 3)))


class Depthwise(nn.Module):
    """A depthwise convolution between two 1x1 convolutions, as in MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(2, 6, 1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.project = nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.expand(x)))
        x = torch.relu(self.depth(x))
        return self.fc(torch.relu(self.project(x)).mean((2, 3)))


class Fickle(nn.Module):
    """A layer whose control flow hangs on its input: torch.fx can't follow it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


class Opaque(nn.Module):
    """A convolution, a module that can't be traced, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.fickle = Fickle(3)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.fickle(torch.relu(self.conv(x)))).mean((2, 3)))


def images(count: int, channels: int, size: int, seed: int = 0) -> Tensor:
    """Gaussian noise in the shape of images."""
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))
