"""Gauss-Newton refits: all layers of a part together, towards what the teacher's node puts out behind its activation.

The closed forms solve one layer at a time, and inner layers aim at the teacher's inner values. What counts is what
leaves the part. Around its present weights a part is nearly linear in them, so that the weights which bring its output
nearest to the teacher's are a least-squares problem; conjugate gradients solve it without ever forming its matrix.
Nothing is drawn by chance and no label is seen: calibration inputs in, weights out, as with the closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from causal_compress.shrink.repair import FEWEST_ROWS, HELD_OUT_EVERY, affine_layers
from causal_compress.understand.tail import BATCH_NORMS

ROUNDS = 3
ITERATIONS = 10  # of conjugate gradients; to stop early keeps weights near where they are
STEPS = (1.0, 0.5, 0.25)
WORTHWHILE = 0.99  # a round that leaves more of the error is the last
MOST_WEIGHTS = 2_000_000
MOST_BYTES = 4e9
_COPIES = 4  # of each activation: its value, what it becomes, and the same of the transposed map
_SMALLEST = 1e-12

Vector = list[Tensor]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Refined:
    """Held-out squared error of a part's output over the variance of what is wanted, before and after."""

    before: float
    after: float


def refine(part: fx.GraphModule, inputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Refined | str | None:
    """Move all weights of a part so that its output comes nearer to what is wanted (in place).

    Steps are taken only where they lower the error on held-out chunks (every fourth, the last of fewer), so a part
    never gets worse.

    Args:
        part: In evaluation mode, batch norms with statistics of their own.
        inputs: Chunks that enter it, two or more.
        wanted: For each chunk what shall come out.

    Returns:
        The errors; None for a single layer, which the closed form has solved; or why it can't be done.
    """
    weights: dict[str, Tensor] = {name: value for name, value in part.named_parameters() if value.is_floating_point()}
    size = sum(value.numel() for value in weights.values())
    if len(affine_layers(part)) < 2:
        return None
    if len(inputs) < 2:
        return "there is one chunk of calibration inputs, and none to hold out"
    if size > MOST_WEIGHTS:
        return f"{size} weights are too many (limit {MOST_WEIGHTS})"
    train, heldout = _chunks(part, inputs, wanted)
    start = _error(part, weights, heldout)
    try:
        moved, error = _descend(part, weights, train, heldout, start)
    except RuntimeError as failure:  # of an operation that can't be differentiated twice
        return f"it can't be differentiated ({' '.join(str(failure).split())[:80]})"
    if error < start:
        with torch.no_grad():
            for name, value in part.named_parameters():
                value.copy_(moved.get(name, value))
        settle_norms(part, [x for x, _ in train])
    return Refined(start, error)


def _descend(
    part: nn.Module, weights: dict[str, Tensor], train: Sequence[Pair], heldout: Sequence[Pair], error: float
) -> tuple[dict[str, Tensor], float]:
    """Rounds of steps, each as long as held-out chunks like it best; ends where they no longer do."""
    for _ in range(ROUNDS):
        direction = _direction(part, weights, train)
        trials = [{name: weights[name] + step * direction[name] for name in weights} for step in STEPS]
        errors = [_error(part, trial, heldout) for trial in trials]
        best = min(range(len(STEPS)), key=lambda index: errors[index])
        if not errors[best] < error:
            break
        weights, gained, error = trials[best], errors[best] / error, errors[best]
        if gained > WORTHWHILE:
            break
    return weights, error


def _chunks(part: fx.GraphModule, inputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[list[Pair], list[Pair]]:
    """Chunks for fitting and held-out ones: as many as have rows (positions) enough, each as large as memory bears."""
    positions = math.prod(wanted[0].shape[2:]) if wanted[0].ndim == 4 else 1
    needed = max(2 * HELD_OUT_EVERY, math.ceil(FEWEST_ROWS / (positions * len(inputs[0]))))
    pairs = list(zip(inputs, wanted, strict=True))[:needed]
    most = max(1, int(MOST_BYTES / (_bytes(part, inputs[0][:1]) * len(pairs))))
    pairs = [(x[:most], y[:most]) for x, y in pairs]
    last = min(HELD_OUT_EVERY, len(pairs)) - 1
    held = [index % HELD_OUT_EVERY == last for index in range(len(pairs))]
    split = {out: [pair for pair, mine in zip(pairs, held, strict=True) if mine == out] for out in (False, True)}
    return split[False], split[True]


@torch.no_grad()
def _bytes(part: fx.GraphModule, x: Tensor) -> int:
    """What one input's activations take while they are kept for differentiating twice."""
    sizes: list[int] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, out: sizes.append(out.numel() if isinstance(out, Tensor) else 0))
        for module in part.modules()
        if not any(True for _ in module.children())
    ]
    try:
        part(x)
    finally:
        for hook in hooks:
            hook.remove()
    return _COPIES * x.element_size() * (x.numel() + sum(sizes))


