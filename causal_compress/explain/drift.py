"""Whether the student decides for the same reasons: attributions and causal effects beside the teacher's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from causal_compress.explain.paired import mean_interval
from causal_compress.inputs.data import Features, Split
from causal_compress.progress import progress
from causal_compress.recipe import AuditSection, InterveneSection
from causal_compress.results import AttributionDrift, MapDrift, NodeDrift, Skip
from causal_compress.shrink.surgery import Student
from causal_compress.understand.effect import effect_terms, units
from causal_compress.understand.intervene import feature_names, intervene_batch
from causal_compress.understand.trace import Network, Region

Numbers = NDArray[np.float64]

FEWEST = 3
"""Ranks of fewer than three things say nothing."""


def feature_effects(
    model: nn.Module,
    x: Float[Tensor, "samples ..."],
    features: Features,
    section: AuditSection,
    generator: torch.Generator,
) -> Float[Tensor, "samples features"]:
    """The effect of each feature of each input on the output: mean over the masks that contain it.

    Args:
        model: Classifier in evaluation mode.
        x: Normalised inputs.
        features: What can be masked.
        section: Masks for each input, grid, baseline.
        generator: Draws the masks.

    Returns:
        |delta| * KL of the logits [nats]; NaN for a feature that was never masked.
    """
    interventions = InterveneSection(baselines=[section.baseline], grid=section.grid, masks=section.masks)
    effects: Tensor | None = None
    counts: Tensor | None = None
    with torch.inference_mode():
        before = model(x)
        for changed, mask, _ in intervene_batch(x, features, interventions, generator):
            weights = mask.double()
            found = weights * effect_terms(before, model(changed))[0][:, None]
            effects = found if effects is None else effects + found
            counts = weights if counts is None else counts + weights
    assert effects is not None
    assert counts is not None
    return effects / counts


def attribution_drift(
    networks: tuple[nn.Module, nn.Module, nn.Module | None],
    split: Split,
    features: Features,
    section: AuditSection,
    *,
    seed: int,
) -> AttributionDrift | Skip:
    """How far the student's reasons are from the teacher's, beside the noise of the method itself.

    Args:
        networks: Teacher, student, and a network trained apart or None.
        split: The inputs that are explained.
        features: What can be masked.
        section: Masks, grid, baseline, resamples.
        seed: Of the masks; the teacher's second opinion and the others use the next one.

    Returns:
        The drift; its `n` counts the inputs whose ranks are defined for every network (all features were masked at
        least once, and their effects differ).

    Limits: ranks of features with nearly no effect are noise, on both sides alike; that is what the floor shows.
    """
    names = feature_names(features, tuple(features.mean.shape), section.grid)
    if len(names) < FEWEST or not len(split):
        reason = f"{len(names)} features and {len(split)} inputs; ranks need {FEWEST} features and 1 input"
        return Skip(what="attribution drift", reason=reason)
    teacher, student, apart = networks
    asked = [(teacher, seed), (teacher, seed + 1), (student, seed + 1)]
    asked += [(apart, seed + 1)] if apart is not None else []
    told = [
        _all_effects(model, split, features, section, each)
        for model, each in progress(asked, label="attributions", unit="network")
    ]
    agreements = np.array([[_spearman(told[0][row], other[row]) for other in told[1:]] for row in range(len(split))])
    agreements = agreements[np.isfinite(agreements).all(1)]
    if not len(agreements):
        reason = (
            "in no input was every feature masked and did effects differ, so ranks are undefined: raise audit.masks"
        )
        return Skip(what="attribution drift", reason=reason)
    floor, ours = agreements[:, 0], agreements[:, 1]
    return AttributionDrift(
        features=len(names),
        masks=section.masks,
        baseline=section.baseline,
        student=mean_interval(ours, section.resamples, seed),
        floor=mean_interval(floor, section.resamples, seed),
        beyond_floor=mean_interval(floor - ours, section.resamples, seed),
        apart=None if apart is None else mean_interval(agreements[:, 2], section.resamples, seed),
        per_input=tuple(ours.tolist()),
    )


def _all_effects(model: nn.Module, split: Split, features: Features, section: AuditSection, seed: int) -> Numbers:
    generator = torch.Generator().manual_seed(seed)
    batches = (x for x, _ in split.batches(section.batch_size))
    found: Numbers = torch.cat([feature_effects(model, x, features, section, generator) for x in batches]).numpy()
    return found


def _spearman(a: Numbers, b: Numbers) -> float:
    """Rank correlation; NaN where a side is constant or not measured."""
    from scipy.stats import spearmanr

    if not np.isfinite([a, b]).all() or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def map_drift(
    teacher: Network, student: Student, split: Split, features: Features, section: AuditSection, *, seed: int
) -> tuple[MapDrift | None, list[Skip]]:
    """The causal effect at each node that both networks have, before and after compression.

    Args:
        teacher: Traced.
        student: Its parts end at cut points of the teacher.
        split: Inputs that are intervened on.
        features: What can be masked.
        section: Masks are two for each input, as in the analysis; grid and baseline count.
        seed: Of the masks; the teacher's second opinion and the student use the next one.

    Returns:
        The drift, and the nodes that can't be compared, with reasons.

    Limits: an effect at a node depends on the number of its units, so nodes that lost channels are left out.
    """
    if not len(split):
        return None, [Skip(what="causal-map drift", reason="no inputs to measure effects on")]
    compressed = as_network(teacher, student)
    asked: list[tuple[Network, int]] = [(teacher, seed), (teacher, seed + 1), (compressed, seed + 1)]
    first, again, after = (
        node_effects(network, split, features, section, each)
        for network, each in progress(asked, label="causal effects at nodes", unit="network")
    )
    matching, skips = _matching(teacher, compressed, student.ends)
    ends, own = [end for _, end in matching], [part for part, _ in matching]
    first, again, after = first[:, ends], again[:, ends], after[:, own]
    rows = tuple(
        NodeDrift(
            node=teacher.regions[end].info.name,
            teacher=float(first[:, at].mean()),
            again=float(again[:, at].mean()),
            student=float(after[:, at].mean()),
            change=mean_interval(after[:, at] - again[:, at], section.resamples, seed),
        )
        for at, end in enumerate(ends)
    )
    ours, floor = _agreement(first, after), _agreement(first, again)
    return MapDrift(nodes=rows, inputs=len(first), student=ours, floor=floor), skips


def node_effects(
    network: Network, split: Split, features: Features, section: AuditSection, seed: int
) -> Float[Numbers, "samples sites"]:
    """The effect of masked features on each site of each input, mean over two masks.

    Args:
        network: Traced, in evaluation mode.
        split: The inputs.
        features: What can be masked.
        section: Grid, baseline, batch size.
        seed: Of the masks; the same seed gives any network the same ones.

    Returns:
        |delta| * KL of the site's units [nats].
    """
    interventions = InterveneSection(baselines=[section.baseline], grid=section.grid)
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    with torch.inference_mode():
        for x, _ in split.batches(section.batch_size):
            plain = _site_units(network, x)
            versions = [
                torch.stack([effect_terms(*pair)[0] for pair in zip(plain, _site_units(network, changed), strict=True)])
                for changed, _, _ in intervene_batch(x, features, interventions, generator)
            ]
            batches.append(torch.stack(versions).mean(0).T)
    found: Numbers = torch.cat(batches).double().numpy()
    return found


def _site_units(network: Network, x: Tensor) -> list[Tensor]:
    found = []
    for region in network.regions:
        x = region.module(x)
        found.append(units(x))
    return found


def as_network(teacher: Network, student: Student) -> Network:
    """The student as a network whose regions are its parts, each named after the teacher's region that it ends with.

    Args:
        teacher: What the student was made from.
        student: After surgery.
    """
    regions: list[Region] = []
    x = teacher.example_input
    with torch.no_grad():
        for part, end in zip(student.parts, student.ends, strict=True):
            x = part(x)
            info = replace(teacher.regions[end].info, output_shape=tuple(x.shape[1:]))
            regions.append(Region(info, part))
    return Network(student.graph, tuple(regions), student.sites, (), teacher.example_input)


def _matching(teacher: Network, student: Network, ends: tuple[int, ...]) -> tuple[list[tuple[int, int]], list[Skip]]:
    """Pairs of (student's part, teacher's region) that end alike, and what has no counterpart."""
    pairs: list[tuple[int, int]] = []
    skips: list[Skip] = []
    for own, end in enumerate(ends):
        before, after = teacher.regions[end].info, student.regions[own].info
        if before.output_shape == after.output_shape:
            pairs.append((own, end))
        else:
            reason = f"the student has {after.output_shape} there, the teacher {before.output_shape}"
            skips.append(Skip(what=f"causal effect at {before.name}", reason=reason))
    for region in teacher.regions:
        if region.info.index not in ends:
            reason = "it lies inside a merged node, so the student has no such cut point"
            skips.append(Skip(what=f"causal effect at {region.info.name}", reason=reason))
    return pairs, skips


def _agreement(one: Numbers, other: Numbers) -> float | None:
    """Rank correlation of two networks' mean effects at the same nodes."""
    if one.shape[1] < FEWEST:
        return None
    found = _spearman(one.mean(0), other.mean(0))
    return found if np.isfinite(found) else None
