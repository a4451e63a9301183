"""What explaining finds: attributions, minimal sets, causal maps, and the harm of real ablations."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from causal_compress.results.common import Skip, config


@dataclass(frozen=True, kw_only=True, config=config)
class FeatureEffect:
    """Causal effect of one input feature with its 95 % interval; the unit is that of its attribution."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, config=config)
class Attribution:
    """What each feature does to a class's log-odds at the output [nats], or to a site [nats of ACE].
    Positive at the output: the feature speaks for the class. An effect between `null_low` and `null_high` can't be told
    from that of a feature that does nothing (95 % of effects when answers are dealt to masks at random). Intervals are
    over masks for one input, over inputs for several.
    """

    site: str
    target: str | None
    estimator: str
    features: tuple[FeatureEffect, ...]
    null_low: float
    null_high: float
    baselines: tuple[str, ...]
    inputs: int
    masks: int


@dataclass(frozen=True, kw_only=True, config=config)
class MinimalSet:
    """Features that suffice for a decision (all others at the baseline), or are necessary (they at the baseline change
    it). `verified`: asked of the network again, in float32, at the end; `minimal`: without any single one of them it no
    longer holds, asked as well. `forwards` counts what this set took. `found` False comes with a reason.
    """

    kind: Literal["sufficient", "necessary"]
    found: bool
    features: tuple[str, ...]
    positions: tuple[int, ...]
    of: int
    baseline: str
    decision: str
    decision_after: str | None
    verified: bool
    minimal: bool
    forwards: int
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, config=config)
class MapNode:
    """One causal node: its sites in order, and its average causal effect [nats] with 95 % interval over inputs.
    `null`: the same measured for interventions that change nothing, so what arithmetic alone makes of it.
    """

    index: int
    sites: tuple[str, ...]
    ace: float
    low: float
    high: float
    null: float


@dataclass(frozen=True, kw_only=True, config=config)
class MapEdge:
    """From node `source` to node `target` (-1: the input): the share of an intervention's effect on the target that
    vanishes when the source's own computation is held at its plain value, with 95 % interval over inputs.
    `kind` "around": what flows past the node between them, through skip connections: 1 - its share. A share below 0:
    the node between takes away from the effect instead of passing it on.
    """

    source: int
    target: int
    kind: Literal["through", "around"]
    share: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, config=config)
class CausalMap:
    """Causal nodes in graph order, what flows between them, and what each input feature does to the answer [nats].
    `scope`: "data", "class NAME" or "one input". Seconds are wall time of the forward passes.
    """

    scope: str
    estimator: str
    nodes: tuple[MapNode, ...]
    edges: tuple[MapEdge, ...]
    features: tuple[FeatureEffect, ...]
    features_null: float
    baselines: tuple[str, ...]
    inputs: int
    interventions: int
    forwards: int
    seconds: float
    skipped: tuple[Skip, ...] = ()


@dataclass(frozen=True, kw_only=True, config=config)
class NodeHarm:
    """What ablating one node really costs: KL of the answer from the untouched network's [nats], and accuracy [pp]."""

    index: int
    sites: tuple[str, ...]
    kl: float
    kl_low: float
    kl_high: float
    drop_pp: float


@dataclass(frozen=True, kw_only=True, config=config)
class AblationHarm:
    """Harm of ablating each node: its own computation set to its mean over the inputs, or bypassed (set to nothing)."""

    how: Literal["mean", "bypass"]
    nodes: tuple[NodeHarm, ...]
    inputs: int
    forwards: int
    skipped: tuple[Skip, ...] = ()


@dataclass(frozen=True, kw_only=True, config=config)
class LocalExplanation:
    """Why one input got its answer; `index` is None for a file, `true_class` None where it is unknown.
    `output` holds the decision's attribution first, then those of the other classes, likeliest first.
    """

    index: int | None
    name: str
    true_class: str | None
    decision: str
    confidence_pct: float
    output: tuple[Attribution, ...]
    nodes: tuple[Attribution, ...]
    sufficient: MinimalSet
    necessary: MinimalSet
    causal_map: CausalMap


@dataclass(frozen=True, kw_only=True, config=config)
class Explanation:
    """One network explained: over the data, per class, and for one input where one was named."""

    network: str
    grid: int | None
    causal_map: CausalMap
    classes: tuple[Attribution, ...]
    local: LocalExplanation | None
    forwards: int
    seconds: float
    notes: tuple[str, ...] = ()
