"""Every value that flows between stages: frozen, plain data, no torch; each can be written as JSON and read back."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]


@dataclass(frozen=True, kw_only=True, config=_config)
class Skip:
    """Something that was not done, and why; reasons are for the user."""

    what: str
    reason: str


@dataclass(frozen=True, kw_only=True, config=_config)
class Accuracy:
    """Share of correct answers [percent] with a 95 % Wilson interval."""

    pct: float
    n: int
    low_pct: float
    high_pct: float


@dataclass(frozen=True, kw_only=True, config=_config)
class TeacherScore:
    """The teacher before anything is done to it; accuracies on the validation split."""

    accuracy: Accuracy
    chance_pct: float
    macs: int
    params: int
    size_bytes: int
    classes: int


@dataclass(frozen=True, kw_only=True, config=_config)
class RegionInfo:
    """One region of the chain: the sub-graph between cut points `index - 1` and `index`."""

    index: int
    name: str
    modules: tuple[str, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    params: int


@dataclass(frozen=True, kw_only=True, config=_config)
class Chain:
    """The network as a chain of regions, in order, without the batch dimension in the shapes."""

    regions: tuple[RegionInfo, ...]
    untraced: tuple[Skip, ...]


@dataclass(frozen=True, kw_only=True, config=_config)
class NodeEffect:
    """One site: `ace` is E[ |delta| * KL(P(g'|do(x')) || P(g'|do(x))) ] in nats, `kl` the KL alone."""

    site: str
    ace: float
    ace_stderr: float
    kl: float
    kl_stderr: float


@dataclass(frozen=True, kw_only=True, config=_config)
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


@dataclass(frozen=True, kw_only=True, config=_config)
class Partition:
    """One partition of the sites into causal nodes, and the interval of epsilon on which it persists."""

    epsilon_low: float
    epsilon_high: float
    nodes: tuple[tuple[int, ...], ...]
    stability_ari: float | None
    stability_low: float | None


@dataclass(frozen=True, kw_only=True, config=_config)
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


@dataclass(frozen=True, kw_only=True, config=_config)
class Evidence:
    """Why a change was proposed."""

    cka: float | None
    same_node_share: float | None
    ace: float | None
    relative_error: float | None


@dataclass(frozen=True, kw_only=True, config=_config)
class Candidate:
    """One way to carry out regions first..last: which representative, at which width, and what it would cost.
    `harm_kl` is the measured rise of the output KL (nats, at the plan's temperature) when the teacher's cut point is
    replaced by the candidate's output. `inputs_kept` is the share of channels of the cut point before `first` that it
    reads; a part that writes the share s of its outputs costs `macs_fixed + s * macs_out` MACs, parameters alike.
    `widths` names each channel group inside that shrinks: producer -> channels kept.
    """

    first: int
    last: int
    representative: int
    adapter: Literal["reshape", "project"] | None
    inputs_kept: float
    widths: dict[str, int]
    macs_fixed: float
    macs_out: float
    params_fixed: float
    params_out: float
    harm_kl: float
    harm_stderr: float
    relative_error: float


@dataclass(frozen=True, kw_only=True, config=_config)
class CutGroup:
    """The channels of a cut point, where one layer alone writes them and one alone reads them."""

    producer: str
    channels: int


@dataclass(frozen=True, kw_only=True, config=_config)
class Candidates:
    """Every candidate that was measured; depends on the data and the teacher, not on the budget."""

    rows: tuple[Candidate, ...]
    cut_groups: dict[int, CutGroup]
    regions: int
    macs: int
    params: int
    skipped: tuple[Skip, ...]
    inputs: int
    heldout: int
    seconds: float


@dataclass(frozen=True, kw_only=True, config=_config)
class Decision:
    """One decision of the plan: a candidate that is carried out, its evidence, and what was refused for it."""

    node: str
    kind: Literal["keep", "merge", "narrow", "merge+narrow"]
    candidate: Candidate
    outputs_kept: float
    evidence: Evidence
    predicted_harm_kl: float
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    refused: tuple[Skip, ...]


@dataclass(frozen=True, kw_only=True, config=_config)
class FrontPoint:
    """One point of the predicted Pareto front: shares kept and predicted harm."""

    macs: float
    params: float
    harm_kl: float


@dataclass(frozen=True, kw_only=True, config=_config)
class Plan:
    """What will be done, decided before anything is touched."""

    decisions: tuple[Decision, ...]
    macs: float
    params: float
    predicted_harm_kl: float
    front: tuple[FrontPoint, ...]
    skipped: tuple[Skip, ...]


@dataclass(frozen=True, kw_only=True, config=_config)
class Merge:
    """Surgery step: regions first..last of the teacher's chain replaced by one; enough to be replayed without data."""

    first: int
    last: int
    representative: int
    adapter: Literal["reshape", "project"] | None


@dataclass(frozen=True, kw_only=True, config=_config)
class Keep:
    """Surgery step: the output channels that stay in a producer and everything coupled with it."""

    producer: str
    channels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, config=_config)
class Surgery:
    """Replayable recipe from the teacher's architecture to the student's; weights are kept apart."""

    merges: tuple[Merge, ...] = ()
    keeps: tuple[Keep, ...] = ()
    biased: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, config=_config)
