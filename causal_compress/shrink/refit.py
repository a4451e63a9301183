"""Closed forms: normal equations, ridge regression towards given weights, and the surgeon's greedy channel path.

Numerics only: tensors and numbers in, tensors and numbers out. Everything is centred, so biases are never penalised
and the mean of a removed channel moves into the bias by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_compress.errors import NumericalError
from causal_compress.shrink.rows import FewRows, fit_rows

ROWS = 16384


@dataclass
class NormalEquations:
    """Sums over rows z (features) and t (targets) that every least-squares solution needs, in float64."""

    features: int
    targets: int
    rows: float = 0.0
    sum_z: Tensor = field(init=False)
    sum_t: Tensor = field(init=False)
    zz: Tensor = field(init=False)
    zt: Tensor = field(init=False)
    tt: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sum_z = torch.zeros(self.features, dtype=torch.float64)
        self.sum_t = torch.zeros(self.targets, dtype=torch.float64)
        self.zz = torch.zeros(self.features, self.features, dtype=torch.float64)
        self.zt = torch.zeros(self.features, self.targets, dtype=torch.float64)
        self.tt = torch.zeros(self.targets, dtype=torch.float64)

    def add(self, z: Tensor, t: Tensor) -> None:
        """Add rows: z (rows, features), t (rows, targets); products are formed in float32 over bounded chunks."""
        for zs in z.split(ROWS):
            self.rows += len(zs)
            self.sum_z += (torch.ones(1, len(zs)) @ zs)[0]
            self.zz += zs.T @ zs
        self.add_targets(z, t)

    def add_targets(self, z: Tensor, t: Tensor) -> None:
        """Add the targets alone of rows that `add` has seen: a fraction of its work."""
        for zs, ts in zip(z.split(ROWS), t.split(ROWS), strict=True):
            ones = torch.ones(1, len(zs))
            self.sum_t += (ones @ ts)[0]
            self.zt += zs.T @ ts
            self.tt += (ones @ ts.square())[0]

    def without_targets(self) -> NormalEquations:
        """The same rows with targets yet to be added."""
        bare = NormalEquations(self.features, self.targets, self.rows)
        bare.sum_z, bare.zz = self.sum_z, self.zz
        return bare

    def __add__(self, other: NormalEquations) -> NormalEquations:
        total = NormalEquations(self.features, self.targets, self.rows + other.rows)
        for name in ("sum_z", "sum_t", "zz", "zt", "tt"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def covariance(self) -> Tensor:
        """Covariance of the features (features, features)."""
        mean = self.sum_z / self.rows
        return self.zz / self.rows - torch.outer(mean, mean)

    def cross_covariance(self) -> Tensor:
        """Covariance of features and targets (features, targets)."""
        return self.zt / self.rows - torch.outer(self.sum_z, self.sum_t) / self.rows**2

    def blocks(self, columns: Tensor) -> Tensor:
        """Covariance inside each group of features: columns (groups, each) -> (groups, each, each)."""
        return self.covariance()[columns.unsqueeze(2), columns.unsqueeze(1)]

    def output_covariance(self, weight: Tensor) -> Tensor:
        """Covariance of z W (targets, targets)."""
        return weight.T @ self.covariance() @ weight

    def output_variance(self, weight: Tensor) -> Tensor:
        """Variance of z W (targets,)."""
        return (weight * (self.covariance() @ weight)).sum(0)

    def select(self, kept: Tensor) -> NormalEquations:
        """The same sums for a subset of features (indices)."""
        part = NormalEquations(len(kept), self.targets, self.rows)
        part.sum_z, part.sum_t, part.tt = self.sum_z[kept], self.sum_t, self.tt
        part.zz, part.zt = self.zz[kept][:, kept], self.zt[kept]
        return part

    def bias(self, weight: Tensor) -> Tensor:
        """The best bias (targets) for a weight (features, targets)."""
        return (self.sum_t - weight.T @ self.sum_z) / self.rows

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean squared error per row, summed over targets, of t = z W + b."""
        cross = (weight * self.zt).sum() + bias @ self.sum_t
        square = (
            (weight * (self.zz @ weight)).sum() + 2 * bias @ (weight.T @ self.sum_z) + self.rows * bias.square().sum()
        )
        return float((self.tt.sum() - 2 * cross + square) / self.rows)

    def target_variance(self) -> float:
        """Variance of the targets, summed over targets: the error of the best constant."""
        return float((self.tt / self.rows - (self.sum_t / self.rows).square()).sum())


Sums: TypeAlias = NormalEquations | FewRows


def sample_mean(sums: Sums) -> Tensor:
    """Mean of the features (features,), float64."""
    return sums.sum_z / sums.rows


