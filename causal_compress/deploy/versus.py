"""Several targets, interleaved, on every runtime: the table that `benchmark TARGET...` shows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from causal_compress.deploy.energy import NO_ENERGY, counters, energy_per_call
from causal_compress.deploy.evidence import Array, Evidence
from causal_compress.deploy.memory import peak_memory
from causal_compress.deploy.precision import parse_onnx
from causal_compress.deploy.runtimes import Runtime, for_any_batch, open_runtime, torch_threads
from causal_compress.deploy.targets import Entry, bytes_on_disk
from causal_compress.deploy.timing import Ratio, compare_latencies, percentiles, time_in_turn
from causal_compress.deploy.traffic import Traffic, declared_batch, onnx_traffic, why_no_speed
from causal_compress.errors import ExportError, UsageError
from causal_compress.provenance import machine, versions
from causal_compress.recipe import BenchmarkSection
from causal_compress.results import Skip, TargetRow, TargetTable
from causal_compress.understand.statistics import paired_drop, wilson

_ON_GPU = ("onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt", "tensorrt-rtx")
_REFUSALS = (ExportError, UsageError, RuntimeError)  # the last is OpenVINO's own
_SAME = Ratio(1.0, 1.0, 1.0, 0)


@dataclass(frozen=True)
class _Answers:
    evidence: Evidence
    hits: NDArray[np.bool_]
    agreement_pct: float | None


@dataclass(frozen=True)
class _Loaded:
    entry: Entry
    runtime: Runtime
    load_ms: float
    x: Array
    batches: tuple[int, ...] = ()
    answers: _Answers | None = None

    def batch(self, size: int) -> Array:
        """So many inputs."""
        return np.ascontiguousarray(self.x[np.arange(size) % len(self.x)])


@dataclass(frozen=True)
class _Timed:
    loaded: _Loaded
    batch: int
    threads: int
    taken_ms: NDArray[np.float64]
    memory: int | None


def measure_targets(
    entries: Sequence[Entry], skipped: Sequence[Skip], section: BenchmarkSection, evidence: Evidence
) -> TargetTable:
    """Time all entries in turn for each number of threads and batch size, and compare them on each runtime.

    Args:
        entries: The first of each runtime is what the others on it are compared with.
        skipped: What can't be measured here; carried into the result.
        section: Batch sizes, threads, repeats and time limit.
        evidence: Inputs, labels and expected answers.

    Returns:
        The table.

    Raises:
        ExportError: no entry can be run.
        MissingPackageError: a runtime or device is absent after all.

    Limits: as for any benchmark, latencies hold for this machine under its present load; all entries are loaded at
        once, so models that need most of the memory should be measured apart.
    """
    runnable, refused = _try_all(entries, section, evidence)
    rows: list[TargetRow] = []
    described: list[str] = []
    for threads in section.threads:
        with ExitStack() as stack:
            if any(one.entry.runtime.startswith("torch") for one in runnable):
                stack.enter_context(torch_threads(threads))
            loaded = [_loaded_again(one, threads, section.batches) for one in runnable]
            described += [one.runtime.describe() for one in loaded]
            rows += _rows(loaded, threads, section)
    return TargetTable(
        reference=runnable[0].entry.file.target,
        rows=tuple(rows),
        notes=(*evidence.notes, *_notes(rows, runnable)),
        skipped=(*skipped, *refused),
        runtimes=tuple(dict.fromkeys(described)),
        machine=machine(),
        versions=versions(),
    )


def _try_all(
    entries: Sequence[Entry], section: BenchmarkSection, evidence: Evidence
) -> tuple[list[_Loaded], list[Skip]]:
    """Load each once, try each batch size and take its answers; what a runtime refuses is left out, and said."""
    runnable: list[_Loaded] = []
    refused: list[Skip] = []
    for entry in entries:
        own = evidence.of(entry)
        try:
            loaded = _load(entry, max(section.threads), section.batches, own.first)
            _refuse_batches(loaded.runtime, section.batches)
            fixed = _fixed_batch(entry)
            misfits = _misfits(loaded, section.batches, fixed)
            fitting = tuple(batch for batch in section.batches if batch not in misfits)
            if not fitting:
                raise misfits[section.batches[0]]
            answers, unjudged = _judged(loaded, own, fixed or (fitting[0] if misfits else None))
            loaded = replace(loaded, batches=fitting, answers=answers)
        except _REFUSALS as error:
            refused.append(_skip(entry.name, error))
        else:
            runnable.append(loaded)
            refused += [_skip(f"{entry.name}, batch {batch}", error) for batch, error in misfits.items()]
            refused += [_skip(f"{entry.name}, accuracy", error) for error in unjudged]
    if not runnable:
        raise ExportError("no target runs here", found="; ".join(skip.reason for skip in refused), remedy="see above")
    return runnable, refused


def _skip(what: str, error: Exception) -> Skip:
    return Skip(what=what, reason=" ".join(str(error).split()))


def _load(entry: Entry, threads: int, batches: Sequence[int], x: Array) -> _Loaded:
    start = time.perf_counter()
    runtime = open_runtime(entry.runtime, entry.file.path, threads=threads, batches=tuple(batches))
    return _Loaded(entry, runtime, 1e3 * (time.perf_counter() - start), x)


def _loaded_again(one: _Loaded, threads: int, batches: Sequence[int]) -> _Loaded:
    return replace(_load(one.entry, threads, batches, one.x), batches=one.batches, answers=one.answers)


def _misfits(loaded: _Loaded, batches: Sequence[int], fixed: int | None) -> dict[int, Exception]:
    """The batch sizes at which the model does not run, and why; every other one has been run once."""
    found: dict[int, Exception] = {}
    for batch in batches:
        try:
            if fixed not in (None, batch):
                raise ExportError(
                    f"the model can't run a batch of {batch}",
                    found=f"it was exported with a batch of {fixed}",
                    remedy=f"give --batch {fixed}, or export it with a free batch size",
                )
            answered = loaded.runtime.run(loaded.batch(batch))
            if np.shape(answered)[:1] != (batch,):  # OpenVINO takes inputs of another width, and answers nothing
                raise ExportError(
                    f"the model does not answer each input of a batch of {batch}",
                    found=f"answers of shape {np.shape(answered)} to inputs of shape {loaded.batch(batch).shape}",
                    remedy="give --data of the shape that the model takes, or measure it alone",
                )
        except _REFUSALS as error:
            found[batch] = error
    return found


def _fixed_batch(entry: Entry) -> int | None:
    """The batch size that an .onnx file declares; None where it is free, or the file does not tell."""
    if entry.file.kind != "onnx":
        return None
    return declared_batch(parse_onnx(entry.file.path.read_bytes()))


def _refuse_batches(runtime: Runtime, batches: Sequence[int]) -> None:
    """Before anything is timed: one engine that can't run a batch size is no reason to lose the others' times."""
    low, high = getattr(runtime, "limits", (1, max(batches)))
    if beyond := [batch for batch in batches if not low <= batch <= high]:
        raise UsageError(
            f"the engine can't run a batch of {beyond[0]}",
            wanted=f"{low} to {high}",
            remedy=f"give --batch {low} or another size up to {high}, or export it again with --batch {beyond[0]}",
        )


def _judged(loaded: _Loaded, evidence: Evidence, part: int | None) -> tuple[_Answers | None, list[Exception]]:
    """The answers; where they can't be judged, why not: the model is timed all the same."""
    try:
        return _answers(loaded, evidence, part), []
    except _REFUSALS as error:
        return None, [error]


