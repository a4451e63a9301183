"""Average causal effects (ACE) of interventions, at sites and for input features. Numerics only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def units(activation: Float[Tensor, "samples ..."]) -> Float[Tensor, "samples units"]:
    """The activation of each unit of a site, in float64.

    Args:
        activation: Features (samples, units), feature maps (samples, units, height, width), or tokens
            (samples, tokens, units).

    Returns:
        Features as they are; of maps and tokens the mean over positions: a unit is a channel, wherever it fires.

    Limits: a channel-last feature map is taken for channel-first, and what a Conv1d puts out for tokens.
    """
    activation = activation.detach()
    if activation.ndim == 3:
        activation = activation.transpose(1, 2)
    return activation.flatten(2).mean(2).double() if activation.ndim > 2 else activation.double()


def effect_terms(
    before: Float[Tensor, "samples units"], after: Float[Tensor, "samples units"]
) -> tuple[Float[Tensor, " samples"], Float[Tensor, " samples"]]:
    """What an intervention did at a site, for each input.

    Args:
        before: Units of the plain inputs.
        after: Units of the same inputs after do(x').

    Returns:
        (|delta| * KL, KL), both in nats: delta is the mean absolute change over units,
        KL = KL(P(g'|do(x')) || P(g'|do(x))) with P the softmax over the units. Their mean over inputs is the ACE.

    Source: TRACER, arXiv:2410.05484, the definition of ACE.
    """
    log_after = torch.log_softmax(after.double(), dim=1)
    log_before = torch.log_softmax(before.double(), dim=1)
    kl = (log_after.exp() * (log_after - log_before)).sum(1).clamp_min(0)
    change = (after - before).double().abs().mean(1)
    return change * kl, kl


@dataclass
class Moments:
    """Streaming mean and standard error over inputs."""

    total: Tensor
    squares: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, sites: int, device: torch.device) -> Moments:
        """Nothing seen yet."""
        total, squares = torch.zeros(2, sites, dtype=torch.float64, device=device)
        return cls(total, squares)

    def add(self, values: Float[Tensor, "sites samples"]) -> None:
        """Add one number for each site and input."""
        self.total += values.sum(1)
        self.squares += values.square().sum(1)
        self.count += values.shape[1]

    def mean(self) -> list[float]:
        """Mean over inputs, for each site."""
        means: list[float] = (self.total / self.count).tolist()
        return means

    def stderr(self) -> list[float]:
        """Standard error of the mean, for each site."""
        spread = (self.squares - self.total.square() / self.count).clamp_min(0)
        errors: list[float] = (spread / (self.count * max(self.count - 1, 1))).sqrt().tolist()
        return errors


@dataclass
class FeatureSums:
    """Streaming mean effect of the interventions that mask a feature, with its standard error over inputs.

    For each feature five sums over inputs are kept: of s, c, s*s, s*c and c*c, where s is the sum of the effects of the
    input's interventions that mask the feature, and c their number.
    """

    sums: Tensor

    @classmethod
    def zeros(cls, features: int, device: torch.device) -> FeatureSums:
        """Nothing seen yet."""
        return cls(torch.zeros(5, features, dtype=torch.float64, device=device))

    def add(self, masks: Bool[Tensor, "versions samples features"], effects: Float[Tensor, "versions samples"]) -> None:
        """Add one batch.

        Args:
            masks: Which features each intervention masked.
            effects: What each intervention did at the output.
        """
        weights = masks.double()
        effect, count = (weights * effects[:, :, None]).sum(0), weights.sum(0)
        terms = torch.stack([effect, count, effect * effect, effect * count, count * count])
        self.sums += terms.sum(1)

    def mean(self) -> list[float]:
        """Mean effect for each feature; NaN for one that was never masked."""
        effect, count = self.sums[:2].tolist()
        return [e / c if c else math.nan for e, c in zip(effect, count, strict=True)]

    def stderr(self) -> list[float]:
        """Standard error of the mean, inputs being the independent units (linearised ratio); NaN if never masked."""
        ratio = self.sums.new_tensor(self.mean())
        _, count, squares, cross, counts = self.sums
        residual = (squares - 2 * ratio * cross + ratio.square() * counts).clamp_min(0)
        errors: list[float] = (residual.sqrt() / count).tolist()
        return errors
