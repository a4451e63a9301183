"""Teacher and student, interleaved, on every runtime: accuracy, latency, memory and size."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from causal_compress.deploy.absent import absence, refuse_absent
from causal_compress.deploy.memory import peak_memory
from causal_compress.deploy.runtimes import RUNTIMES, Runtime, RuntimeName, open_module, torch_threads
from causal_compress.deploy.scorecard import measured_notes, verdict
from causal_compress.deploy.timing import compare_latencies, no_garbage_collection
from causal_compress.errors import DataError
from causal_compress.recipe import BenchmarkSection, BudgetSection
from causal_compress.results import Exported, Quantized, Scorecard, ScoreRow
from causal_compress.understand.cost import count_macs, count_params, evaluating
from causal_compress.understand.statistics import paired_drop

if TYPE_CHECKING:
    from causal_compress.inputs.data import Split

_MIN_ROUNDS = 10
_WARM_UP_ROUNDS = 5
_ACCURACY_BATCH_ELEMENTS = 2**20
_SAME = (1.0, (1.0, 1.0))
_INT8_RUNTIMES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Deployed:
    """A model, and the file that each runtime loads."""

    model: nn.Module
    onnx: Path
    pt2: Path

    def file(self, runtime: RuntimeName) -> Path:
        """The file that a runtime loads.

        Args:
            runtime: Which.

        Returns:
            Path.
        """
        return self.pt2 if runtime.startswith("torch") else self.onnx


@dataclass(frozen=True)
class Agreement:
    """How teacher and student answer the same inputs on one runtime."""

    n: int
    teacher_correct: int
    student_correct: int
    teacher_only: int
    student_only: int


@dataclass(frozen=True)
class Pair:
    """Teacher and student on one runtime with so many threads."""

    runtime: RuntimeName
    threads: int
    teacher: Runtime
    student: Runtime


def deployed(exported: Exported, folder: Path, teacher: nn.Module, student: nn.Module) -> tuple[Deployed, Deployed]:
    """Teacher and student with the files that `export` wrote.

    Args:
        exported: Result of the export stage.
        folder: The run folder.
        teacher: The network before compression.
        student: The compressed network.

    Returns:
        Teacher, student.
    """
    return (
        Deployed(model=teacher, onnx=folder / exported.teacher_onnx, pt2=folder / exported.teacher_pt2),
        Deployed(model=student, onnx=folder / exported.onnx, pt2=folder / exported.pt2),
    )


def chosen_int8(quantized: Quantized, folder: Path) -> Path | None:
    """The INT8 file for CPUs, if it was chosen over the FP32 one."""
    files = [folder / file.onnx for file in quantized.files if file.family == "cpu"]
    return files[0] if files and quantized.chosen == "int8" else None


def benchmark(
    teacher: Deployed,
    student: Deployed,
    test: Split,
    section: BenchmarkSection,
    budget: BudgetSection,
    *,
    int8: Path | None = None,
) -> Scorecard:
    """Measure teacher and student on every runtime, thread count and batch size, and judge the budget.

    Args:
        teacher: The network before compression; on torch the module itself is run (eager), on onnxruntime its file.
        student: The compressed network.
        test: The test split; read once per runtime for accuracy, its first inputs for latency.
        section: Runtimes, batch sizes, thread counts, repeats and time limit.
        budget: What the result must satisfy.
        int8: INT8 file of the student; on onnxruntime and openvino it gets rows of its own, and it is judged too.

    Returns:
        Two rows per runtime, thread count and batch size, with verdict, reasons and notes.

    Raises:
        DataError: an empty test split.
        MissingPackageError: a runtime is not installed.

    Limits: latencies hold for this machine under its present load; the speed-up is fairer than either latency, since
        both models are disturbed alike. Memory is measured in fresh processes on zeros.
    """
    first = next(iter(test.batches(max(section.batches))), None)
    if first is None:
        raise DataError("the test split is empty", remedy="set data.test_share or name a source with a test split")
    inputs = first[0]
    refuse_absent(section.runtimes)
    forms: list[tuple[RuntimeName, Deployed, str]] = [(name, student, "fp32") for name in section.runtimes]
    if int8 is not None:
        eight = replace(student, onnx=int8)
        forms += [(name, eight, "int8") for name in section.runtimes if name in _INT8_RUNTIMES]
    rows, described = _measure(teacher, forms, test, inputs, section)
    outcome, reasons = verdict(rows, budget)
    return Scorecard(
        verdict=outcome,
        reasons=reasons,
        notes=(*measured_notes(rows), *_not_measured(section.runtimes)),
        rows=tuple(rows),
        runtimes=tuple(described),
    )


def _measure(
    teacher: Deployed,
    forms: Sequence[tuple[RuntimeName, Deployed, str]],
    test: Split,
    inputs: Tensor,
    section: BenchmarkSection,
) -> tuple[list[ScoreRow], list[str]]:
    """Rows of the teacher and of each form of the student, and descriptions of the runtimes."""
    rows: list[ScoreRow] = []
    described: list[str] = []
    with evaluating(teacher.model), evaluating(forms[0][1].model):
        facts = _facts(teacher, inputs), _facts(forms[0][1], inputs)
        for name, form, precision in forms:
            fast = max(torch.get_num_threads(), *section.threads)  # answers, unlike latencies, take all threads
            answers = _answers(_open(name, fast, teacher, form), test)
            for threads in section.threads:
                pair = _open(name, threads, teacher, form)
                with torch_threads(threads):
                    measured = _rows(pair, (teacher, form), inputs, section, (answers, facts))
                if precision == "fp32":
                    described.append(pair.teacher.describe())
                    rows += measured
                else:  # the teacher has its rows already
                    rows += [replace(row, precision=precision) for row in measured if row.model == "student"]
    return rows, described


def count_agreement(pair: Pair, test: Split) -> Agreement:
    """Right answers of teacher and student on the same inputs, in one pass over the split.

    Args:
        pair: Both models on one runtime.
        test: Labelled inputs.

    Returns:
        Counts.
    """
    first = next(iter(test.batches(1)))[0]
    size = int(np.clip(_ACCURACY_BATCH_ELEMENTS // first.numel(), 1, 256))
    hits = []
    for x, y in test.batches(size):
        array, labels = _array(x), y.numpy()
        hits.append((pair.teacher.run(array).argmax(1) == labels, pair.student.run(array).argmax(1) == labels))
    teacher, student = (np.concatenate(side) for side in zip(*hits, strict=True))
    return Agreement(
        n=len(teacher),
        teacher_correct=int(teacher.sum()),
        student_correct=int(student.sum()),
        teacher_only=int((teacher & ~student).sum()),
        student_only=int((student & ~teacher).sum()),
    )


def time_interleaved(
    pair: Pair, x: NDArray[np.float32], *, repeats: int, seconds: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Latencies of teacher and student, called in turn on the same batch; who goes first alternates.

    Args:
        pair: Both models on one runtime.
        x: One batch.
        repeats: Rounds wanted; a round calls each model once.
        seconds: Time limit for each model; fewer rounds where it is reached, but at least 10.

    Returns:
        Milliseconds per round of the teacher and of the student.
    """
    calls = (pair.teacher.run, pair.student.run)
    taken: list[list[float]] = [[], []]
    with no_garbage_collection():
        for _ in range(_WARM_UP_ROUNDS):
            for call in calls:
                call(x)
        end = time.perf_counter() + 2 * seconds
        for turn in range(max(repeats, _MIN_ROUNDS)):
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                start = time.perf_counter_ns()
                calls[which](x)
                taken[which].append((time.perf_counter_ns() - start) / 1e6)
            if turn + 1 >= _MIN_ROUNDS and time.perf_counter() > end:
                break
    return np.asarray(taken[0]), np.asarray(taken[1])