def _answers(loaded: _Loaded, evidence: Evidence, part: int | None) -> _Answers | None:
    if evidence.batches is None:
        return None
    given, right = [], []
    run, file = for_any_batch(loaded.runtime, fixed=part), loaded.entry.file
    for x, y in evidence.batches():
        given.append(_logits(run(x)).argmax(1))
        right.append(y)
    answers = np.concatenate(given)
    expected = evidence.expected.get((file.path.parent, file.role))
    agreed = None if expected is None else 100.0 * float((answers == expected).mean())
    return _Answers(evidence, answers == np.concatenate(right), agreed)


def _logits(answered: Array) -> Array:
    """Answers as N x classes; those of a fully convolutional network, N x classes x 1 x 1, are such."""
    shape = np.shape(answered)
    if len(shape) < 2 or shape[1] < 2 or set(shape[2:]) - {1}:
        raise ExportError(
            "the answers can't be compared with labels",
            found=f"a first output of shape {shape}",
            wanted="a number for each input and class, N x classes",
            remedy="leave --data out, or export the network with its logits as first output",
        )
    return np.reshape(answered, shape[:2])


def _rows(loaded: Sequence[_Loaded], threads: int, section: BenchmarkSection) -> Iterator[TargetRow]:
    memory = {one.entry: _memory(one, threads) for one in loaded}
    for batch in section.batches:
        here = [one for one in loaded if batch in one.batches]
        calls = [partial(one.runtime.run, one.batch(batch)) for one in here]
        taken = time_in_turn(calls, repeats=section.repeats, seconds=section.seconds) if here else []
        timed = [
            _Timed(one, batch, threads, times, memory[one.entry].get(batch))
            for one, times in zip(here, taken, strict=True)
        ]
        for one in timed:
            x = one.loaded.batch(batch)
            reference = next(other for other in timed if other.loaded.entry.runtime == one.loaded.entry.runtime)
            joules = energy_per_call(partial(one.loaded.runtime.run, x), counters(gpu=_on_gpu(one.loaded.entry)))
            row = _row(one, reference, _device_ms(one.loaded.runtime, x))
            yield row if joules is None else replace(row, energy_mj=1e3 * joules / batch)


