"""How the student was trained, exported and measured, and where the run stands."""

from __future__ import annotations

from typing import Any, Literal

from pydantic.dataclasses import dataclass

from causal_compress.results.common import Accuracy, Skip, Verdict, config


@dataclass(frozen=True, kw_only=True, config=config)
class Epoch:
    """One epoch of distillation; the loss is the mean over the epoch."""

    epoch: int
    loss: float
    learning_rate: float
    validation_pct: float
    seconds: float


@dataclass(frozen=True, kw_only=True, config=config)
class Distilled:
    """How the student was trained; always the last epoch, never the best.

    `compiled`: by torch.compile. `recorded`: by replayed CUDA graphs.
    """

    epochs: tuple[Epoch, ...]
    validation: Accuracy
    images_per_second: float
    precision: str
    averaged: bool
    device: str
    processes: int
    compiled: bool
    recorded: bool = False

    @property
    def seconds(self) -> float:
        """What all epochs took, also those of an earlier process."""
        return sum(epoch.seconds for epoch in self.epochs)


@dataclass(frozen=True, kw_only=True, config=config)
class Parity:
    """An exported model against PyTorch on the same real inputs."""

    inputs: int
    max_abs_diff: float
    agreement_pct: float
    batches: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, config=config)
class Exported:
    """The exported files (names inside the run folder), the student's unless named otherwise, with size and parity.
    Outputs are in the order of `classes`; tables come in the encoding of that fingerprint.
    """

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
    classes: tuple[str, ...] | None = None
    encoding_sha256: str | None = None


