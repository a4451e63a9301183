"""Which precision a runtime should run: INT8 where it is measurably faster and accurate enough, FP32 otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from causal_compress.deploy.benchmark import Pair, time_interleaved
from causal_compress.deploy.runtimes import OnnxRuntime
from causal_compress.deploy.timing import compare_latencies, speed_verdict
from causal_compress.recipe import QuantizeSection
from causal_compress.results import Accuracy, Quantized, QuantizedFile

Times = tuple[NDArray[np.float64], NDArray[np.float64]]
Timer = Callable[[Path, Path, NDArray[np.float32], QuantizeSection], Times]


def choose(
    speedup: float, interval: tuple[float, float], *, within_budget: bool
) -> tuple[Literal["fp32", "int8"], str]:
    """Whether the measured runtime should run INT8.

    Args:
        speedup: FP32's latency over INT8's, as the scorecard compares them (`compare_latencies`).
        interval: Its 95 % interval; differences within 3 % count as none.
        within_budget: Whether the accuracy budget of quantization holds.

    Returns:
        The precision, and why in plain words.
    """
    low, high = interval
    verdict = speed_verdict(low, high)
    told = f"{speedup:.2f}x (95 % interval {low:.2f}x to {high:.2f}x)"
    if not within_budget:
        return "fp32", f"INT8 misses quantize.max_accuracy_drop on validation; its speed against FP32 is {told}"
    if verdict == "slower":
        return "fp32", f"INT8 is slower than FP32 on this machine: {told}"
    if verdict == "no difference":
        return (
            "fp32",
            f"INT8 is not measurably faster than FP32 on this machine: {told}; its file is smaller, if that counts",
        )
    return "int8", f"INT8 is faster than FP32 on this machine: {told}"


def chosen_within(quantized: Quantized, teacher: Accuracy, limit: float | None) -> Quantized:
    """The same, with FP32 chosen where INT8 is faster but only FP32 keeps the budget on accuracy.

    Args:
        quantized: The forms, and the choice by speed.
        teacher: The teacher's accuracy on the same validation inputs.
        limit: Largest drop of accuracy against the teacher [pp]; None: any.
    """
    file = next((file for file in quantized.files if file.family == "cpu"), None)
    if limit is None or file is None or quantized.chosen == "fp32":
        return quantized
    int8, fp32 = (round(teacher.pct - accuracy.pct, 9) for accuracy in (file.accuracy, quantized.fp32))
    lost = int8 > limit >= fp32
    told = f"{'but ' if lost else ''}it loses {int8:.2f} pp against the teacher on validation and FP32 {fp32:.2f}"
    reason = f"{quantized.reason}; {told}, with {limit:g} allowed (budget.max_accuracy_drop)"
    return replace(quantized, chosen="fp32" if lost else "int8", reason=reason)


def chosen_for_size(quantized: Quantized, limit: int | None) -> Quantized:
    """The same, with INT8 chosen where only that file is small enough for a budget, however fast it is.

    Args:
        quantized: The forms, and the choice by speed.
        limit: Largest file [bytes]; None: any.
    """
    file = next((file for file in quantized.files if file.family == "cpu" and file.within_budget), None)
    if limit is None or file is None or quantized.chosen == "int8":
        return quantized
    if not file.size_bytes <= limit < quantized.fp32_size_bytes:
        return quantized
    told = (
        f"only INT8 is small enough: {file.size_bytes:,} bytes, FP32 {quantized.fp32_size_bytes:,}, {limit:,} allowed"
    )
    return replace(quantized, chosen="int8", reason=f"{told}. {quantized.reason}")


def time_files(fp32: Path, int8: Path, x: NDArray[np.float32], section: QuantizeSection) -> Times:
    """Latencies of two ONNX files on ONNX Runtime, one thread, interleaved.

    Args:
        fp32: One file.
        int8: The other.
        x: The batch.
        section: Repeats and time limit.

    Returns:
        Milliseconds per round of each.
    """
    pair = Pair(
        runtime="onnxruntime", threads=1, teacher=OnnxRuntime.load(fp32, threads=1), student=OnnxRuntime.load(int8)
    )
    return time_interleaved(pair, x, repeats=section.repeats, seconds=section.seconds)


def time_and_choose(
    files: Sequence[QuantizedFile],
    onnx_path: Path,
    folder: Path,
    inputs: NDArray[np.float32],
    section: QuantizeSection,
    timer: Timer,
) -> dict[str, Any]:
    """Time the INT8 file for CPUs against FP32, and choose.

    Args:
        files: INT8 files.
        onnx_path: The FP32 file.
        folder: Where the INT8 files lie.
        inputs: Real inputs for the batch, repeated where they are too few.
        section: Batch, repeats and time limit.
        timer: What measures.

    Returns:
        The fields of `Quantized` that tell of speed and choice.
    """
    file = next((file for file in files if file.family == "cpu"), None)
    if file is None:
        nothing = dict.fromkeys(("runtime", "fp32_latency_ms_p50", "int8_latency_ms_p50", "speedup", "speedup_ci"))
        reason = "no INT8 file for CPUs was asked for, so nothing was timed; measure the TensorRT engine on its GPU"
        return {**nothing, "rounds": 0, "chosen": "fp32", "reason": reason}
    x = np.ascontiguousarray(inputs[np.arange(section.batch) % len(inputs)])
    fp32, int8 = timer(onnx_path, folder / file.onnx, x, section)
    ratio = compare_latencies(fp32, int8)
    interval = (ratio.low, ratio.high)
    chosen, reason = choose(ratio.value, interval, within_budget=file.within_budget)
    return {
        "runtime": OnnxRuntime.load(onnx_path).describe(),
        "fp32_latency_ms_p50": float(np.median(fp32)),
        "int8_latency_ms_p50": float(np.median(int8)),
        "speedup": ratio.value,
        "speedup_ci": interval,
        "rounds": len(fp32),
        "chosen": chosen,
        "reason": reason,
    }