def _on_gpu(entry: Entry) -> bool:
    """Whether the entry's runtime computes on a GPU."""
    return entry.runtime in _ON_GPU


def _memory(one: _Loaded, threads: int) -> dict[int, int]:
    if _on_gpu(one.entry):
        return {}
    return peak_memory(one.entry.runtime, one.entry.file.path, one.x.shape[1:], one.batches, threads=threads) or {}


def _device_ms(runtime: Runtime, x: Array) -> float | None:
    measure = getattr(runtime, "device_ms", None)  # only engines can tell the GPU's own time
    return None if measure is None else float(np.median(measure(x)))


def _row(one: _Timed, reference: _Timed, device_ms: float | None) -> TargetRow:
    entry = one.loaded.entry
    ratio = _SAME if one is reference else compare_latencies(reference.taken_ms, one.taken_ms)
    spread = percentiles(one.taken_ms)
    row = TargetRow(
        target=entry.file.target,
        runtime=entry.runtime,
        precision=entry.file.precision,
        batch=one.batch,
        threads=one.threads,
        latency_ms_p50=spread[50][0],
        p50_ci_ms=spread[50][1],
        latency_ms_p95=spread[95][0],
        p95_ci_ms=spread[95][1],
        latency_ms_p99=spread[99][0],
        p99_ci_ms=spread[99][1],
        throughput_per_s=one.batch * len(one.taken_ms) / (float(one.taken_ms.sum()) / 1e3),
        rounds=len(one.taken_ms),
        load_ms=one.loaded.load_ms,
        size_bytes=bytes_on_disk(entry.file),
        peak_memory_bytes=one.memory,
        macs=entry.file.macs,
        ratio=ratio.value,
        ratio_ci=(ratio.low, ratio.high),
        verdict="reference" if one is reference else ratio.verdict,
        device_ms=device_ms,
    )
    return _with_accuracy(row, one.loaded.answers, reference.loaded.answers)