@dataclass(frozen=True)
class Solution:
    """An affine map with the evidence for it.

    Attributes:
        weight: (features, targets), float64.
        bias: (targets,).
        penalty: The ridge penalty chosen, relative to the features' mean variance.
        relative_error: Held-out mean squared error / variance of the targets; 0 is perfect, 1 is as good as a constant.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    relative_error: float


def projected(sums: Sums, weight: Tensor) -> Sums:
    """The same rows behind a linear map: features z W, targets as they were.

    Args:
        sums: Over z.
        weight: (features, other features).
    """
    if isinstance(sums, FewRows):
        return FewRows((sums.z.double() @ weight).float(), sums.t)
    part = NormalEquations(weight.shape[1], sums.targets, sums.rows)
    part.sum_z, part.zz = weight.T @ sums.sum_z, weight.T @ sums.zz @ weight
    part.sum_t, part.zt, part.tt = sums.sum_t, weight.T @ sums.zt, sums.tt
    return part


def ridge(equations: NormalEquations, penalty: float, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Least squares with a penalty on the distance from prior weights.

    Args:
        equations: Sums over the fitting rows.
        penalty: Relative to the features' mean variance, unitless.
        prior: Weights (features, targets) to stay close to; None: zeros.

    Returns:
        weight (features, targets) and bias (targets,), float64.
    """
    covariance = equations.covariance()
    strength = penalty * float(covariance.diagonal().mean().clamp_min(1e-12))
    cross = equations.cross_covariance()
    if prior is not None:
        cross = cross + strength * prior
    weight = _solve(covariance + strength * torch.eye(len(covariance), dtype=torch.float64), cross)
    return weight, equations.bias(weight)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    by_factor = int(info) == 0 or not torch.isfinite(matrix).all()  # lstsq dies of NaN before it can be reported
    solved = torch.cholesky_solve(right, factor) if by_factor else torch.linalg.lstsq(matrix, right).solution
    if not torch.isfinite(solved).all():
        raise NumericalError(
            "a closed-form refit gave NaN or infinity",
            found=f"normal equations of {len(matrix)} features",
            wanted="finite activations on the calibration data",
            remedy="check the checkpoint and the data for NaN, or raise rewrite.penalties",
        )
    return solved


def fit(train: Sums, heldout: Sums, penalties: Sequence[float], prior: Tensor | None = None) -> Solution:
    """Ridge regression whose penalty has the least held-out error; then solved on both parts together.

    Args:
        train: Sums over the fitting rows.
        heldout: Sums over other rows.
        penalties: Relative penalties to try.
        prior: Weights to stay close to; None: zeros.
    """
    if isinstance(train, FewRows):
        assert isinstance(heldout, FewRows)
        weight, bias, penalty, error = fit_rows(train, heldout, penalties, prior)
        return Solution(weight, bias, penalty, error / max(heldout.target_variance(), 1e-12))
    assert isinstance(heldout, NormalEquations)
    scored = [(heldout.error(*ridge(train, penalty, prior)), penalty) for penalty in penalties]
    error, penalty = min(scored)
    weight, bias = ridge(train + heldout, penalty, prior)
    return Solution(weight, bias, penalty, error / max(heldout.target_variance(), 1e-12))


@dataclass
class Consumer:
    """One affine layer that reads a channel group: what the surgeon needs to know of it.

    Attributes:
        equations: Sums over its input features and targets.
        weight: Current solution (features, targets).
        columns: Feature indices of each channel (channels, features per channel); equal for all channels.
        penalty: Relative ridge penalty.
    """

    equations: Sums
    weight: Tensor
    columns: Tensor
    penalty: float


