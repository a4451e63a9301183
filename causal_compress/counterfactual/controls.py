"""What counterfactuals must beat: the nearest real input of the class, a gradient search, an adversarial attack."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from causal_compress.counterfactual.constraints import Domain, closeness, project, straight_through
from causal_compress.counterfactual.training import target_loss

_CHUNK = 256
_CONFIDENCE = 0.95
_PGD_STEPS, _PGD_STRIDE = 100, 0.01
_SEARCH_RATE, _SEARCH_WEIGHT = 0.02, 20.0

Logits = Callable[[Tensor], Tensor]


def nearest_unlike(
    x: Float[Tensor, "samples ..."],
    target: Int[Tensor, " samples"],
    train: Float[Tensor, "reals ..."],
    train_answer: Int[Tensor, " reals"],
) -> Float[Tensor, "samples ..."]:
    """The nearest real input that the network gives the target class: realistic by definition, but not near.

    Args:
        x: Originals.
        target: Wanted classes.
        train: Real inputs.
        train_answer: What the network answers to them; every target must occur.
    """
    found = x.clone()
    for klass in target.unique():
        own, where = train[train_answer == klass], torch.nonzero(target == klass)[:, 0]
        for rows in where.split(_CHUNK):
            nearest = torch.cdist(x[rows].flatten(1), own.flatten(1)).argmin(1)
            found[rows] = own[nearest]
    return found


def gradient_search(
    logits: Logits,
    domain: Domain,
    x: Float[Tensor, "samples ..."],
    target: Int[Tensor, " samples"],
    *,
    steps: int = 100,
) -> Float[Tensor, "samples ..."]:
    """Gradient descent on the input itself: target class and L1 distance, nothing that asks for realism.

    Args:
        logits: The network.
        domain: What is valid; kept at every step.
        x: Originals.
        target: Wanted classes.
        steps: Of Adam.

    Source: Wachter, Mittelstadt and Russell 2018, arXiv:1711.00399, eq. 2, with L1 distance.
    """
    moved = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([moved], _SEARCH_RATE)
    for _ in range(steps):
        candidate = straight_through(domain, x, moved)
        optimizer.zero_grad()
        lost = len(x) * target_loss(logits(candidate), target, _CONFIDENCE)
        (lost + _SEARCH_WEIGHT * closeness(domain, x, candidate).sum()).backward()
        optimizer.step()
    return project(domain, x, moved.detach())


def adversarial(
    logits: Logits,
    domain: Domain,
    x: Float[Tensor, "samples ..."],
    target: Int[Tensor, " samples"],
    *,
    confidence: float = _CONFIDENCE,
    radius: float = 0.3,
) -> Float[Tensor, "samples ..."]:
    """Targeted projected gradient descent inside an L-infinity ball: turns the network, and nobody else.

    Args:
        logits: The network.
        domain: Range of each position; other constraints are not heeded.
        x: Originals.
        target: Wanted classes.
        confidence: Each input stops at this probability of its target, as counterfactuals do; 1: full strength.
        radius: In pixel ranges, or standard deviations (tables).

    Source: Madry et al. 2018, arXiv:1706.06083; radius 0.3 as there for MNIST.
    """
    reach = radius * domain.reach()
    low, high = torch.maximum(x - reach, domain.low), torch.minimum(x + reach, domain.high)
    moved = x.clone()
    for _ in range(_PGD_STEPS):
        moved.requires_grad_()
        surprise = F.cross_entropy(logits(moved), target, reduction="none")
        (slope,) = torch.autograd.grad(surprise.sum(), moved)
        unsure = (surprise.detach() > -math.log(confidence)).view(-1, *[1] * (x.ndim - 1))
        moved = torch.where(unsure, moved.detach() - _PGD_STRIDE * reach * slope.sign(), moved.detach())
        moved = moved.clamp(low, high)
    return moved
