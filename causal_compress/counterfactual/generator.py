"""The two networks of the conditional GAN, for images and tables: a generator and a critic of realism."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from causal_compress.counterfactual.constraints import Domain

_BLOCKS = 3
_SMALLEST_SIDE = 7
_MOST_LEVELS = 4
_WIDEST = 4
_SMALL = 0.01
_FARTHEST = 4.0  # standard deviations


class Modulated(nn.Module):
    """A residual block whose normalisation is scaled and shifted by the target class."""

    def __init__(self, channels: int, classes: int, *, flat: bool) -> None:
        super().__init__()
        self.first = nn.Linear(channels, channels) if flat else nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Linear(channels, channels) if flat else nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(math.gcd(8, channels), channels, affine=False)
        self.style = nn.Embedding(classes, 2 * channels)
        nn.init.normal_(self.style.weight, std=0.2)

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        """Features to features of the same shape."""
        style = self.style(target)
        scale, shift = style.view(*style.shape, *[1] * (h.ndim - 2)).chunk(2, dim=1)
        inner = F.silu(self.norm(h) * (1 + scale) + shift)
        out: Tensor = h + self.second(F.silu(self.first(inner)))
        return out


class ImageGenerator(nn.Module):
    """Encoder, blocks steered by the target class, decoder that reuses the encoder's maps.

    The answer is the input and a residual, clamped to the pixel range.
    """

    low: Tensor
    high: Tensor

    def __init__(self, shape: Sequence[int], classes: int, width: int, low: Tensor, high: Tensor) -> None:
        super().__init__()
        channels, *sides = shape
        levels = max(1, min(_MOST_LEVELS, round(math.log2(min(sides) / _SMALLEST_SIDE))))
        narrow = max(1, width // 2)
        widths = [min(width * 2**level, width * _WIDEST) for level in range(levels)]
        self.register_buffer("low", low.clone(), persistent=False)
        self.register_buffer("high", high.clone(), persistent=False)
        pairs = zip([channels, *widths[:-1]], widths, strict=True)
        self.down = nn.ModuleList(nn.Conv2d(few, many, 4, 2, 1) for few, many in pairs)
        self.blocks = nn.ModuleList(Modulated(widths[-1], classes, flat=False) for _ in range(_BLOCKS))
        inner = widths[-2::-1]  # each is met twice on the way up: from below, and beside it from the encoder
        pairs = zip([widths[-1], *(2 * wide for wide in inner)], [*inner, narrow], strict=True)
        self.up = nn.ModuleList(nn.Conv2d(many, few, 3, padding=1) for many, few in pairs)
        self.last = nn.Conv2d(narrow + channels, channels, 3, padding=1, bias=False)
        nn.init.normal_(self.last.weight, std=_SMALL)  # training begins near the identity, at realistic images

    def encode(self, x: Float[Tensor, "samples channels height width"], target: Int[Tensor, " samples"]) -> Tensor:
        """The latent maps, already steered towards the target class."""
        return self._steer(self._maps(x)[-1], target)

    def decode(self, h: Tensor, x: Tensor) -> Float[Tensor, "samples channels height width"]:
        """The proposal for the counterfactual of x, inside the pixel range."""
        return self._draw(h, x, self._maps(x))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Inputs and target classes to proposals."""
        maps = self._maps(x)
        return self._draw(self._steer(maps[-1], target), x, maps)

    def _maps(self, x: Tensor) -> list[Tensor]:
        h = self._centred(x)
        maps = []
        for layer in self.down:
            h = F.silu(layer(h))
            maps.append(h)
        return maps

    def _steer(self, h: Tensor, target: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, target)
        return h

    def _draw(self, h: Tensor, x: Tensor, maps: list[Tensor]) -> Tensor:
        beside = [*reversed(maps[:-1]), self._centred(x)]
        for layer, skip in zip(self.up, beside, strict=True):
            h = F.interpolate(F.silu(layer(h)), size=skip.shape[-2:], mode="nearest")
            h = torch.cat([h, skip], 1)
        proposed = x + self.last(h).tanh() * (self.high - self.low)
        # A clamp whose gradient is 1 everywhere: a pixel that was pushed too far can still come back.
        inside: Tensor = proposed + (proposed.detach().clamp(self.low, self.high) - proposed.detach())
        return inside

    def _centred(self, x: Tensor) -> Tensor:
        span = torch.where(self.high > self.low, self.high - self.low, torch.ones_like(self.low))
        return (x - self.low) / span * 2 - 1


