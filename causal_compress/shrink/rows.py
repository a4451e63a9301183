"""Ridge regression in its dual form, for layers that have more inputs than there are rows to fit them on.

Numerics only. A solution then lies in the span of the rows around the weights it starts from, so the equations are as
many as rows, not as features: 2,000 images settle a layer of 9,216 inputs without a 9,216 x 9,216 matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causal_compress.errors import NumericalError


@dataclass(frozen=True)
class FewRows:
    """Rows z (rows, features) and t (rows, targets) themselves, float32; answers what NormalEquations answers."""

    z: Tensor
    t: Tensor

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.z)

    @property
    def sum_z(self) -> Tensor:
        """Sum of the features (features,), float64."""
        return self.z.double().sum(0)

    def __add__(self, other: FewRows) -> FewRows:
        return FewRows(torch.cat([self.z, other.z]), torch.cat([self.t, other.t]))

    def select(self, kept: Tensor) -> FewRows:
        """The same rows for a subset of features (indices)."""
        return FewRows(self.z[:, kept], self.t)

    def covariance(self) -> Tensor:
        """Covariance of the features (features, features)."""
        centred = self.z.double() - self.z.double().mean(0)
        return centred.T @ centred / self.rows

    def blocks(self, columns: Tensor) -> Tensor:
        """Covariance inside each group of features: columns (groups, each) -> (groups, each, each)."""
        centred = (self.z.double() - self.z.double().mean(0))[:, columns].transpose(0, 1)
        return centred.transpose(1, 2) @ centred / self.rows

    def output_covariance(self, weight: Tensor) -> Tensor:
        """Covariance of z W (targets, targets)."""
        outputs = self.z.double() @ weight
        centred = outputs - outputs.mean(0)
        return centred.T @ centred / self.rows

    def output_variance(self, weight: Tensor) -> Tensor:
        """Variance of z W (targets,)."""
        return (self.z.double() @ weight).var(0, correction=0)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean squared error per row, summed over targets, of t = z W + b."""
        return float((self.t.double() - self.z.double() @ weight - bias).square().sum() / self.rows)

    def target_variance(self) -> float:
        """Variance of the targets, summed over targets."""
        return float(self.t.double().var(0, correction=0).sum())


class _Dual:
    """Centred rows, what the prior leaves of their targets, and the eigenvectors of their Gram matrix."""

    def __init__(self, sums: FewRows, prior: Tensor | None) -> None:
        z, t = sums.z.double(), sums.t.double()
        self.mean_z, self.mean_t, self.prior = z.mean(0), t.mean(0), prior
        self.z = z - self.mean_z
        left = t - self.mean_t
        if prior is not None:
            left = left - self.z @ prior
        gram = self.z @ self.z.T / len(z)
        if not (torch.isfinite(gram).all() and torch.isfinite(left).all()):
            raise NumericalError(
                "a closed-form refit gave NaN or infinity",
                found=f"{len(z)} rows of {z.shape[1]} features",
                wanted="finite activations on the calibration data",
                remedy="check the checkpoint and the data for NaN, or raise rewrite.penalties",
            )
        self.scale = max(float(gram.diagonal().sum()) / z.shape[1], 1e-12)
        self.values, self.vectors = torch.linalg.eigh(gram)
        self.turned = self.vectors.T @ left / len(z)

    def shares(self, penalty: float) -> Tensor:
        """What each row adds to the prior (rows, targets)."""
        damped = self.values.clamp_min(0.0) + penalty * self.scale
        added: Tensor = self.vectors @ (self.turned / damped.unsqueeze(1))
        return added

    def weight(self, penalty: float) -> Tensor:
        """The solution (features, targets)."""
        added = self.z.T @ self.shares(penalty)
        return added if self.prior is None else added.add_(self.prior)

    def errors(self, heldout: FewRows, penalties: Sequence[float]) -> list[float]:
        """Mean squared error on other rows, for each penalty; no weight is formed for it."""
        z = heldout.z.double() - self.mean_z
        left = heldout.t.double() - self.mean_t
        if self.prior is not None:
            left = left - z @ self.prior
        cross = z @ self.z.T
        return [float((left - cross @ self.shares(p)).square().sum() / len(z)) for p in penalties]


def fit_rows(
    train: FewRows, heldout: FewRows, penalties: Sequence[float], prior: Tensor | None = None
) -> tuple[Tensor, Tensor, float, float]:
    """As `refit.fit`, by the dual: ridge towards a prior, its penalty chosen on held-out rows, solved on all.

    Args:
        train: Rows for fitting.
        heldout: Other rows.
        penalties: Relative to the features' mean variance.
        prior: Weights (features, targets) to stay close to; None: zeros.

    Returns:
        weight (features, targets), bias (targets,), the penalty, its held-out mean squared error.

    Raises:
        NumericalError: rows that are not finite.
    """
    error, penalty = min(zip(_Dual(train, prior).errors(heldout, penalties), penalties, strict=True))
    both = _Dual(train + heldout, prior)
    weight = both.weight(penalty)
    return weight, both.mean_t - both.mean_z @ weight, penalty, error
