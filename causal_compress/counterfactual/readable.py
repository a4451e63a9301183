"""Inputs and their changes in words and pixels that a person can read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from causal_compress.counterfactual.constraints import Domain
from causal_compress.inputs.data import Features
from causal_compress.results import FeatureChange
from causal_compress.understand.intervene import feature_layout, feature_names


def largest_changes(
    domain: Domain,
    features: Features,
    x: Float[Tensor, ...],
    counterfactual: Float[Tensor, ...],
    grid: int,
) -> tuple[FeatureChange, ...]:
    """Which features were changed, and from what to what, the largest change first.

    Args:
        domain: Scales, to tell large from small.
        features: Names.
        x: One original, normalised.
        counterfactual: Of the same shape.
        grid: Images: patches per side.
    """
    layout = feature_layout(features, x.shape, grid)
    names = feature_names(features, x.shape, grid)
    change = ((counterfactual - x) / domain.reach()).abs()
    change = change.sum(0) if x.ndim == 3 else change
    sizes = torch.zeros(len(names)).index_add_(0, layout.flatten(), change.flatten())
    order = [int(number) for number in sizes.argsort(descending=True) if sizes[number] > 0]
    return tuple(
        FeatureChange(
            feature=names[number],
            before=_told(domain, features, x, layout, number),
            after=_told(domain, features, counterfactual, layout, number),
        )
        for number in order
    )


def pixels(domain: Domain, x: Float[Tensor, "channels height width"]) -> NDArray[np.uint8]:
    """A normalised image as height x width x channels, uint8."""
    unit = ((x - domain.low) / domain.span()).clamp(0, 1)
    shown: NDArray[Any] = (unit * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return shown


def row_text(domain: Domain, features: Features, x: Float[Tensor, " positions"]) -> list[str]:
    """A normalised row as raw values, one text for each column."""
    layout = feature_layout(features, x.shape, 1)
    return [_told(domain, features, x, layout, number) for number in range(len(features.names))]


def _told(domain: Domain, features: Features, x: Tensor, layout: Tensor, number: int) -> str:
    if features.kind == "image":
        unit = ((x - domain.low) / domain.span()).mean(0)
        return f"{100 * float(unit[layout == number].mean()):.0f} %"
    positions = list(features.columns[number])
    categories = features.categories[number]
    if categories:
        block = x[positions]
        return categories[int(block.argmax())] if float(block.max()) > 0 else "(unknown)"
    at = positions[0]
    raw = float(x[at].double() * domain.scale[at] + domain.offset[at])
    step = float(domain.step[at])
    if step == 1.0:
        return f"{round(raw)}"
    return (
        f"{round(raw / step) * step:.2f}" if step > 0 else _in_digits(raw, float(domain.least[at] * domain.scale[at]))
    )


def _in_digits(value: float, least: float) -> str:
    """At least four digits, and so many that a change of `least` is seen."""
    if value == 0 or least == 0:
        return f"{value:.4g}"
    size, unit = (math.floor(math.log10(abs(number))) for number in (value, least))
    text = f"{value:.{max(4, size - unit + 1)}g}"
    return f"{value:.0f}" if "e+" in text else text