class Squashed(nn.Module):
    """Numbers of heavy tails made comparable: linear near 0, logarithmic far out."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return x.asinh()


class TableGenerator(nn.Module):
    """Fully connected blocks steered by the target class; numbers move by a gated step, categories by their logits."""

    def __init__(self, domain: Domain, classes: int, width: int) -> None:
        super().__init__()
        inputs, hidden = domain.low.shape[0], 8 * width
        self.groups = [list(group) for group in domain.groups]
        self.entry = nn.Linear(inputs, hidden)
        self.blocks = nn.ModuleList(Modulated(hidden, classes, flat=True) for _ in range(2))
        self.last = nn.Linear(hidden + inputs, 2 * inputs)
        self.stay = nn.Parameter(torch.tensor(2.0))
        nn.init.normal_(self.last.weight, std=_SMALL)

    def encode(self, x: Float[Tensor, "samples positions"], target: Int[Tensor, " samples"]) -> Tensor:
        """The latent vector, already steered towards the target class."""
        h = F.silu(self.entry(x.asinh()))
        for block in self.blocks:
            h = block(h, target)
        return h

    def decode(self, h: Tensor, x: Tensor) -> Float[Tensor, "samples positions"]:
        """The proposal for the counterfactual of x; one-hot groups hold probabilities."""
        gate, move = self.last(torch.cat([F.silu(h), x.asinh()], 1)).chunk(2, dim=1)
        proposed = x + gate.sigmoid() * move.tanh() * _FARTHEST
        pieces = [(group, (move[:, group] * 4 + self.stay * x[:, group]).softmax(1)) for group in self.groups]
        for group, probabilities in pieces:
            proposed = proposed.index_copy(1, torch.tensor(group, device=x.device), probabilities)
        answer: Tensor = proposed
        return answer

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Inputs and target classes to proposals."""
        return self.decode(self.encode(x, target), x)


class Critic(nn.Module):
    """Judges realism given the class (projection), and names the class, so that neither network can be fooled alone."""

    def __init__(self, shape: Sequence[int], classes: int, width: int) -> None:
        super().__init__()
        self.body = _image_body(shape, width) if len(shape) == 3 else _table_body(shape[0], width)
        with torch.no_grad():
            features = self.body(torch.zeros(1, *shape)).shape[1]
        self.realism = nn.Linear(features, 1)
        self.projection = nn.Embedding(classes, features)
        nn.init.normal_(self.projection.weight, std=features**-0.5)
        self.names = nn.Linear(features, classes)

    def forward(
        self, x: Float[Tensor, "samples ..."], label: Int[Tensor, " samples"]
    ) -> tuple[Float[Tensor, " samples"], Float[Tensor, "samples classes"]]:
        """Realism of x as a member of class `label` (above 0: real), and logits of its class."""
        features = self.body(x)
        score = self.realism(features)[:, 0] + (self.projection(label) * features).sum(1)
        return score, self.names(features)


def _image_body(shape: Sequence[int], width: int) -> nn.Module:
    channels, *sides = shape
    layers: list[nn.Module] = []
    levels = max(2, min(_MOST_LEVELS + 1, round(math.log2(min(sides) / 4))))
    levels = max(1, min(levels, int(math.log2(min(sides)))))  # each halves the shorter side
    for level in range(levels):
        wide = min(width * 2**level, width * _WIDEST)
        layers += [nn.Conv2d(channels, wide, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = wide
    return nn.Sequential(*layers, nn.Flatten())


def _table_body(inputs: int, width: int) -> nn.Module:
    hidden = 8 * width
    return nn.Sequential(
        Squashed(),
        nn.Linear(inputs, hidden),
        nn.LeakyReLU(0.2),
        nn.Linear(hidden, hidden),
        nn.LeakyReLU(0.2),
    )


def build_generator(domain: Domain, shape: Sequence[int], classes: int, width: int) -> ImageGenerator | TableGenerator:
    """The generator that fits the kind of input.

    Args:
        domain: Pixel range, or one-hot groups.
        shape: Of one input.
        classes: Of the network explained.
        width: See the recipe.
    """
    if len(shape) == 3:
        return ImageGenerator(shape, classes, width, domain.low, domain.high)
    return TableGenerator(domain, classes, width)