def _with_accuracy(row: TargetRow, answers: _Answers | None, reference: _Answers | None) -> TargetRow:
    if answers is None:
        return row
    n = len(answers.hits)
    row = replace(row, accuracy=wilson(int(answers.hits.sum()), n), agreement_pct=answers.agreement_pct)
    if row.verdict == "reference" or reference is None or reference.evidence is not answers.evidence:
        return row  # a drop is that of answers to the same inputs
    lost, won = (reference.hits & ~answers.hits).sum(), (answers.hits & ~reference.hits).sum()
    drop, interval = paired_drop(int(lost), int(won), n)
    return replace(row, drop_pp=drop, drop_ci_pp=interval)


def _notes(rows: Sequence[TargetRow], loaded: Sequence[_Loaded]) -> tuple[str, ...]:
    notes: list[str] = []
    for batch, threads in dict.fromkeys((row.batch, row.threads) for row in rows):
        here = sorted(
            (row for row in rows if (row.batch, row.threads) == (batch, threads)), key=lambda row: row.latency_ms_p50
        )
        best = here[0]
        if len(here) > 1:
            notes.append(
                f"batch {batch}, {threads} thread(s): fastest is {best.target} {best.precision} on {best.runtime}, "
                f"{best.latency_ms_p50:.3g} ms"
            )
    notes += _slower_int8(rows)
    unread = () if any(row.energy_mj is not None for row in rows) else (NO_ENERGY,)
    return (*notes, *_reasons(rows, loaded), *unread)


def _slower_int8(rows: Sequence[TargetRow]) -> Iterator[str]:
    """INT8 that gains nothing over FP32 of the same target on the same runtime."""
    whole = {(r.target, r.runtime, r.batch, r.threads): r for r in rows if r.precision == "fp32"}
    for row in rows:
        plain = whole.get((row.target, row.runtime, row.batch, row.threads))
        if row.precision == "int8" and plain is not None and row.p50_ci_ms[0] > plain.p50_ci_ms[1]:
            yield (
                f"{row.target} on {row.runtime}, batch {row.batch}, {row.threads} thread(s): INT8 is slower than FP32 "
                f"({row.latency_ms_p50:.3g} ms against {plain.latency_ms_p50:.3g} ms): don't choose it there"
            )


def _reasons(rows: Sequence[TargetRow], loaded: Sequence[_Loaded]) -> Iterator[str]:
    """Why fewer MACs brought no speed, for FP32 ONNX files compared on one runtime."""
    plain = [one.entry for one in loaded if one.entry.file.kind == "onnx" and one.entry.file.precision == "fp32"]
    costs: dict[str, Traffic | None] = {
        entry.file.target: onnx_traffic(entry.file.path.read_bytes()) for entry in plain
    }
    for runtime in dict.fromkeys(entry.runtime for entry in plain):
        first, *others = (entry.file.target for entry in plain if entry.runtime == runtime)
        for other in others:
            yield from _reason((first, other), runtime, rows, costs)


def _reason(
    pair: tuple[str, str], runtime: str, rows: Sequence[TargetRow], costs: dict[str, Traffic | None]
) -> Iterator[str]:
    before, after = costs[pair[0]], costs[pair[1]]
    here = [row for row in rows if row.runtime == runtime and row.precision == "fp32"]
    for threads in dict.fromkeys(row.threads for row in here):
        medians = {(r.target, r.batch): r for r in here if r.threads == threads}
        batches = sorted(batch for target, batch in medians if target == pair[1] and (pair[0], batch) in medians)
        if not batches:
            continue
        smallest = medians[pair[1], batches[0]]
        times = {b: (medians[pair[0], b].latency_ms_p50, medians[pair[1], b].latency_ms_p50) for b in batches}
        why = why_no_speed(before, after, smallest.ratio, times) if before and after else None
        if why is not None:
            yield f"{pair[1]} on {runtime}, batch {batches[0]}, {threads} thread(s): {why}"
