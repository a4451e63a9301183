"""An input beside its counterfactual: at which site do the two part, and how does each answer interventions there."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from causal_compress.counterfactual.explainer import Explainer, Found, describe
from causal_compress.errors import DataError
from causal_compress.inputs.data import Split
from causal_compress.recipe import InterveneSection
from causal_compress.results import Contrast, SitePart
from causal_compress.understand.effect import effect_terms, units
from causal_compress.understand.intervene import intervene_batch
from causal_compress.understand.trace import Network, site_activations

_INPUTS = 500
_BATCH = 64  # all activations of a batch are held at a time
_LEAST = 10
_QUANTILE = 0.95
_MASKS = 64

TOO_FEW = (
    f"not known: what is usual within a class takes {_LEAST} inputs of each of the two classes that the network gets "
    "right, and the split has fewer; another --split may have more"
)
"""Why a contrast has no sites."""

SiteUnits = list[Float[Tensor, "samples units"]]


@dataclass(frozen=True, eq=False)
class ClassAxes:
    """For each site a vector whose product with a change is the share of the way from class mean to class mean that the
    change goes, and the 95th percentile of that share between real inputs of one class.
    """

    axes: list[Float[Tensor, " units"]]
    floors: list[float]
    pairs: int


def contrast(
    explainer: Explainer, network: Network, found: Found, split: Split, index: int, *, seed: int = 0
) -> Contrast:
    """Where an input and its counterfactual part in the network.

    Args:
        explainer: It made the counterfactual.
        network: The network explained.
        found: Of this one input.
        split: Where the input comes from; inputs drawn from it give class means and the floor.
        index: The input's position in the split.
        seed: Of the masks and of those inputs.

    Returns:
        For every site the share of the way from class to class, what is usual within a class, and both local effects;
        no sites where the split has too few inputs of the two classes that the network gets right (`TOO_FEW`).

    Limits: units are means over positions, so two inputs may look alike at a site that tells them apart by place.
    """
    sites: tuple[SitePart, ...] = ()
    pairs = 0
    with suppress(DataError):  # too few inputs of a class: the counterfactual is worth showing all the same
        axes = class_axes(network, split, int(found.predicted[0]), int(found.target[0]), seed=seed)
        sites, pairs = _site_parts(explainer, network, found, axes, seed), axes.pairs
    return Contrast(
        counterfactual=describe(explainer, found, split, [index])[0],
        sites=sites,
        parts_at=parting_site(sites),
        floor_pairs=pairs,
        masks=_MASKS,
    )


def _site_parts(
    explainer: Explainer, network: Network, found: Found, axes: ClassAxes, seed: int
) -> tuple[SitePart, ...]:
    with torch.no_grad():
        ours, theirs = (_site_units(network, x) for x in (found.x, found.counterfactual))
    gaps = [float(axis @ (b - a)[0]) for axis, a, b in zip(axes.axes, ours, theirs, strict=True)]
    effects = [_local_effects(explainer, network, x, seed) for x in (found.x, found.counterfactual)]
    return tuple(
        SitePart(
            site=region.info.name,
            distance=gaps[at],
            floor=axes.floors[at],
            ace_original=effects[0][at][0],
            ace_original_stderr=effects[0][at][1],
            ace_counterfactual=effects[1][at][0],
            ace_counterfactual_stderr=effects[1][at][1],
        )
        for at, region in enumerate(network.regions)
    )


def parting_site(sites: tuple[SitePart, ...]) -> str | None:
    """The first site from which on, up to the output, the share of the way exceeds its floor; None if there is none."""
    parted = None
    for site in reversed(sites):
        if site.distance <= site.floor:
            break
        parted = site.site
    return parted


def class_axes(network: Network, split: Split, source: int, goal: int, *, seed: int = 0) -> ClassAxes:
    """At each site the way from one class's mean to another's, and how far inputs of one class lie apart along it.

    Args:
        network: Traced network.
        split: Inputs of the two classes are drawn from it; only those that the network gets right are used.
        source: The class where the way begins.
        goal: The class where it ends.
        seed: Of the draw.

    Raises:
        DataError: too few inputs of one of the two classes.
    """
    drawn = [_drawn(split, klass, seed) for klass in (source, goal)]
    _refuse_few([len(rows) for rows in drawn])
    chosen = np.concatenate(drawn)
    label = split.labels[torch.from_numpy(chosen)]
    sites = _units_of_rows(network, split, chosen)
    right = sites[-1].argmax(1) == label
    groups = [torch.nonzero(right & (label == klass))[:, 0] for klass in (source, goal)]
    _refuse_few([len(group) for group in groups])
    axes, floors = [], []
    for u in sites:
        way = u[groups[1]].mean(0) - u[groups[0]].mean(0)
        axis = way / way.square().sum().clamp_min(1e-24)
        axes.append(axis)
        steps = torch.cat([(u[group][1:] - u[group][:-1]) @ axis for group in groups])
        floors.append(float(steps.abs().quantile(_QUANTILE)))
    return ClassAxes(axes, floors, sum(len(group) - 1 for group in groups))


def _refuse_few(counts: list[int]) -> None:
    if min(counts) < _LEAST:
        raise DataError(
            "too few inputs to say what is usual within a class",
            found=f"{counts[0]} and {counts[1]} inputs of the two classes that the network gets right",
            wanted=f"at least {_LEAST} of each among at most {_INPUTS} that are drawn from the split",
            remedy="give more data",
        )


def _drawn(split: Split, klass: int, seed: int) -> NDArray[np.int64]:
    """At most so many positions of a class's inputs, drawn at random: a split may stand in any order."""
    members = torch.nonzero(split.labels == klass)[:, 0].numpy()
    return np.random.default_rng(seed).permutation(members)[:_INPUTS]


def _units_of_rows(network: Network, split: Split, rows: NDArray[np.int64]) -> SiteUnits:
    found = []
    for start in range(0, len(rows), _BATCH):
        x, _ = split.take(rows[start : start + _BATCH])
        with torch.no_grad():
            found.append(_site_units(network, x))
    return [torch.cat(site) for site in zip(*found, strict=True)]


def _site_units(network: Network, x: Tensor) -> SiteUnits:
    return [units(activation) for activation in site_activations(network, x)]


def _local_effects(explainer: Explainer, network: Network, x: Tensor, seed: int) -> list[tuple[float, float]]:
    """ACE of masking features of this one input, at every site, with its standard error over masks."""
    section = InterveneSection(baselines=["mean"], masks=1, grid=explainer.section.grid)
    repeated = x.expand(_MASKS, *x.shape[1:])
    generator = torch.Generator().manual_seed(seed)
    changed, _, _ = next(iter(intervene_batch(repeated, explainer.features, section, generator)))
    with torch.no_grad():
        before, after = _site_units(network, x), _site_units(network, changed)
    terms = [effect_terms(b.expand_as(a), a)[0] for b, a in zip(before, after, strict=True)]
    return [(float(term.mean()), float(term.std() / len(term) ** 0.5)) for term in terms]
