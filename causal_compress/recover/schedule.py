"""One cycle: how the learning rate and the boundary loss go over the steps of a run."""

from __future__ import annotations

import math

_WARM_UP_SHARE = 0.05


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Learning rate of a step: linear warm-up over the first twentieth, then a cosine that ends at zero.

    Args:
        step: 0 .. steps - 1.
        steps: Optimizer steps of the whole run.
        peak: Largest learning rate.

    Source: the shape of Smith & Topin 2017, arXiv:1708.07120, with a cosine for the descent.
    """
    warm_up = max(1, round(_WARM_UP_SHARE * steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step + 1 - warm_up) / (steps + 1 - warm_up)))


def boundary_share_at(step: int, steps: int) -> float:
    """Share of the boundary weight at a step: from 1 linearly to 0 at a third of the run, 0 from there on.

    Args:
        step: 0 .. steps - 1.
        steps: Optimizer steps of the whole run.
    """
    return max(0.0, 1.0 - 3.0 * step / steps)


def decay_at(update: int, decay: float) -> float:
    """Decay of the averaged weights; small at first, so that a short run is not averaged with its own start.

    Args:
        update: Averages taken so far.
        decay: What it approaches.
    """
    return min(decay, (1.0 + update) / (10.0 + update))
