"""What takes the steps: orthogonalised momentum for weight matrices, gradient descent for the rest, and averages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from causal_compress.recipe import DistillSection
from causal_compress.recover.schedule import decay_at

_SGD_MOMENTUM = 0.9
_MATRIX_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a quintic that lifts small singular values fast, and ends near one
_ITERATIONS = 5
_SMALLEST_NORM = 1e-12
_TOGETHER = 2**20  # numbers that are moved at once; more is no faster, and takes four times their memory


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, in steps that are a share of the weights' own norm.

    A plain gradient is nearly of low rank: a few directions take all of the step. With its singular values made alike,
    all directions learn. The step's length does not depend on the gradient's, so one rate serves all layers.

    Args:
        groups: Dictionaries with `params` (each at least two-dimensional) and `blocks`: how many independent matrices
            one weight holds, one below the other (a convolution's groups).
        lr: Relative change of a weight in one step: norm of the step over norm of the weight [share]. With it the
            scale of a weight says nothing about how fast it learns, so there is nothing for a weight decay to do.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", for the momentum and the
        Newton-Schulz iteration; steps relative to the norm as in You et al. 2017, arXiv:1708.03888.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "blocks": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every weight that has a gradient.

        Args:
            closure: Evaluates the loss anew, as torch's optimizers take it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for alike in _by_shape(weights):
                self._move(alike, group)
        return loss

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Steps of weights of one shape, whose matrices are orthogonalised together: a GPU waits for every call."""
        momenta = []
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            momenta.append(state["momentum"])
        gradients = [cast(Tensor, weight.grad) for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1.0 - _MATRIX_MOMENTUM)
        ahead = torch.stack(torch._foreach_lerp(gradients, momenta, _MATRIX_MOMENTUM))
        blocks = len(weights) * group["blocks"]
        directions = orthogonalised(ahead.reshape(blocks, ahead.shape[1] // group["blocks"], -1)).reshape(ahead.shape)
        norms = torch.linalg.vector_norm(directions.flatten(1), dim=1).clamp(min=_SMALLEST_NORM)
        lengths = group["lr"] * torch.stack(torch._foreach_norm(weights)) / norms
        steps = (directions * lengths.reshape(-1, *[1] * weights[0].ndim)).to(weights[0].dtype)
        torch._foreach_sub_(weights, list(steps))


def _by_shape(weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """The weights; those of one shape, type and device together, as far as they are small."""
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for weight in weights:
        alike.setdefault((weight.shape, weight.dtype, weight.device), []).append(weight)
    at_once = ((group, max(1, _TOGETHER // max(1, group[0].numel()))) for group in alike.values())
    return [group[start : start + count] for group, count in at_once for start in range(0, len(group), count)]


def orthogonalised(matrices: Tensor) -> Tensor:
    """About the nearest semi-orthogonal matrices: same singular vectors, singular values between 0.7 and 1.2.

    Args:
        matrices: float (matrices, rows, columns).

    Returns:
        float32, same shape. Singular values below a thousandth of a matrix's norm stay smaller; zeros stay zeros.

    Source: Jordan et al. 2024, "Muon", for the coefficients.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).float()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def averaging(decay: float) -> Callable[..., None]:
    """What moves averaged weights towards the current ones, for torch's AveragedModel.

    Args:
        decay: Share of the average that a step keeps, once it has seen enough steps (`decay_at`).
    """

    @torch.no_grad()
    def average(averaged: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor | int) -> None:
        if not averaged[0].is_floating_point():  # a batch norm counts its batches; there is nothing to average
            torch._foreach_copy_(list(averaged), list(current))
        else:
            torch._foreach_lerp_(list(averaged), list(current), 1.0 - decay_at(int(updates), decay))

    return average


def optimizers_of(student: nn.Module, section: DistillSection) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers that train all of a student's parameters between them, each group with its `peak` rate.

    Args:
        student: All of its parameters will be trained.
        section: Says `optimizer`, rates and weight decay.

    Returns:
        SGD alone, or Muon for the weights of convolutions and linears and SGD for the rest.
    """
    matrices = dict(_matrices(student)) if section.optimizer == "muon" else {}
    rest = [p for p in student.parameters() if p not in matrices]
    # Norms and biases set scale and offset; shrinking them regularises nothing.
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        optimizers.append(torch.optim.SGD(groups, lr=section.learning_rate, momentum=_SGD_MOMENTUM, nesterov=True))
    if matrices:
        by_blocks = [
            {"params": [p for p, blocks in matrices.items() if blocks == count], "blocks": count}
            for count in sorted(set(matrices.values()))
        ]
        optimizers.append(Muon(by_blocks, section.relative_rate))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return tuple(optimizers)


def _matrices(student: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Weights whose rows are outputs and whose columns are inputs, and how many matrices each holds.

    One that is zero has no norm to take a share of; one that a parametrization computes is not what is trained.
    """
    for module in student.modules():
        if isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, _ConvTransposeNd):
            weight = cast(object, module.weight)
            if isinstance(weight, nn.Parameter) and bool(weight.detach().any()):
                yield weight, getattr(module, "groups", 1)