class Change:
    """One ledger line: what was carried out, predicted beside measured harm (output KL in nats on held-out inputs)."""

    node: str
    what: str
    evidence: Evidence | None
    predicted_harm_kl: float | None
    measured_harm_kl: float | None
    relative_error: float | None
    penalty: float | None


@dataclass(frozen=True, kw_only=True, config=_config)
class Log:
    """What a stage that touches weights did and did not do; the weights themselves lie beside it in the run folder."""

    stage: str
    surgery: Surgery
    changes: tuple[Change, ...]
    skipped: tuple[Skip, ...]
    heldout_kl: float
    validation: Accuracy
    macs: int
    params: int


@dataclass(frozen=True, kw_only=True, config=_config)
class Epoch:
    """One epoch of distillation; the loss is the mean over the epoch."""

    epoch: int
    loss: float
    learning_rate: float
    validation_pct: float
    seconds: float


@dataclass(frozen=True, kw_only=True, config=_config)
class Distilled:
    """How the student was trained; always the last epoch, never the best."""

    epochs: tuple[Epoch, ...]
    validation: Accuracy
    images_per_second: float
    precision: str
    averaged: bool
    device: str
    processes: int
    compiled: bool


@dataclass(frozen=True, kw_only=True, config=_config)
class Parity:
    """An exported model against PyTorch on the same real inputs."""

    inputs: int
    max_abs_diff: float
    agreement_pct: float
    batches: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, config=_config)
class Exported:
    """The exported files (names inside the run folder), the student's unless named otherwise, with size and parity."""

    onnx: str
    opset: int
    size_bytes: int
    sha256: str
    parity: Parity
    pt2: str
    pt2_parity: Parity
    teacher_onnx: str
    teacher_pt2: str = "teacher.pt2"
    teacher_parity: Parity | None = None
    nodes_before: int
    nodes_after: int


@dataclass(frozen=True, kw_only=True, config=_config)
class ScoreRow:
    """One model on one runtime: the columns of the scorecard.
    Accuracies on the test split; `drop_pp` is teacher minus student with a 95 % paired interval; 0 for the teacher.
    `speedup` is the teacher's median latency over this model's, with a 95 % interval over `rounds` interleaved calls.
    `peak_memory_bytes` is the rise of a fresh process's memory by loading the file and running one batch; None where
    it could not be measured.
    """

    model: Literal["teacher", "student"]
    runtime: str
    precision: str
    batch: int
    threads: int
    accuracy_pct: float
    n: int
    drop_pp: float
    drop_ci_pp: tuple[float, float]
    params: int
    macs: int
    size_bytes: int
    latency_ms_p50: float
    latency_ms_p95: float
    latency_ms_p99: float
    throughput_per_s: float
    peak_memory_bytes: int | None
    speedup: float
    speedup_ci: tuple[float, float]
    rounds: int = 0


@dataclass(frozen=True, kw_only=True, config=_config)
class Scorecard:
    """What was gained and lost; `reasons` says how the verdict came about, `notes` what a reader must know.
    `runtimes` describes each runtime with its version.
    """

    schema: Literal[1] = 1
    verdict: Verdict
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    rows: tuple[ScoreRow, ...]
    runtimes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, config=_config)
class StageRecord:
    """One stage in run.json: what it depended on, and what it cost."""

    stage: str
    key: str
    files: dict[str, str]
    seconds: float
    peak_memory_bytes: int
    started: str


@dataclass(frozen=True, kw_only=True, config=_config)
class Provenance:
    """run.json: where every number of this folder comes from."""

    schema: Literal[1] = 1
    command: tuple[str, ...]
    recipe_sha256: str
    checkpoint_sha256: str | None
    data_sha256: str | None
    versions: dict[str, str]
    machine: dict[str, Any]
    seed: int
    stages: tuple[StageRecord, ...]
