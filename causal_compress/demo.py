"""The demonstration: a small residual network on scikit-learn's digits, trained here and then compressed."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_compress.inputs.data import Data, load_data
from causal_compress.pipeline import Outcome, compress
from causal_compress.progress import progress
from causal_compress.recipe import Recipe
from causal_compress.shrink.surgery import save_weights

logger = logging.getLogger(__name__)

EPOCHS = 30


class Block(nn.Module):
    """Two convolutions and a skip; where the stride is 2 the skip is a strided 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Features (samples, channels, height, width) to features."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.skip(x))


class DigitsNet(nn.Module):
    """A residual network for 8x8 grey images.

    Args:
        width: Channels of the first stage.
        blocks: Residual blocks in each of two stages.
        num_classes: Logits.
    """

    def __init__(self, width: int = 24, blocks: int = 4, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        stages = [Block(width, width, 1) for _ in range(blocks)]
        stages += [
            Block(width if index == 0 else 2 * width, 2 * width, 2 if index == 0 else 1) for index in range(blocks)
        ]
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (samples, 1, 8, 8) to logits (samples, classes)."""
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


def digits_net(width: int = 24, blocks: int = 4, num_classes: int = 10) -> nn.Module:
    """The demonstration's architecture, as recipes name it."""
    return DigitsNet(width, blocks, num_classes)


def demo_recipe(weights: Path) -> Recipe:
    """What the demonstration asks for."""
    return Recipe.model_validate(
        {
            "model": {"arch": "causal_compress.demo:digits_net", "weights": str(weights)},
            "data": {
                "source": "sklearn:digits",
                "normalize": {"mean": [0.305], "std": [0.376]},
                "augment": {"crop_padding": 1},
                "calibration": 256,
                "validation": 200,
                "test_share": 0.3,
            },
            "budget": {"macs": 0.29, "max_accuracy_drop": 3.0},
            "intervene": {"inputs": 256, "batch_size": 128},
            "plan": {"inputs": 192, "heldout": 64, "low_rank": False},  # so small a network gains no time by it
            "distill": {"epochs": 15, "batch_size": 64, "learning_rate": 0.05},
            "benchmark": {"batches": [1, 64], "repeats": 100, "seconds": 2.0},
            "report": {"title": "Demonstration: a small residual network on digits"},
        }
    )


def train(data: Data, *, epochs: int, seed: int) -> nn.Module:
    """Train the demonstration's teacher on the training split (SGD, one cosine cycle).

    Args:
        data: Digits.
        epochs: Passes over the training split.
        seed: Of initial weights, order and augmentation.
    """
    torch.manual_seed(seed)
    model = digits_net().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in progress(range(epochs), label="training the teacher", unit="epoch"):
        for x, y in data.train.batches(64, shuffle_seed=seed * 1000 + epoch, augment=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def demo(out: Path) -> Outcome:
    """Train a teacher on digits, compress it, export, benchmark and report.

    Args:
        out: Folder; the teacher's weights go to OUT/teacher.safetensors, the run to OUT/run.
    """
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "teacher.safetensors"
    recipe = demo_recipe(weights)
    if not weights.exists():
        data = load_data(recipe.data, seed=recipe.seed)
        save_weights(train(data, epochs=EPOCHS, seed=recipe.seed), weights)
    return compress(recipe, out / "run", command=("causal-compress", "demo", "--out", str(out)))
