"""do(X = x'): mask input features, watch every site respond, and keep sums instead of activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causal_compress.errors import DataError
from causal_compress.inputs.data import Features, Split
from causal_compress.recipe import InterveneSection
from causal_compress.results import Effects, NodeEffect, Skip
from causal_compress.understand.effect import FeatureSums, Moments, effect_terms
from causal_compress.understand.observe import LEAST_ROWS, Clock, network_device, observe_sites
from causal_compress.understand.similarity import HsicSums
from causal_compress.understand.trace import Network

Baseline = Literal["zero", "mean", "blur", "marginal"]


def feature_layout(features: Features, shape: Sequence[int], grid: int) -> Int[Tensor, "*positions"]:
    """The number of the feature that each position of an input belongs to.

    Args:
        features: What can be masked.
        shape: Of one input: (channels, height, width) or (columns,).
        grid: Patches per side; at most one for each pixel. Where a side is not divisible, patches differ by one pixel.

    Returns:
        (height, width) for images: patches are numbered row by row. (columns,) for tables.
    """
    if features.kind == "image":
        height, width = shape[-2:]
        down = torch.arange(height) * min(grid, height) // height
        right = torch.arange(width) * min(grid, width) // width
        return down[:, None] * min(grid, width) + right[None, :]
    layout = torch.full(tuple(shape), -1)
    for number, positions in enumerate(features.columns):
        layout[list(positions)] = number
    assert int(layout.min()) >= 0, "an encoded position belongs to no column"
    return layout


def feature_names(features: Features, shape: Sequence[int], grid: int) -> tuple[str, ...]:
    """The features' names in the order of their numbers: column names, or "row R, column C" of a patch, from 1."""
    if features.kind == "table":
        return features.names
    down, right = min(grid, shape[-2]), min(grid, shape[-1])
    return tuple(f"row {r + 1}, column {c + 1}" for r in range(down) for c in range(right))


def draw_masks(
    samples: int, features: int, fraction: float, generator: torch.Generator
) -> Bool[Tensor, "samples features"]:
    """Draw for each input which features are masked: round(fraction * features) of them, at least one.

    Args:
        samples: Number of inputs.
        features: Number of features.
        fraction: Share of features masked.
        generator: On the CPU.
    """
    count = min(features, max(1, round(fraction * features)))
    chosen = torch.rand(samples, features, generator=generator).argsort(1)[:, :count]
    return torch.zeros(samples, features, dtype=torch.bool).scatter_(1, chosen, value=True)


def baseline_values(
    x: Float[Tensor, "samples ..."], baseline: Baseline, features: Features, generator: torch.Generator
) -> Float[Tensor, "samples ..."]:
    """What the features of each input become when they are masked.

    Args:
        x: Normalised inputs.
        baseline: zero: black, or raw zero; mean: of the calibration inputs; blur: the image under a Gaussian of an
            eighth of its longer side (tables: mean); marginal: another input of the same batch.
        features: Holds zero and mean.
        generator: Draws the other inputs; on the CPU.

    Limits: "marginal" breaks the dependence between masked and other features, so x' may be unlike any real input.
    """
    match baseline:
        case "zero":
            return features.zero.to(x).expand_as(x)
        case "blur" if features.kind == "image":
            return _blur(x)
        case "mean" | "blur":
            return features.mean.to(x).expand_as(x)
        case "marginal":
            return x[_others(len(x), generator).to(x.device)]


def _others(samples: int, generator: torch.Generator) -> Tensor:
    # one random cycle through all inputs: a permutation in which no input meets itself
    order = torch.randperm(samples, generator=generator)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def _blur(x: Tensor) -> Tensor:
    sigma = max(x.shape[-2:]) / 8
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    padded = F.pad(x, (radius, radius, radius, radius), mode="replicate")
    rows = F.conv2d(padded, kernel[:, :, None, :], groups=x.shape[1])
    return F.conv2d(rows, kernel[:, :, :, None], groups=x.shape[1])