def surgeon_path(consumers: Sequence[Consumer], counts: Iterable[int]) -> dict[int, Tensor]:
    """Which channels stay at each count, removing greedily what costs least after all others have made up for it.

    Removing channel group g from a ridge solution W costs tr(W_g' (inv(H)_gg)^-1 W_g) (optimal brain surgeon); the
    costs of a group that several consumers read are added.

    Args:
        consumers: All readers of the group; the same number of channels in each.
        counts: Numbers of channels wanted; each at least 1.

    Returns:
        For each count the kept channels (sorted indices).

    Source: Hassibi and Stork 1993 (optimal brain surgeon), with blocks in place of single weights.
    """
    wanted = sorted(set(counts), reverse=True)
    states = [_State(consumer) for consumer in consumers]
    alive = torch.arange(len(consumers[0].columns))
    kept: dict[int, Tensor] = {count: alive for count in wanted if count >= len(alive)}
    for count in (count for count in wanted if count < len(alive)):
        while len(alive) > count:
            cost = torch.stack([state.costs(alive) for state in states]).sum(0)
            chunk = min(max(1, len(alive) // 32), len(alive) - count)
            gone = alive[torch.topk(cost, chunk, largest=False).indices]
            for state in states:
                state.remove(gone)
            alive = alive[~torch.isin(alive, gone)]
        kept[count] = alive
    return kept


class _State:
    """One consumer's inverse and solution while channels go."""

    def __init__(self, consumer: Consumer) -> None:
        covariance = consumer.equations.covariance()
        strength = consumer.penalty * float(covariance.diagonal().mean().clamp_min(1e-12))
        identity = torch.eye(len(covariance), dtype=torch.float64)
        self.inverse = _solve(covariance + max(strength, 1e-9) * identity, identity)
        self.weight = consumer.weight.clone()
        self.columns = consumer.columns

    def costs(self, alive: Tensor) -> Tensor:
        """Cost of removing each living channel (channels,)."""
        columns = self.columns[alive]
        blocks = self.inverse[columns.unsqueeze(2), columns.unsqueeze(1)]
        weight = self.weight[columns]
        solved: Tensor = torch.linalg.solve(blocks, weight)
        return (solved * weight).sum((1, 2))

    def remove(self, gone: Tensor) -> None:
        """Take channels out: the rest of the solution makes up for them."""
        columns = self.columns[gone].flatten()
        gain = torch.linalg.solve(self.inverse[columns][:, columns], self.inverse[columns]).T
        self.weight -= gain @ self.weight[columns]
        self.inverse -= gain @ self.inverse[columns]
        self.weight[columns] = 0.0
        self.inverse[columns] = 0.0
        self.inverse[:, columns] = 0.0


def sample_rows(layer: nn.Module, x: Tensor, y: Tensor, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Matching rows of an affine layer's inputs and outputs, a random choice of positions where there are too many.

    Args:
        layer: Conv2d (ungrouped) or Linear.
        x: Its input (samples, channels, height, width) or (samples, ..., features).
        y: Its output, or what it shall become.
        most: Largest number of rows.
        seed: Of the choice.

    Returns:
        (rows, features) and (rows, targets); features in the flattened weight's order: channel, then kernel position.
    """
    if isinstance(layer, nn.Conv2d):
        windows, targets = _windows(layer, x), y.permute(0, 2, 3, 1)
    else:
        windows, targets = x.reshape(-1, 1, 1, x.shape[-1]), y.reshape(-1, 1, 1, y.shape[-1])
    count = targets.shape[:3].numel()
    if count <= most:
        return windows.reshape(count, -1), targets.reshape(count, -1)
    chosen = torch.randint(count, (most,), generator=torch.Generator().manual_seed(seed))
    sample, rest = chosen // targets.shape[1:3].numel(), chosen % targets.shape[1:3].numel()
    row, column = rest // targets.shape[2], rest % targets.shape[2]
    return windows[sample, row, column].flatten(1), targets[sample, row, column]


def _windows(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A view of the patches that a convolution reads (samples, height, width, channels, kernel height, width)."""
    vertical, horizontal = (int(size) for size in layer.padding)
    padded = F.pad(x, (horizontal, horizontal, vertical, vertical)) if vertical or horizontal else x
    for axis in (0, 1):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        padded = padded.unfold(2 + axis, reach, layer.stride[axis])
    return padded[..., :: layer.dilation[0], :: layer.dilation[1]].permute(0, 2, 3, 1, 4, 5)


def weight_matrix(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The layer's weight as (features, targets), float64."""
    return layer.weight.detach().flatten(1).T.double()


def write_affine(
    layer: nn.Conv2d | nn.Linear, norm: nn.Module | None, solution: tuple[Tensor, Tensor], z: Sums
) -> None:
    """Put a solution into a layer, and into the batch norm behind it so that both together compute exactly it.

    The batch norm's running statistics become those of the layer's new output and its scale the standard deviation, so
    that it also behaves in training mode as it does in evaluation mode.

    Args:
        layer: Changed in place; gets a bias where no batch norm follows.
        norm: The batch norm right behind the layer, or None.
        solution: weight (features, targets), bias (targets,).
        z: Sums over the features that the solution was fitted on.
    """
    weight, bias = solution
    kernel = layer.kernel_size if isinstance(layer, nn.Conv2d) else ()
    shape = (weight.shape[1], -1, *kernel)
    with torch.no_grad():
        layer.weight = nn.Parameter(weight.T.reshape(shape).to(layer.weight.dtype).contiguous())
        if norm is None:
            layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
            return
        mean = weight.T @ (z.sum_z / z.rows)
        variance = z.output_variance(weight).clamp_min(1e-8)
        _set_norm(norm, mean, variance, bias + mean, layer.bias)


def _set_norm(norm: nn.Module, mean: Tensor, variance: Tensor, shift: Tensor, layer_bias: Tensor | None) -> None:
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    kind = norm.running_mean.dtype
    if layer_bias is not None:
        layer_bias.zero_()
    norm.running_mean = mean.to(kind)
    norm.running_var = variance.to(kind)
    norm.weight = nn.Parameter((variance + norm.eps).sqrt().to(kind))
    norm.bias = nn.Parameter(shift.to(kind))
    norm.num_features = len(mean)


def effective_affine(layer: nn.Conv2d | nn.Linear, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """The affine map that a layer and the batch norm behind it compute in evaluation mode.

    Returns:
        weight (features, targets) and bias (targets,), float64.
    """
    weight = weight_matrix(layer)
    bias = torch.zeros(weight.shape[1], dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
    if norm is None:
        return weight, bias
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = (norm.running_var.double() + norm.eps).rsqrt() * (
        1.0 if norm.weight is None else norm.weight.detach().double()
    )
    shift = 0.0 if norm.bias is None else norm.bias.detach().double()
    return weight * gain, (bias - norm.running_mean.double()) * gain + shift
