"""What the student is asked for: the teacher's logits, the labels, and the teacher's activations at node boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST_MOMENT = 1e-12


def kd_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of the softened outputs, times the squared temperature.

    Args:
        student: Logits (samples, classes).
        teacher: Logits (samples, classes) of the same inputs.
        temperature: Both are divided by this; the factor keeps the gradient's size independent of it.

    Returns:
        Scalar [nats], the mean over samples.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    answer = F.log_softmax(student.float() / temperature, dim=1)
    wanted = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(answer, wanted, log_target=True, reduction="batchmean") * temperature**2


def label_loss(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Cross entropy over the rows that count.

    Args:
        logits: (samples, classes).
        labels: int64 (samples,).
        counted: bool (samples,); an intervened input has no label that could be trusted.

    Returns:
        Scalar [nats]; 0 where no row counts.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def boundary_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared distance of activations in units of the teacher's second moment, the mean over boundaries.

    Args:
        student: One activation per boundary, at least one.
        teacher: The same shapes and precisions, same order; constants, no gradient goes there.

    Returns:
        Unitless scalar; 0 where all agree, 1 where the student answers zero.
    """
    errors = [_RelativeError.apply(ours, wanted) for ours, wanted in zip(student, teacher, strict=True)]
    return torch.stack(errors).mean()


class _RelativeError(torch.autograd.Function):
    """|ours - wanted|^2 / |wanted|^2 with its gradient by hand.

    The same written with mse_loss makes float32 copies of every feature map, forth and back, and takes a third of a
    training step; this takes a fifth of that. Sums are float32 whatever the activations are.
    """

    @staticmethod
    def forward(ctx: Any, ours: Tensor, wanted: Tensor) -> Tensor:
        difference = ours - wanted
        moment = torch.linalg.vector_norm(wanted, dtype=torch.float32).square().clamp(min=_SMALLEST_MOMENT)
        ctx.save_for_backward(difference, moment)
        error: Tensor = torch.linalg.vector_norm(difference, dtype=torch.float32).square() / moment
        return error

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        difference, moment = ctx.saved_tensors
        return difference * (2.0 * upstream / moment).to(difference.dtype), None