def apply(
    x: Float[Tensor, "samples ..."], mask: Bool[Tensor, "samples ..."], baseline: Float[Tensor, "samples ..."]
) -> Float[Tensor, "samples ..."]:
    """Mask inputs: x' = (1 - M) * x + M * b, without changing x.

    Args:
        x: Inputs.
        mask: True where masked; broadcastable to x.
        baseline: What masked positions become; broadcastable to x.
    """
    return torch.where(mask, baseline, x)


def _mask_positions(mask: Tensor, layout: Tensor, x: Tensor) -> Tensor:
    positions = mask[:, layout].to(x.device)
    return positions[:, None] if x.ndim == 4 else positions


def intervene_batch(
    x: Float[Tensor, "samples ..."], features: Features, section: InterveneSection, generator: torch.Generator
) -> Iterator[tuple[Float[Tensor, "samples ..."], Bool[Tensor, "samples features"], str]]:
    """All interventions on a batch, one after the other: for each baseline `section.masks` masks of each input.

    Args:
        x: Normalised inputs.
        features: What can be masked.
        section: Baselines, number of masks, grid and fraction.
        generator: On the CPU; the same state gives the same interventions.

    Returns:
        One after the other: x', the features masked, and the name of the baseline.
    """
    layout = feature_layout(features, x.shape[1:], section.grid)
    for baseline in section.baselines:
        for _ in range(section.masks):
            mask = draw_masks(len(x), int(layout.max()) + 1, section.fraction, generator)
            values = baseline_values(x, baseline, features, generator)
            yield apply(x, _mask_positions(mask, layout, x), values), mask, baseline


def intervened(
    x: Float[Tensor, "samples ..."],
    features: Features,
    *,
    grid: int,
    fraction: float,
    baselines: Sequence[Baseline],
    generator: torch.Generator,
) -> Float[Tensor, "samples ..."]:
    """One intervened version of each input, its mask and its baseline drawn at random.

    Args:
        x: Normalised inputs; left unchanged.
        features: What can be masked.
        grid: Images: patches per side.
        fraction: Share of features masked.
        baselines: One of them is drawn for each input.
        generator: On the CPU; the same state gives the same interventions.
    """
    layout = feature_layout(features, x.shape[1:], grid)
    mask = draw_masks(len(x), int(layout.max()) + 1, fraction, generator)
    drawn = torch.randint(len(baselines), (len(x),), generator=generator).to(x.device)
    values = x
    for number, baseline in enumerate(baselines):
        chosen = (drawn == number).view(-1, *[1] * (x.ndim - 1))
        values = torch.where(chosen, baseline_values(x, baseline, features, generator), values)
    return apply(x, _mask_positions(mask, layout, x), values)


@dataclass
class _Sums:
    """All that is kept of the activations that went by; its size does not depend on the number of inputs."""

    hsic: HsicSums
    ace: Moments
    kl: Moments
    feature_ace: FeatureSums
    interventions: int = 0

    @classmethod
    def zeros(cls, sites: int, features: int, device: torch.device) -> _Sums:
        return cls(
            HsicSums.zeros(sites, device),
            Moments.zeros(sites, device),
            Moments.zeros(sites, device),
            FeatureSums.zeros(features, device),
        )

    @property
    def inputs(self) -> int:
        return self.ace.count