_Facts = tuple[int, int]


def _facts(deployed: Deployed, inputs: Tensor) -> _Facts:
    return count_params(deployed.model), count_macs(deployed.model, inputs)


def _open(name: RuntimeName, threads: int, teacher: Deployed, student: Deployed) -> Pair:
    def one(deployed: Deployed) -> Runtime:
        return open_module(name, deployed.model, deployed.onnx, threads=threads)

    return Pair(runtime=name, threads=threads, teacher=one(teacher), student=one(student))


def _answers(pair: Pair, test: Split) -> Agreement:
    with torch_threads(pair.threads):
        return count_agreement(pair, test)


def _rows(
    pair: Pair,
    models: tuple[Deployed, Deployed],
    inputs: Tensor,
    section: BenchmarkSection,
    known: tuple[Agreement, tuple[_Facts, _Facts]],
) -> list[ScoreRow]:
    answers, facts = known
    shape = tuple(inputs.shape[1:])
    memory = [
        peak_memory(pair.runtime, model.file(pair.runtime), shape, tuple(section.batches), threads=pair.threads) or {}
        for model in models
    ]
    rows = []
    for batch in section.batches:
        x = _array(inputs[np.arange(batch) % len(inputs)])
        times = time_interleaved(pair, x, repeats=section.repeats, seconds=section.seconds)
        for which, name in enumerate(_NAMES):
            cost = _Cost(*facts[which], models[which].file(pair.runtime).stat().st_size, memory[which].get(batch))
            ratio = _speedup(*times) if name == "student" else _SAME
            rows.append(_row(name, pair, batch, _Measured(answers, cost, times[which], ratio)))
    return rows


