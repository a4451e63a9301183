"""What is known of the teacher before anything is touched."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from causal_compress.results.common import Accuracy, Skip, config


@dataclass(frozen=True, kw_only=True, config=config)
class TeacherScore:
    """The teacher before anything is done to it; accuracies on the validation split."""

    accuracy: Accuracy
    chance_pct: float
    macs: int
    params: int
    size_bytes: int
    classes: int


@dataclass(frozen=True, kw_only=True, config=config)
class RegionInfo:
    """One region of the chain: the sub-graph between cut points `index - 1` and `index`."""

    index: int
    name: str
    modules: tuple[str, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    params: int


@dataclass(frozen=True, kw_only=True, config=config)
class Chain:
    """The network as a chain of regions, in order, without the batch dimension in the shapes."""

    regions: tuple[RegionInfo, ...]
    untraced: tuple[Skip, ...]


@dataclass(frozen=True, kw_only=True, config=config)
class NodeEffect:
    """One site: `ace` is E[ |delta| * KL(P(g'|do(x')) || P(g'|do(x))) ] in nats, `kl` the KL alone."""

    site: str
    ace: float
    ace_stderr: float
    kl: float
    kl_stderr: float


@dataclass(frozen=True, kw_only=True, config=config)
class Effects:
    """Average causal effects of masking input features, at every site and at the output, and the sites' similarity.
    `feature_ace` is the mean effect at the output of the masks that contain the feature (NaN: never masked). `forwards`
    counts inputs run through the network. `cka` is debiased, over plain and intervened inputs; `hsic_bins` holds the
    HSIC sums of up to 32 disjoint sets of inputs, from which the bootstrap draws. `skipped`: sites without information.
    """

    chain: Chain
    nodes: tuple[NodeEffect, ...]
    features: tuple[str, ...]
    feature_ace: tuple[float, ...]
    feature_ace_stderr: tuple[float, ...]
    baselines: tuple[str, ...]
    inputs: int
    interventions: int
    forwards: int
    forward_seconds: float
    analysis_seconds: float
    cka: tuple[tuple[float, ...], ...]
    cka_null: tuple[tuple[float, ...], ...]
    hsic_bins: tuple[tuple[tuple[float, ...], ...], ...]
    skipped: tuple[Skip, ...] = ()


@dataclass(frozen=True, kw_only=True, config=config)
class Partition:
    """One partition of the sites into causal nodes, and the interval of epsilon on which it persists."""

    epsilon_low: float
    epsilon_high: float
    nodes: tuple[tuple[int, ...], ...]
    stability_ari: float | None
    stability_low: float | None


@dataclass(frozen=True, kw_only=True, config=config)
class Groups:
    """Causal nodes: the chosen partition, the whole epsilon path, the Fisher segmentation, and the nulls."""

    sites: tuple[str, ...]
    epsilon: float
    chosen: Partition
    path: tuple[Partition, ...]
    fisher: tuple[tuple[int, ...], ...]
    null_cka_mean: float
    null_cka_max: float
    inputs: int
    stable: bool
