"""How good counterfactuals are: agreement of other networks, realism, diversity, distance. Numerics only."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from causal_compress.errors import DataError

_BATCH = 256
_PAIRS = 200


def answers(network: Callable[[Tensor], Tensor], x: Float[Tensor, "samples ..."]) -> Float[Tensor, "samples classes"]:
    """Probabilities, in batches, without gradients."""
    with torch.no_grad():
        return torch.cat([network(batch).softmax(1) for batch in x.split(_BATCH)])


def agreement_pct(
    network: Callable[[Tensor], Tensor], x: Float[Tensor, "samples ..."], target: Int[Tensor, " samples"]
) -> float:
    """Inputs that a network gives the target class [percent].

    Under the network explained this is validity, under an independently trained one the oracle score.
    """
    return 100 * float((answers(network, x).argmax(1) == target).float().mean())


def distances(
    x: Float[Tensor, "samples ..."], counterfactual: Float[Tensor, "samples ..."], least: Tensor | float = 0.0
) -> dict[str, Float[Tensor, " samples"]]:
    """Proximity of each counterfactual to its original.

    Args:
        x: Originals.
        counterfactual: Same shape.
        least: Changes up to this do not count as changes.

    Returns:
        l1 and l2 over all positions, in normalised units; l0: number of changed positions.
    """
    change = (counterfactual - x).flatten(1)
    moved = ((counterfactual - x).abs() > least).flatten(1)
    return {"l1": change.abs().sum(1), "l2": change.norm(dim=1), "l0": moved.sum(1).float()}


def diversity_ratio(
    counterfactual: Float[Tensor, "samples ..."],
    target: Int[Tensor, " samples"],
    real: Float[Tensor, "reals ..."],
    label: Int[Tensor, " reals"],
) -> float:
    """Mean distance between counterfactuals of the same target, divided by that between real inputs of the class.

    Args:
        counterfactual: Made of different inputs.
        target: Their classes.
        real: Real inputs.
        label: Their classes.

    Returns:
        Mean over classes with at least 2 of each; 0 is complete mode collapse, about 1 as various as the data.
        NaN where no class has enough.
    """
    ratios = []
    for klass in target.unique():
        made, own = counterfactual[target == klass][:_PAIRS], real[label == klass][:_PAIRS]
        if len(made) > 1 and len(own) > 1:
            ratios.append(_mean_distance(made) / max(_mean_distance(own), 1e-12))
    return float(np.mean(ratios)) if ratios else float("nan")


def _mean_distance(x: Tensor) -> float:
    return float(torch.pdist(x.flatten(1).double()).mean())


def im1(x: Float[Tensor, "samples ..."], of_target: nn.Module, of_original: nn.Module) -> Float[Tensor, " samples"]:
    """Reconstruction error by the target class's autoencoder, divided by that of the original class's.

    Below 1: the counterfactual looks more like its target than like what it was made from.

    Source: Van Looveren and Klaise 2019, arXiv:1907.02584, eq. 7.
    """
    with torch.no_grad():
        return _error(of_target(x), x) / (_error(of_original(x), x) + 1e-8)


def im2(x: Float[Tensor, "samples ..."], of_target: nn.Module, of_all: nn.Module) -> Float[Tensor, " samples"]:
    """How differently the autoencoders of the target class and of all classes see x, relative to the size of x.

    Source: Van Looveren and Klaise 2019, arXiv:1907.02584, eq. 8.
    Limits: small for adversarial inputs too (Schut et al. 2021, arXiv:2103.08951); read it beside the oracle score.
    """
    with torch.no_grad():
        return _error(of_target(x), of_all(x)) / (x.flatten(1).abs().sum(1) + 1e-8)


def _error(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).flatten(1).square().sum(1)


def neighbour_distances(
    x: Float[Tensor, "samples ..."],
    label: Int[Tensor, " samples"],
    train: Float[Tensor, "reals ..."],
    train_label: Int[Tensor, " reals"],
    k: int = 5,
) -> NDArray[np.float64]:
    """Mean Euclidean distance of each input to its k nearest training inputs of the class `label`.

    Raises:
        DataError: a class with fewer than k training inputs.
    """
    from sklearn.neighbors import NearestNeighbors

    found = np.full(len(x), np.nan)
    for klass in label.unique():
        own = train[train_label == klass].flatten(1).numpy()
        if len(own) < k:
            raise DataError(
                f"class {int(klass)} has too few training inputs", found=str(len(own)), remedy=f"give at least {k}"
            )
        where = (label == klass).numpy()
        near, _ = NearestNeighbors(n_neighbors=k).fit(own).kneighbors(x[label == klass].flatten(1).numpy())
        found[where] = near.mean(1)
    return found


def plausible_pct(
    made: NDArray[np.float64], made_label: Tensor, real: NDArray[np.float64], real_label: Tensor
) -> float:
    """Inputs whose neighbour distance lies within the 95th percentile of real inputs of the same class [percent].

    Args:
        made: `neighbour_distances` of counterfactuals.
        made_label: Their classes.
        real: The same of real inputs that are not training inputs.
        real_label: Their classes.

    Returns:
        95 is what real inputs reach by definition.
    """
    inside = np.zeros(len(made), dtype=bool)
    for klass in made_label.unique():
        limit = np.quantile(real[(real_label == klass).numpy()], 0.95)
        where = (made_label == klass).numpy()
        inside[where] = made[where] <= limit
    return 100 * float(inside.mean())


def label_variation(
    before: Float[Tensor, "samples classes"],
    after: Float[Tensor, "samples classes"],
    original: Int[Tensor, " samples"],
    target: Int[Tensor, " samples"],
) -> Float[Tensor, " samples"]:
    """How much an oracle's belief in all *other* classes changed: Jensen-Shannon distance, 0 (best) to 1.

    Args:
        before: The oracle's probabilities for the originals.
        after: Those for the counterfactuals.
        original: Original classes.
        target: Target classes; original and target count as one class, between which probability may flow.

    Source: after the label variation score of Hvilshoj et al. 2021, arXiv:2104.07411, for one label instead of many.
    """
    from scipy.spatial.distance import jensenshannon

    lumped = [_lumped(values.double(), original, target).numpy() for values in (before, after)]
    return torch.from_numpy(np.nan_to_num(jensenshannon(*lumped, base=2, axis=1)))


def _lumped(probabilities: Tensor, original: Tensor, target: Tensor) -> Tensor:
    pair = torch.zeros_like(probabilities).scatter_(1, torch.stack([original, target], 1), 1.0)
    return torch.cat([(probabilities * pair).sum(1, keepdim=True), probabilities * (1 - pair)], 1).clamp_min(0)


def latency_ms(make: Callable[[Tensor, Tensor], object], x: Tensor, target: Tensor, repeats: int = 3) -> float:
    """Median wall time of making one counterfactual, in a batch of all inputs [ms per input].

    Args:
        make: Called with inputs and targets.
        x: The batch.
        target: Its targets.
        repeats: Timed calls, after one that is not timed.
    """
    make(x, target)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        make(x, target)
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds)) / len(x)