def _speedup(teacher: NDArray[np.float64], student: NDArray[np.float64]) -> tuple[float, tuple[float, float]]:
    ratio = compare_latencies(teacher, student)
    return ratio.value, (ratio.low, ratio.high)


def _not_measured(measured: Sequence[RuntimeName]) -> Iterator[str]:
    absent = {name: absence(name) for name in RUNTIMES if name not in measured}
    told = [f"{name} ({error.remedy})" for name, error in absent.items() if error is not None]
    if told:
        yield f"not here, so not measured: {'; '.join(told)}"


_NAMES: tuple[Literal["teacher", "student"], ...] = ("teacher", "student")


@dataclass(frozen=True)
class _Cost:
    params: int
    macs: int
    size_bytes: int
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class _Measured:
    answers: Agreement
    cost: _Cost
    latency_ms: NDArray[np.float64]
    speedup: tuple[float, tuple[float, float]]


def _row(name: Literal["teacher", "student"], pair: Pair, batch: int, measured: _Measured) -> ScoreRow:
    answers, cost, taken = measured.answers, measured.cost, measured.latency_ms
    correct = answers.teacher_correct if name == "teacher" else answers.student_correct
    drop = paired_drop(answers.teacher_only, answers.student_only, answers.n)
    p50, p95, p99 = (float(value) for value in np.percentile(taken, (50, 95, 99)))
    return ScoreRow(
        model=name,
        runtime=pair.runtime,
        precision="fp32",
        batch=batch,
        threads=pair.threads,
        accuracy_pct=100.0 * correct / answers.n,
        n=answers.n,
        drop_pp=drop[0] if name == "student" else 0.0,
        drop_ci_pp=drop[1] if name == "student" else (0.0, 0.0),
        params=cost.params,
        macs=cost.macs,
        size_bytes=cost.size_bytes,
        latency_ms_p50=p50,
        latency_ms_p95=p95,
        latency_ms_p99=p99,
        throughput_per_s=batch * len(taken) / (float(taken.sum()) / 1e3),
        peak_memory_bytes=cost.peak_memory_bytes,
        speedup=measured.speedup[0],
        speedup_ci=measured.speedup[1],
        rounds=len(taken),
    )


def _array(x: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(x.cpu().numpy(), dtype=np.float32)
