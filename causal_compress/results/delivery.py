"""How the student was trained, exported and measured, and where the run stands."""

from __future__ import annotations

from typing import Any, Literal

from pydantic.dataclasses import dataclass

from causal_compress.results.common import Accuracy, Verdict, config


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
    """How the student was trained; always the last epoch, never the best."""

    epochs: tuple[Epoch, ...]
    validation: Accuracy
    images_per_second: float
    precision: str
    averaged: bool
    device: str
    processes: int
    compiled: bool


@dataclass(frozen=True, kw_only=True, config=config)
class Parity:
    """An exported model against PyTorch on the same real inputs."""

    inputs: int
    max_abs_diff: float
    agreement_pct: float
    batches: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, config=config)
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


@dataclass(frozen=True, kw_only=True, config=config)
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
    """One stage in run.json: what it depended on, and what it cost."""

    stage: str
    key: str
    files: dict[str, str]
    seconds: float
    peak_memory_bytes: int
    started: str


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
