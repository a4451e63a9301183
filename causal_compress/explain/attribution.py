"""Causal effects of input features by interventions: which parts of an input speak for an answer, and how surely.

Every input is run under random masks of many features at once; an additive surrogate, fitted to what the masks did,
gives each feature its effect. For images the masks are patchworks of several scales at random shifts, and neighbouring
patches share strength (a Laplacian penalty), because what a network looks at is seldom one patch. Chosen by measurement
(benchmarks/attribution.py): insertion minus deletion, ResNet-20, CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causal_compress.explain.engine import Engine, Responses, Scene, respond
from causal_compress.understand.effect import effect_terms
from causal_compress.understand.intervene import Baseline

Estimator = Literal["surrogate", "difference", "occlusion"]

_RIDGE, _SMOOTH = 0.04, 0.25  # relative to the number of masks; a feature's variance over masks is about 0.2
_TABLE_RIDGE = 1e-4  # columns are not neighbours of one another, and linear models shall be found exactly
_SCALES = (2, 3)  # sides of the cells of masks, in patches, on a grid of 8


@dataclass(frozen=True)
class Draws:
    """Resamples for intervals, as many permutations for nulls, and the seed of both.

    Attributes:
        count: How many.
        seed: Of them, and of the masks.
        together: So many masks in a row are drawn together: those of one input, where several inputs are pooled.
    """

    count: int = 0
    seed: int = 0
    together: int = 1


NO_DRAWS = Draws()


@dataclass(frozen=True)
class Targets:
    """What effects are estimated on: classes at the output (None: all), and sites."""

    classes: Sequence[int] | None = None
    sites: Sequence[int] = ()


ALL_CLASSES = Targets()


@dataclass(frozen=True)
class Scores:
    """Effects of features on some targets, each in the unit of its target; intervals and nulls of 95 %.

    Attributes:
        values: The estimates.
        low: Lower ends of the intervals over masks.
        high: Upper ends.
        null_low: 2.5th percentile of the effects when responses are dealt to masks at random, all features together.
        null_high: 97.5th percentile.
    """

    values: Float[Tensor, "samples targets features"]
    low: Float[Tensor, "samples targets features"]
    high: Float[Tensor, "samples targets features"]
    null_low: Float[Tensor, "samples targets"]
    null_high: Float[Tensor, "samples targets"]


def log_odds(logits: Float[Tensor, "*rows classes"]) -> Float[Tensor, "*rows classes"]:
    """Of every class against all others together [nats]: what a probability near 0 or 1 hides."""
    wide = logits.double()
    most = wide.log_softmax(-1)
    odds = most - torch.log(-torch.expm1(most.clamp_max(-1e-12)))
    # the likeliest class has no digits left in its probability, but has them in its logit
    top = wide.argmax(-1, keepdim=True)
    others = wide.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    return odds.scatter(-1, top, wide.gather(-1, top) - others)


def draw_patchworks(
    samples: int, count: int, layout: Int[Tensor, "*positions"], generator: torch.Generator
) -> Bool[Tensor, "samples count features"]:
    """Masks for attribution: of every share between none and all, and for images in cells of several sizes.

    Args:
        samples: Inputs.
        count: Masks of each input.
        layout: From `feature_layout`; two dimensions: patches of an image, one: columns of a table.
        generator: On the CPU.
    """
    features = int(layout.max()) + 1
    share = torch.rand(samples, count, 1, generator=generator)
    if layout.ndim == 1:
        return torch.rand(samples, count, features, generator=generator) < share
    right = int(layout[0].max()) + 1
    down = features // right
    masks = torch.empty(samples, count, features, dtype=torch.bool)
    sides = sorted({max(1, round(scale * min(down, right) / 8)) for scale in _SCALES})
    for place, side in enumerate(sides):
        chosen = range(place, count, len(sides))
        levels = _cells(samples * len(chosen), (down, right), side, generator)
        masks[:, chosen] = levels.view(samples, len(chosen), features) < share[:, chosen]
    return masks


def draw_halves(
    samples: int, count: int, layout: Int[Tensor, "*positions"], generator: torch.Generator
) -> Bool[Tensor, "samples count features"]:
    """Masks for `conditional_differences`: each feature is masked in half of them, whatever the others are.

    Args:
        samples: Inputs.
        count: Masks of each input.
        layout: From `feature_layout`.
        generator: On the CPU.
    """
    return torch.rand(samples, count, int(layout.max()) + 1, generator=generator) < 0.5


def _cells(count: int, shape: tuple[int, int], side: int, generator: torch.Generator) -> Tensor:
    """A number for each patch, the same within cells of side x side patches whose grid is shifted at random."""
    down, right = (extent // side + 2 for extent in shape)
    numbers = torch.rand(count, down, right, generator=generator)
    up, left = torch.randint(0, side, (2, count, 1), generator=generator)
    rows, columns = (torch.arange(shape[0]) + up) // side, (torch.arange(shape[1]) + left) // side
    return numbers[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1)


def neighbour_penalty(layout: Int[Tensor, "*positions"]) -> Float[Tensor, "features features"]:
    """Graph Laplacian of the patches: the sum of squared differences of neighbours; zero for tables."""
    features = int(layout.max()) + 1
    penalty = torch.zeros(features, features, dtype=torch.float64)
    if layout.ndim == 1:
        return penalty
    grid = torch.arange(features).view(-1, int(layout[0].max()) + 1)
    for one, other in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        for i, j in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True):
            penalty[i, i] += 1
            penalty[j, j] += 1
            penalty[i, j] -= 1
            penalty[j, i] -= 1
    return penalty


def fit_surrogate(
    masks: Bool[Tensor, "masks features"],
    responses: Float[Tensor, "masks targets"],
    groups: Int[Tensor, " masks"],
    penalty: Float[Tensor, "features features"],
    weights: Float[Tensor, "draws masks"],
) -> Float[Tensor, "draws targets features"]:
    """Penalised weighted least squares of the responses on the features that are *present*, one intercept per group.

    Args:
        masks: True where masked.
        responses: What each mask gave.
        groups: Number of each mask's baseline: answers under different baselines differ by more than the features do.
        penalty: Quadratic form added to the normal equations.
        weights: One fit for each row; a bootstrap draw is how often each mask is drawn.

    Source: the regression of KernelSHAP (Lundberg & Lee 2017, arXiv:1705.07874) with masks of uniformly drawn sizes,
        under which all sizes weigh the same.
    """
    present, answers = (~masks).double(), responses.double()
    normal = weights.new_zeros(len(weights), masks.shape[1], masks.shape[1])
    right = weights.new_zeros(len(weights), masks.shape[1], responses.shape[1])
    for number in groups.unique():
        at = groups == number
        z, y, w = present[at], answers[at], weights[:, at]
        total = w.sum(1, keepdim=True).clamp_min(1e-12)[..., None]
        zw = z[None] * w[..., None]
        z_mean, y_mean = zw.sum(1, keepdim=True), (w[..., None] * y[None]).sum(1, keepdim=True)
        normal += zw.mT @ z - z_mean.mT @ z_mean / total
        right += zw.mT @ y - z_mean.mT @ y_mean / total
    effects: Tensor = torch.linalg.solve(normal + penalty, right).mT
    return effects


def conditional_differences(
    masks: Bool[Tensor, "masks features"],
    responses: Float[Tensor, "masks targets"],
    groups: Int[Tensor, " masks"],
    weights: Float[Tensor, "draws masks"],
) -> Float[Tensor, "draws targets features"]:
    """Mean response of the masks that leave a feature, minus that of those that mask it, baselines centred.

    Limits: only for masks that are independent from feature to feature (`draw_halves`): under those of a random share
        or in cells, features are masked together, and each is given part of the others' effects.
    """
    answers = responses.double().clone()
    for number in groups.unique():
        answers[groups == number] -= answers[groups == number].mean(0)
    with_it, without = (~masks).double(), masks.double()
    present, absent = weights @ with_it, weights @ without
    weighted = weights[:, :, None] * answers[None]
    means = (
        (weighted.mT @ with_it) / present.clamp_min(1e-12)[:, None],
        (weighted.mT @ without) / absent.clamp_min(1e-12)[:, None],
    )
    return means[0] - means[1]


def estimate(
    masks: Bool[Tensor, "samples masks features"],
    responses: Float[Tensor, "samples masks targets"],
    groups: Int[Tensor, " masks"],
    layout: Int[Tensor, "*positions"],
    estimator: Literal["surrogate", "difference"] = "surrogate",
    draws: Draws = NO_DRAWS,
) -> Scores:
    """Effects from what masks did, with bootstrap intervals over masks and a permutation null.

    Args:
        masks: True where masked.
        responses: What each mask gave, for each target.
        groups: Number of each mask's baseline.
        layout: Of the features; says which patches are neighbours.
        estimator: surrogate: `fit_surrogate`; difference: `conditional_differences`.
        draws: Resamples of the masks, and permutations; without, low = high = value and the null is 0.

    Limits: intervals speak of the masks drawn, not of the surrogate's own error: where features act only together, no
        additive effect is right. Penalties draw effects of images towards 0 and towards their neighbours'.
    """
    count = masks.shape[1]
    penalty = _penalty(layout, count)
    generator = torch.Generator().manual_seed(draws.seed)
    fitted = []
    for mask, response in zip(masks, responses, strict=True):

        def fit(answers: Tensor, weights: Tensor, mask: Tensor = mask) -> Tensor:
            match estimator:
                case "surrogate":
                    return fit_surrogate(mask, answers, groups, penalty, weights)
                case "difference":
                    return conditional_differences(mask, answers, groups, weights)

        plain = torch.ones(1, count, dtype=torch.float64)
        value = fit(response, plain)[0]
        if not draws.count:
            fitted.append((value, value, value, torch.zeros(len(value)), torch.zeros(len(value))))
            continue
        drawn = _resamples(groups, draws, generator)
        ends = torch.quantile(fit(response, drawn), torch.tensor([0.025, 0.975]).double(), dim=0)
        dealt = torch.cat([response[_permuted(groups, generator)] for _ in range(draws.count)], 1)
        null = fit(dealt, plain)[0].view(draws.count, *value.shape).transpose(0, 1).flatten(1)
        null_ends = torch.quantile(null, torch.tensor([0.025, 0.975]).double(), dim=1)
        fitted.append((value, *ends, *null_ends))
    value, low, high, null_low, null_high = (torch.stack(parts).float() for parts in zip(*fitted, strict=True))
    return Scores(value, low.minimum(value), high.maximum(value), null_low, null_high)


def _penalty(layout: Tensor, masks: int) -> Tensor:
    features = int(layout.max()) + 1
    ridge = _TABLE_RIDGE if layout.ndim == 1 else _RIDGE
    return masks * (ridge * torch.eye(features, dtype=torch.float64) + _SMOOTH * neighbour_penalty(layout))


def _resamples(groups: Tensor, how: Draws, generator: torch.Generator) -> Tensor:
    """How often each mask is drawn: within the masks of its baseline, or with all masks of its input."""
    draws = how.count
    weights = torch.zeros(draws, len(groups), dtype=torch.float64)
    if how.together > 1:
        inputs = len(groups) // how.together
        chosen = torch.randint(inputs, (draws, inputs), generator=generator)
        counts = weights[:, :inputs].scatter_add(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
        return counts.repeat_interleave(how.together, 1)
    for number in groups.unique():
        at = torch.nonzero(groups == number)[:, 0]
        chosen = at[torch.randint(len(at), (draws, len(at)), generator=generator)]
        weights.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
    return weights


def _permuted(groups: Tensor, generator: torch.Generator) -> Tensor:
    """A permutation of the masks within each baseline."""
    order = torch.arange(len(groups))
    for number in groups.unique():
        at = torch.nonzero(groups == number)[:, 0]
        order[at] = at[torch.randperm(len(at), generator=generator)]
    return order


@dataclass(frozen=True)
class Attributed:
    """Attributions of some inputs: at the output for the classes, and at the sites, that were asked for."""

    output: Scores
    sites: Scores | None
    logits: Float[Tensor, "samples classes"]
    masks: int


def attribute(
    engine: Engine,
    scene: Scene,
    *,
    masks: int = 512,
    estimator: Estimator = "surrogate",
    targets: Targets = ALL_CLASSES,
    draws: Draws = NO_DRAWS,
) -> Attributed:
    """Causal effects of the features of each input on the log-odds of classes, and on the ACE at sites.

    Args:
        engine: The network.
        scene: Inputs, features, and baselines that share the masks evenly.
        masks: Forward passes per input; occlusion takes one per feature and baseline instead.
        estimator: surrogate; difference, from masks of independent features; or occlusion (one feature at a time: blind
            to what features do together).
        targets: Classes, in the order of the scores; and sites at which effects are estimated too: there the response
            of a mask is its ACE term, so an effect says how much of the disturbance goes away when the feature stays.
        draws: For intervals and nulls; its seed draws the masks too. Occlusion has no randomness, so neither (NaN).

    Limits: an effect is relative to the baselines; a feature that looks like its baseline has none.
    """
    generator = torch.Generator().manual_seed(draws.seed)
    names = list(scene.baselines)
    sites = targets.sites
    wanted: slice | list[int] = slice(None) if targets.classes is None else list(targets.classes)
    if estimator == "occlusion":
        drawn, chosen = _single_masks(scene, names)
        scene = replace(scene, turns=None)  # features are compared with one another, so under the same donor
    else:
        draw = draw_halves if estimator == "difference" else draw_patchworks
        drawn = draw(len(scene.x), masks, scene.layout, generator)
        chosen = [names[number * len(names) // masks] for number in range(masks)]
    plain = engine.watch(scene.x)
    seen = respond(engine, scene, drawn, chosen, sites=sites)
    groups = torch.tensor([names.index(name) for name in chosen])
    answers = log_odds(seen.logits)[..., wanted]
    disturbed = _disturbances([plain[site].cpu() for site in sites], seen) if sites else None
    logits = plain[-1].cpu()
    if estimator == "occlusion":
        before = log_odds(logits)[:, None, wanted]
        after = _occluded(answers - before, groups)
        at_sites = _occluded(disturbed, groups) if disturbed is not None else None
        return Attributed(after, at_sites, logits, drawn.shape[1])

    def estimated(responses: Tensor) -> Scores:
        return estimate(drawn, responses, groups, scene.layout, estimator, draws)

    return Attributed(
        estimated(answers), estimated(-disturbed) if disturbed is not None else None, logits, drawn.shape[1]
    )


def _single_masks(scene: Scene, names: Sequence[Baseline]) -> tuple[Tensor, list[Baseline]]:
    single = torch.eye(len(scene.names), dtype=torch.bool).repeat(len(names), 1)
    return single.expand(len(scene.x), -1, -1), [name for name in names for _ in scene.names]


def _occluded(change: Tensor, groups: Tensor) -> Scores:
    """Mean over baselines of what masking each feature alone takes away."""
    baselines = int(groups.max()) + 1
    value = -change.view(len(change), baselines, -1, change.shape[-1]).mean(1).mT.float()
    unknown, nowhere = torch.full_like(value, torch.nan), torch.full(value.shape[:2], torch.nan)
    return Scores(value, unknown, unknown, nowhere, nowhere)


def _disturbances(plain: Sequence[Tensor], seen: Responses) -> Tensor:
    """ACE term of every mask at every site: (samples, masks, sites)."""
    columns = []
    for before, after in zip(plain, seen.sites, strict=True):
        count = after.shape[1]
        spread = before[:, None].expand(-1, count, -1).reshape(-1, before.shape[-1])
        columns.append(effect_terms(spread, after.reshape(-1, after.shape[-1]))[0].view(-1, count))
    return torch.stack(columns, -1)