@torch.no_grad()
def _error(part: nn.Module, weights: dict[str, Tensor], chunks: Sequence[Pair]) -> float:
    wrong = sum(float((functional_call(part, weights, (x,)) - y).double().square().sum()) for x, y in chunks)
    mean = sum(y.double().sum(0) for _, y in chunks) / sum(len(y) for _, y in chunks)
    return wrong / max(sum(float((y - mean).double().square().sum()) for _, y in chunks), _SMALLEST)


def _direction(part: nn.Module, weights: dict[str, Tensor], chunks: Sequence[Pair]) -> dict[str, Tensor]:
    """The step of all weights that least squares ask for, each scaled by its tensor's size."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
    scales = [value.detach().norm() / value.numel() ** 0.5 + _SMALLEST for value in leaves.values()]
    with torch.enable_grad():
        maps = [_Linear(part, leaves, x) for x, _ in chunks]
    left = [y - each.output for each, (_, y) in zip(maps, chunks, strict=True)]

    def forth(step: Vector) -> Vector:
        scaled = [scale * value for scale, value in zip(scales, step, strict=True)]
        return [each.forth(scaled) for each in maps]

    def back(residual: Vector) -> Vector:
        parts = [each.back(value) for each, value in zip(maps, residual, strict=True)]
        return [scale * torch.stack(one).sum(0) for scale, one in zip(scales, zip(*parts, strict=True), strict=True)]

    step = least_squares(forth, back, left, ITERATIONS)
    return {name: scale * value for name, scale, value in zip(leaves, scales, step, strict=True)}


class _Linear:
    """A part on one chunk as a linear map of its weights, and that map's transpose; both by differentiating."""

    def __init__(self, part: nn.Module, leaves: dict[str, Tensor], x: Tensor) -> None:
        self.leaves = list(leaves.values())
        self.graph = functional_call(part, leaves, (x,))
        self.output = self.graph.detach()
        self.dummy = torch.zeros_like(self.output, requires_grad=True)
        self.transposed = torch.autograd.grad(
            self.graph, self.leaves, self.dummy, create_graph=True, materialize_grads=True
        )

    def back(self, residual: Tensor) -> Vector:
        return list(torch.autograd.grad(self.graph, self.leaves, residual, retain_graph=True, materialize_grads=True))

    def forth(self, step: Vector) -> Tensor:
        """The transpose is linear in `dummy`, so what differentiates it is the map itself."""
        (moved,) = torch.autograd.grad(self.transposed, [self.dummy], step, retain_graph=True, materialize_grads=True)
        return moved


def least_squares(
    forth: Callable[[Vector], Vector], back: Callable[[Vector], Vector], wanted: Vector, iterations: int
) -> Vector:
    """Conjugate gradients on min |A v - wanted|^2 from v = 0; stopped early, v stays where the data speak loudest.

    Args:
        forth: A.
        back: Its transpose.
        wanted: What A v shall be, in pieces.
        iterations: At most.

    Source: Hestenes and Stiefel 1952, in the form for least squares (CGLS).
    """
    left = [value.clone() for value in wanted]
    slope = back(left)
    step, ahead, size = [torch.zeros_like(value) for value in slope], slope, _square(slope)
    for _ in range(iterations):
        moved = forth(ahead)
        length = _square(moved)
        if length <= _SMALLEST or size <= _SMALLEST:
            break
        far = size / length
        step = [value + far * along for value, along in zip(step, ahead, strict=True)]
        left = [value - far * along for value, along in zip(left, moved, strict=True)]
        slope = back(left)
        size, before = _square(slope), size
        ahead = [value + size / before * along for value, along in zip(slope, ahead, strict=True)]
    return step


def _square(vector: Vector) -> float:
    return sum(float(value.double().square().sum()) for value in vector)


@torch.no_grad()
def settle_norms(part: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Give every batch norm of a part the statistics of what it is fed now; what it computes stays (in place).

    Args:
        part: In evaluation mode.
        inputs: Chunks that enter it.
    """
    norms = [
        norm
        for norm in part.modules()
        if isinstance(norm, BATCH_NORMS) and norm.affine and norm.running_mean is not None
    ]
    sums: dict[nn.Module, list[Tensor]] = {norm: [] for norm in norms}

    def note(norm: nn.Module, given: tuple[Tensor]) -> None:
        rows = given[0].double().transpose(0, 1).flatten(1)
        sums[norm].append(torch.stack([torch.full_like(rows[:, 0], rows.shape[1]), rows.sum(1), rows.square().sum(1)]))

    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        for x in inputs if norms else ():
            part(x)
    finally:
        for hook in hooks:
            hook.remove()
    for norm in norms:
        if sums[norm]:
            _settle(norm, *torch.stack(sums[norm]).sum(0))


def _settle(norm: nn.BatchNorm1d | nn.BatchNorm2d, count: Tensor, total: Tensor, squares: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=_SMALLEST)
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    norm.bias.copy_(norm.bias + (mean - norm.running_mean) * gain)
    norm.weight.copy_(gain * (variance + norm.eps).sqrt())
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