@dataclass(frozen=True, kw_only=True, config=config)
class ScoreRow:
    """One model on one runtime: the columns of the scorecard.
    Accuracies on the test split; `drop_pp` is teacher minus student with a 95 % paired interval; 0 for the teacher.
    `speedup` is the teacher's latency over this model's (of undisturbed calls: 10th percentiles), with a 95 % interval
    over `rounds` interleaved calls.
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


@dataclass(frozen=True, kw_only=True, config=config)
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


@dataclass(frozen=True, kw_only=True, config=config)
class StageRecord:
    """One stage in run.json: what it depended on, and what it cost.
    `after` names the stage before it that is no decision, with the key that this had then: one run's are a chain.
    """

    stage: str
    key: str
    files: dict[str, str]
    seconds: float
    peak_memory_bytes: int
    started: str
    after: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True, config=config)
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


@dataclass(frozen=True, kw_only=True, config=config)
class EngineInfo:
    """What an engine is, written beside it and checked when it is loaded.
    `profile` holds the smallest, the tuned and the largest batch. `capability` is the GPU generation (SM89 ..).
    """

    schema: Literal[1] = 1
    runtime: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    capability: str
    precision: str
    onnx_sha256: str
    engine_sha256: str
    input_shape: tuple[int, ...]
    profile: tuple[int, int, int]
    workspace_bytes: int
    hardware_compatible: bool
    version_compatible: bool
    build_seconds: float
    size_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, config=config)
class PackagedModel:
    """One file of a package; `parity` compares it with PyTorch where `parity_on` could run it, `note` says the rest.
    `files` are all that belong to it, the one that a runtime opens first, with their sha256.
    """

    role: Literal["teacher", "student"]
    kind: Literal["onnx", "pt2", "openvino", "tensorrt", "tensorrt-rtx"]
    precision: str
    files: dict[str, str]
    size_bytes: int
    capability: str | None = None
    parity: Parity | None = None
    parity_on: str | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True, config=config)
class Package:
    """package.json: models, how inputs are prepared, and real inputs (prepared) with the logits that are expected.
    Tables come in the encoding of that fingerprint.
    """

    schema: Literal[1] = 1
    made_with: dict[str, str]
    kind: Literal["image", "table"]
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    preparation: str
    macs: dict[str, int]
    params: dict[str, int]
    models: tuple[PackagedModel, ...]
    inputs: str
    inputs_sha256: str
    inputs_count: int
    skipped: tuple[Skip, ...] = ()
    encoding_sha256: str | None = None


@dataclass(frozen=True, kw_only=True, config=config)
class TargetRow:
    """One target on one runtime. Latencies [ms] with 95 % bootstrap intervals over `rounds` interleaved calls.
    `ratio` is the reference's latency over this one's on the same runtime (10th percentiles), with a 95 % interval;
    `verdict` counts differences below 3 % as none. `accuracy` and `drop_pp` (reference minus this, paired) need labels;
    `agreement_pct` is the share of expected top classes that were met, where a package brings them.
    `device_ms` is the GPU's own time, without copies; `energy_mj` millijoules per input, where the machine tells.
    """

    target: str
    runtime: str
    precision: str
    batch: int
    threads: int
    latency_ms_p50: float
    p50_ci_ms: tuple[float, float]
    latency_ms_p95: float
    p95_ci_ms: tuple[float, float]
    latency_ms_p99: float
    p99_ci_ms: tuple[float, float]
    throughput_per_s: float
    rounds: int
    load_ms: float
    size_bytes: int
    peak_memory_bytes: int | None
    macs: int | None
    ratio: float
    ratio_ci: tuple[float, float]
    verdict: Literal["reference", "faster", "slower", "no difference"]
    accuracy: Accuracy | None = None
    drop_pp: float | None = None
    drop_ci_pp: tuple[float, float] | None = None
    agreement_pct: float | None = None
    device_ms: float | None = None
    energy_mj: float | None = None


@dataclass(frozen=True, kw_only=True, config=config)
class TargetTable:
    """What `benchmark TARGET...` measured; `reference` is the target that the others are compared with."""

    schema: Literal[1] = 1
    reference: str
    rows: tuple[TargetRow, ...]
    notes: tuple[str, ...]
    skipped: tuple[Skip, ...]
    runtimes: tuple[str, ...]
    machine: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True, config=config)
class Gated:
    """The answer of `gate`: one line for people in `text`, one sentence for each limit in `reasons`."""

    schema: Literal[1] = 1
    verdict: Verdict
    text: str
    reasons: tuple[str, ...]
    runtime: str
    precision: str
    batch: int
    threads: int


@dataclass(frozen=True, kw_only=True, config=config)
class FloatLayer:
    """A layer left in FP32, and why: the output KL [nats] when it alone is rounded."""

    layer: str
    harm_kl: float


@dataclass(frozen=True, kw_only=True, config=config)
class QuantizedFile:
    """One INT8 file (name inside the run folder) beside the FP32 student, on validation inputs.
    `method_kl`: output KL [nats] of each calibration method on `scored` inputs; `kl` that of the file as written.
    `bias_corrected`: layers whose bias took up the mean shift of their output; none where that did not lower the KL.
    `drop_pp` is FP32 minus INT8 with a 95 % paired interval, `max_abs_diff` that of logits, all over `n` inputs.
    `weight_bits` is 7 where sums of 8-bit products would have overflowed on the CPU that made the file.
    """

    onnx: str
    family: Literal["cpu", "tensorrt"]
    sha256: str
    size_bytes: int
    size_ratio: float
    layers: int
    excluded: tuple[FloatLayer, ...]
    method: Literal["minmax", "percentile", "entropy"]
    method_kl: dict[str, float]
    kl: float
    scored: int
    bias_corrected: tuple[str, ...]
    n: int
    agreement_pct: float
    max_abs_diff: float
    accuracy: Accuracy
    drop_pp: float
    drop_ci_pp: tuple[float, float]
    within_budget: bool
    weight_bits: int = 8


@dataclass(frozen=True, kw_only=True, config=config)
class Quantized:
    """INT8 forms of the student, and which precision the measured runtime should run.
    `speedup` is FP32's latency over INT8's (10th percentiles) with a 95 % interval over interleaved `rounds`;
    None where no file for CPUs was asked for. `calibration` counts inputs.
    """

    files: tuple[QuantizedFile, ...]
    fp32: Accuracy
    fp32_size_bytes: int
    calibration: int
    runtime: str | None
    batch: int
    fp32_latency_ms_p50: float | None
    int8_latency_ms_p50: float | None
    speedup: float | None
    speedup_ci: tuple[float, float] | None
    rounds: int
    chosen: Literal["fp32", "int8"]
    reason: str
