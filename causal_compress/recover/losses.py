"""What the student is asked for: the teacher's logits, the labels, and the teacher's activations at node boundaries."""

from __future__ import annotations

from collections.abc import Sequence

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
        teacher: The same shapes, same order.

    Returns:
        Unitless scalar; 0 where all agree, 1 where the student answers zero.
    """
    return torch.stack([_relative_error(ours, wanted) for ours, wanted in zip(student, teacher, strict=True)]).mean()


def _relative_error(ours: Tensor, wanted: Tensor) -> Tensor:
    # Summed in float32: bf16 has 8 bits, too few to add up a feature map.
    wanted = wanted.float()
    return F.mse_loss(ours.float(), wanted) / wanted.square().mean().clamp(min=_SMALLEST_MOMENT)