def intervene(network: Network, split: Split, features: Features, section: InterveneSection, *, seed: int) -> Effects:
    """Mask input features and observe every site: average causal effects, and debiased CKA of all pairs of sites.

    Args:
        network: Traced teacher, in evaluation mode; left unchanged.
        split: Calibration inputs. A last batch of fewer than 8 is left out.
        features: What can be masked.
        section: Inputs, batch size, masks and baselines.
        seed: Of masks, of marginal baselines and of the null's permutations.

    Returns:
        Effects with standard errors over inputs. Seconds are wall time: forward passes, and what was made of them.

    Raises:
        DataError: fewer than 8 calibration inputs.
        NumericalError: NaN or infinity at a site, which is named.

    Limits: a feature's ACE is the mean over masks that contain it, and with more than one feature to a mask it holds a
        share of the others' effects: compare features with each other, not with zero.
    """
    device = network_device(network)
    generator = torch.Generator().manual_seed(seed)
    names = feature_names(features, tuple(network.example_input.shape[1:]), section.grid)
    sums, clock = _Sums.zeros(len(network.regions), len(names), device), Clock(device)
    with torch.inference_mode():
        for x, _ in split.batches(section.batch_size, limit=section.inputs):
            if len(x) >= LEAST_ROWS:
                _add_batch(sums, network, _versions(x.to(device), features, section, generator), clock, generator)
    if not sums.inputs:
        raise DataError(
            "too few calibration inputs to compare sites",
            found=f"{len(split)} inputs",
            wanted=f"at least {LEAST_ROWS}; 2,000 or more to be useful",
            remedy="raise data.calibration and intervene.inputs",
        )
    return _effects(network, names, section, sums, clock)


def _versions(
    x: Tensor, features: Features, section: InterveneSection, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor | None]]:
    yield x, None
    for changed, mask, _ in intervene_batch(x, features, section, generator):
        yield changed, mask


def _add_batch(
    sums: _Sums,
    network: Network,
    versions: Iterator[tuple[Tensor, Tensor | None]],
    clock: Clock,
    generator: torch.Generator,
) -> None:
    """Run the plain batch and its interventions, one after the other, and add what they show."""
    grams, plain, masks, terms = [], [], [], []
    for x, mask in versions:
        version_grams, version_units = observe_sites(network, x, clock)
        with clock.measure("analysis"):
            grams.append(version_grams)
            if mask is None:
                plain = version_units
                continue
            pairs = [effect_terms(*pair) for pair in zip(plain, version_units, strict=True)]
            terms.append(torch.stack([torch.stack(pair) for pair in pairs], dim=1))
            masks.append(mask.to(x.device))
    with clock.measure("analysis"):
        effects = torch.stack(terms)  # (versions, ace and kl, sites, samples)
        ace, kl = effects.mean(0)  # over an input's interventions, so that standard errors are over inputs
        sums.ace.add(ace)
        sums.kl.add(kl)
        sums.feature_ace.add(torch.stack(masks), effects[:, 0, -1])
        sums.hsic.add(grams, generator)
        sums.interventions += effects.shape[0] * effects.shape[-1]


def _effects(network: Network, names: tuple[str, ...], section: InterveneSection, sums: _Sums, clock: Clock) -> Effects:
    sites = [region.info.name for region in network.regions]
    columns = (sites, sums.ace.mean(), sums.ace.stderr(), sums.kl.mean(), sums.kl.stderr())
    return Effects(
        chain=network.chain(),
        nodes=tuple(
            NodeEffect(site=site, ace=ace, ace_stderr=ace_stderr, kl=kl, kl_stderr=kl_stderr)
            for site, ace, ace_stderr, kl, kl_stderr in zip(*columns, strict=True)
        ),
        features=names,
        feature_ace=tuple(sums.feature_ace.mean()),
        feature_ace_stderr=tuple(sums.feature_ace.stderr()),
        baselines=tuple(section.baselines),
        inputs=sums.inputs,
        interventions=sums.interventions,
        forwards=sums.inputs + sums.interventions,
        forward_seconds=clock.seconds["forward"],
        analysis_seconds=clock.seconds["analysis"],
        cka=_nested(sums.hsic.cka()),
        cka_null=_nested(sums.hsic.null_cka()),
        hsic_bins=tuple(_nested(matrix) for matrix in sums.hsic.used_bins()),
        skipped=_constant_sites(sites, sums.hsic),
    )


def _nested(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())


def _constant_sites(sites: list[str], hsic: HsicSums) -> tuple[Skip, ...]:
    dead = (hsic.products.diagonal() == 0).tolist()
    reason = "its activation is the same for every input, so its similarity to others is undefined and counts as 0"
    return tuple(Skip(what=site, reason=reason) for site, is_dead in zip(sites, dead, strict=True) if is_dead)
