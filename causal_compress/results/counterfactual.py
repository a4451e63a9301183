"""Counterfactuals: single decisions turned, how the network that turns them was trained, where two inputs part."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from causal_compress.results.common import config

CounterfactualStatus = Literal["valid", "invalid", "not converged"]


@dataclass(frozen=True, kw_only=True, config=config)
class FeatureChange:
    """One feature that a counterfactual changes; values as a person reads them (patches: mean grey level)."""

    feature: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True, config=config)
class Counterfactual:
    """One counterfactual.

    `status` is recomputed on the final input: valid means that the network gives it the target class. `probability` is
    the target's. `l1` and `l2` are in normalised space over all positions, `l0` counts changed positions (tables:
    columns) of `positions`. `violations` counts broken constraints; `changes` lists the largest changes first.
    """

    index: int
    true_class: str
    predicted_class: str
    target_class: str
    answered_class: str
    status: CounterfactualStatus
    probability: float
    l1: float
    l2: float
    l0: int
    positions: int
    violations: int
    changes: tuple[FeatureChange, ...]


@dataclass(frozen=True, kw_only=True, config=config)
class TrainingCheck:
    """One look at the GAN while it trains, on validation inputs: what it is watched for.

    `diversity` is the mean distance of counterfactuals of the same target, divided by that of real inputs of the class.
    `critic_accuracy_pct` is how often the critic tells real from made (50: can't tell, 100: saturated).
    """

    step: int
    validity_pct: float
    diversity: float
    critic_accuracy_pct: float
    critic_loss: float
    generator_loss: float
    proximity: float
    n: int


@dataclass(frozen=True, kw_only=True, config=config)
class CounterfactualTraining:
    """How the counterfactual GAN was trained, and what was noticed; `warnings` name collapse and divergence."""

    steps: int
    seconds: float
    seed: int
    generator_params: int
    critic_params: int
    perceptual_site: str
    network_sha256: str
    data_sha256: str
    checks: tuple[TrainingCheck, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, config=config)
class SitePart:
    """One site for an input and its counterfactual.

    `distance` is the share of the way from the mean of the input's class to that of the target that the counterfactual
    goes at this site (1: all of it); `floor` is the 95th percentile of the same between real inputs of one class. The
    effects are local ACE [nats] with the standard error over masks.
    """

    site: str
    distance: float
    floor: float
    ace_original: float
    ace_original_stderr: float
    ace_counterfactual: float
    ace_counterfactual_stderr: float


@dataclass(frozen=True, kw_only=True, config=config)
class Contrast:
    """An input beside its counterfactual: at which site they part.

    `parts_at` is the first site from which on the counterfactual lies farther towards its target than real inputs of
    one class differ; None: nowhere.
    """

    counterfactual: Counterfactual
    sites: tuple[SitePart, ...]
    parts_at: str | None
    floor_pairs: int
    masks: int


@dataclass(frozen=True, kw_only=True, config=config)
class FeatureShare:
    """One feature for one class pair.

    `changed_pct`: valid counterfactuals that change it; `alone_pct`: those in which its change alone gives the target;
    `needed_pct`: those that lose the target once it is put back.
    """

    feature: str
    changed_pct: float
    alone_pct: float
    needed_pct: float


@dataclass(frozen=True, kw_only=True, config=config)
class PairBias:
    """What counterfactuals from one class to another change; features that decide most stand first."""

    source_class: str
    target_class: str
    n: int
    features: tuple[FeatureShare, ...]


@dataclass(frozen=True, kw_only=True, config=config)
class BiasProbe:
    """Which features counterfactuals change, for each class pair, and warnings where one decides that should not."""

    pairs: tuple[PairBias, ...]
    warnings: tuple[str, ...]
    n: int
    invalid: int
