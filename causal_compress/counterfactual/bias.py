"""Bias probe: which features counterfactuals change, class pair by class pair, and which of them decide alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from causal_compress.counterfactual.explainer import Explainer, Found, find
from causal_compress.counterfactual.training import other_classes
from causal_compress.errors import UsageError
from causal_compress.inputs.data import Split
from causal_compress.results import BiasProbe, FeatureShare, PairBias
from causal_compress.understand.intervene import feature_layout, feature_names

_DECIDES_PCT = 50.0
_CONSTANT = 0.02
_LEAST = 5
_SHOWN = 8
_REAL = 2000
_BATCH = 256


@dataclass(frozen=True, eq=False)
class _Turns:
    """For each counterfactual and feature: changed it, gave the target alone, was needed for the target."""

    changed: Bool[Tensor, "samples features"]
    alone: Bool[Tensor, "samples features"]
    needed: Bool[Tensor, "samples features"]


def probe_bias(explainer: Explainer, split: Split, *, inputs: int, seed: int = 0) -> BiasProbe:
    """Make counterfactuals for real inputs towards random other classes, and look at what they change.

    Args:
        explainer: Trained.
        split: Real inputs; not the test split if anything is chosen by the result.
        inputs: At most so many of them, drawn at random.
        seed: Of inputs and targets.
    """
    x, _ = split.take(np.random.default_rng(seed).permutation(len(split))[:inputs])
    with torch.no_grad():
        predicted = torch.cat([explainer.judge(batch)[1].argmax(1) for batch in x.split(_BATCH)])
    target = other_classes(predicted, len(explainer.classes), torch.Generator().manual_seed(seed))
    return bias_of(explainer, find(explainer, x, target), split, seed=seed)


def bias_of(explainer: Explainer, found: Found, split: Split, *, seed: int = 0) -> BiasProbe:
    """What given counterfactuals change and which changes decide, by intervention: each feature's change is carried out
    alone, and taken back alone.

    Args:
        explainer: Network, features, and the recipe's `watch`.
        found: Counterfactuals; those that are not valid are left out.
        split: Real inputs of each class, to see which features are constant there.
        seed: Which of them, where there are many.

    Returns:
        One entry for each class pair, and a warning where a watched feature, or one that is nearly constant within
        every class (a planted mark, a border), decides alone or is needed in at least half of a pair's counterfactuals.

    Raises:
        UsageError: a watched feature that is not there.
    """
    grid = explainer.section.grid
    names = feature_names(explainer.features, explainer.input_shape, grid)
    layout = feature_layout(explainer.features, explainer.input_shape, grid)
    _check_watched(explainer.section.watch, names)
    turns = _turns(explainer, found, layout, len(names))
    suspects = dict.fromkeys(explainer.section.watch, "named in counterfactual.watch")
    for number in _constant_within_classes(explainer, split, layout, len(names), seed):
        suspects.setdefault(names[number], "nearly constant within each class")
    pairs, warnings = [], []
    for source, goal in torch.stack([found.predicted, found.target], 1)[found.valid].unique(dim=0).tolist():
        here = found.valid & (found.predicted == source) & (found.target == goal)
        pair = _pair(turns, here, names, (explainer.classes[source], explainer.classes[goal]))
        pairs.append(pair)
        warnings += _warnings(turns, here, names, suspects, pair)
    return BiasProbe(
        pairs=tuple(pairs),
        warnings=tuple(warnings),
        n=int(found.valid.sum()),
        invalid=int((~found.valid).sum()),
    )


def _turns(explainer: Explainer, found: Found, layout: Tensor, features: int) -> _Turns:
    changed, alone, needed = (torch.zeros(len(found.x), features, dtype=torch.bool) for _ in range(3))
    for number in range(features):
        here = layout == number
        moved = (found.counterfactual != found.x) & here
        changed[:, number] = moved.flatten(1).any(1)
        rows = torch.nonzero(changed[:, number] & found.valid)[:, 0]
        if len(rows) == 0:
            continue
        x, made, target = found.x[rows], found.counterfactual[rows], found.target[rows]
        alone[rows, number] = _answers(explainer, torch.where(here, made, x)) == target
        needed[rows, number] = _answers(explainer, torch.where(here, x, made)) != target
    return _Turns(changed, alone, needed)


def _answers(explainer: Explainer, x: Float[Tensor, "samples ..."]) -> Tensor:
    with torch.no_grad():
        return torch.cat([explainer.judge(batch)[1].argmax(1) for batch in x.split(_BATCH)])


def _pair(turns: _Turns, here: Tensor, names: Sequence[str], classes: tuple[str, str]) -> PairBias:
    shares = [_share(turns, here, names, number) for number in range(len(names))]
    shares.sort(key=lambda share: (share.alone_pct + share.needed_pct, share.changed_pct), reverse=True)
    return PairBias(
        source_class=classes[0],
        target_class=classes[1],
        n=int(here.sum()),
        features=tuple(share for share in shares[:_SHOWN] if share.changed_pct > 0),
    )


def _share(turns: _Turns, here: Tensor, names: Sequence[str], number: int) -> FeatureShare:
    changed, alone, needed = (
        100 * float(values[here, number].float().mean()) for values in (turns.changed, turns.alone, turns.needed)
    )
    return FeatureShare(feature=names[number], changed_pct=changed, alone_pct=alone, needed_pct=needed)


def _warnings(turns: _Turns, here: Tensor, names: Sequence[str], suspects: dict[str, str], pair: PairBias) -> list[str]:
    if pair.n < _LEAST:
        return []
    shares = [_share(turns, here, names, list(names).index(name)) for name in suspects]
    return [
        f"from {pair.source_class} to {pair.target_class}, '{share.feature}' ({suspects[share.feature]}) decides: "
        f"alone it gives the target in {share.alone_pct:.0f} %, without it the target is lost in "
        f"{share.needed_pct:.0f} % of {pair.n} counterfactuals"
        for share in shares
        if max(share.alone_pct, share.needed_pct) >= _DECIDES_PCT
    ]


def _constant_within_classes(explainer: Explainer, split: Split, layout: Tensor, features: int, seed: int) -> list[int]:
    """Features whose values, within every class, hardly vary."""
    x, label = split.take(np.random.default_rng(seed).permutation(len(split))[:_REAL])
    unit = x / explainer.domain.span()
    spreads = [unit[label == klass].std(0) for klass in label.unique() if int((label == klass).sum()) >= _LEAST]
    if not spreads:
        return []
    worst = torch.stack(spreads).amax(0)
    worst = worst.amax(0) if x.ndim == 4 else worst
    return [number for number in range(features) if float(worst[layout == number].mean()) < _CONSTANT]


def _check_watched(watch: Sequence[str], names: Sequence[str]) -> None:
    absent = [name for name in watch if name not in names]
    if absent:
        raise UsageError(
            f"counterfactual.watch: there is no feature '{absent[0]}'",
            wanted=f"one of {', '.join(names[:30])}",
            remedy="correct the name",
        )
