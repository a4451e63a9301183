"""Ranges of activations: one pass over calibration inputs, from which min-max, percentile and entropy are all read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from causal_compress.errors import DataError, NumericalError

Method = Literal["minmax", "percentile", "entropy"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy")

_HALF_BINS = 2048
_CANDIDATES = 64  # thresholds that the entropy method tries
_SAMPLE = 2**17  # values of one tensor and batch that enter the histogram; the extremes are exact over all values


@dataclass
class Histogram:
    """Values of one tensor over all calibration inputs: exact extremes, and counts on bins symmetric about 0.

    The bins reach from -limit to limit; where a value lies beyond, the limit is doubled and neighbours are added up,
    so no value is ever counted in the wrong bin.
    """

    low: float = 0.0
    high: float = 0.0
    limit: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2 * _HALF_BINS, np.int64))

    def add(self, values: NDArray[np.float32]) -> None:
        """Count one batch.

        Args:
            values: Any shape.

        Raises:
            NumericalError: NaN or infinity among them.
        """
        low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
        if not np.isfinite([low, high]).all():
            raise NumericalError(
                "an activation is not finite on calibration inputs",
                found=f"from {low} to {high}",
                remedy="look for overflow in the student: check data.normalize and the report's validation accuracy",
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._reach(max(-self.low, self.high))
        if self.limit > 0.0:
            flat = values.reshape(-1)
            sample = flat[:: _stride(flat.size)]
            places = ((sample / self.limit + 1.0) * _HALF_BINS).astype(np.int64)
            self.counts += np.bincount(np.clip(places, 0, 2 * _HALF_BINS - 1), minlength=2 * _HALF_BINS)

    def _reach(self, largest: float) -> None:
        if self.limit == 0.0 and largest > 0.0:  # what was counted so far was all zero
            self.limit = largest
        while self.limit < largest:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.pad(pairs, _HALF_BINS // 2)
            self.limit *= 2.0


def _stride(size: int) -> int:
    """Step of a sample that no axis of the tensor shares a factor with, so that all columns and channels are met."""
    step = max(1, size // _SAMPLE)
    while math.gcd(step, size) > 1:
        step += 1
    return step


def collect(model: Any, batches: Iterable[NDArray[np.float32]], *, threads: int = 1) -> dict[str, Histogram]:
    """Run the model once over calibration inputs and count the values of every float tensor.

    Args:
        model: onnx.ModelProto in FP32 with one input.
        batches: N x ..., normalised.
        threads: Threads inside an operator.

    Returns:
        Tensor name -> histogram; the input and everything that a node puts out.

    Raises:
        DataError: no inputs.
        NumericalError: NaN or infinity in an activation.
    """
    entry = model.graph.input[0].name
    names = sorted({name for node in model.graph.node for name in node.output if name})
    run = open_outputs(model, names, threads=threads)
    found: dict[str, Histogram] = {}
    for x in batches:
        for name, values in zip((entry, *names), (x, *run(x)), strict=True):
            if values.dtype == np.float32 and values.size:
                found.setdefault(name, Histogram()).add(values)
    if not found:
        raise DataError("no inputs to calibrate on", remedy="set data.calibration to 1 or more")
    return found


def open_outputs(model: Any, names: Sequence[str], *, threads: int) -> Any:
    """A function that puts out the named tensors of a model instead of its outputs.

    Args:
        model: onnx.ModelProto; left as it was.
        names: Tensors.
        threads: Threads inside an operator.

    Returns:
        Callable: one batch in, a list of arrays out, in the order of the names.
    """
    import onnx
    import onnxruntime

    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    del seen.graph.output[:]
    seen.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(seen.SerializeToString(), options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0].name
    return lambda x: session.run(list(names), {entry: x})


def activation_range(histogram: Histogram, method: Method, *, percentile: float, levels: int) -> tuple[float, float]:
    """The range onto which a tensor's values are rounded; what lies beyond is clipped.

    Args:
        histogram: Of the tensor.
        method: minmax clips nothing; percentile clips the rarest values, half on each side; entropy takes the symmetric
            threshold whose rounded distribution is nearest in KL.
        percentile: Share of values kept by the percentile method [percent].
        levels: Steps on one side of 0 that the integers offer: 128 for signed, 256 for unsigned values.

    Returns:
        Lower and upper end; lower <= 0 <= upper.

    Source: entropy: Migacz 2017, "8-bit inference with TensorRT", GTC S7310; zeros left out as in NVIDIA's
        pytorch-quantization.
    """
    match method:
        case "minmax":
            return histogram.low, histogram.high
        case "percentile":
            return _percentile_range(histogram, percentile)
        case "entropy":
            limit = entropy_threshold(_magnitudes(histogram), levels) / _HALF_BINS * histogram.limit
            return max(histogram.low, -limit), min(histogram.high, limit)


def entropy_threshold(counts: Int[NDArray[np.int64], bins], levels: int) -> int:
    """The number of bins to keep so that rounding them to `levels` steps loses least information.

    Args:
        counts: Histogram of magnitudes, from 0 up.
        levels: Steps.

    Returns:
        Bins, from `levels` to the index of the last one that is not empty.
    """
    from scipy.special import rel_entr

    last = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
    if last <= levels:
        return last
    # Zero is a step of its own, so the many zeros behind a ReLU lose nothing; counted, they would outweigh all else.
    counts = np.concatenate([counts[1:2], counts[1:]])
    best, least = last, np.inf
    for kept in np.unique(np.linspace(levels, last, _CANDIDATES).astype(int)):
        wanted = counts[:kept].astype(np.float64)
        rounded = _rounded(wanted, levels)
        wanted[-1] += counts[kept:].sum()
        # A bin that only holds what was clipped would otherwise make the divergence infinite.
        rounded = np.maximum(rounded, 1e-4 * (wanted > 0))
        loss = float(rel_entr(wanted / wanted.sum(), rounded / rounded.sum()).sum())
        if loss <= least:  # of equals the widest
            best, least = int(kept), loss
    return best


def _rounded(counts: Float[NDArray[np.float64], bins], levels: int) -> Float[NDArray[np.float64], bins]:
    """The distribution after rounding: every step's counts spread evenly over its bins that are not empty."""
    step = np.arange(len(counts)) * levels // len(counts)
    occupied = (counts > 0).astype(np.float64)
    total, places = np.bincount(step, counts, levels), np.bincount(step, occupied, levels)
    spread: NDArray[np.float64] = occupied * (total / np.maximum(places, 1))[step]
    return spread


def _magnitudes(histogram: Histogram) -> NDArray[np.int64]:
    below, above = histogram.counts[:_HALF_BINS], histogram.counts[_HALF_BINS:]
    folded: NDArray[np.int64] = below[::-1] + above
    return folded


def _percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    total = histogram.counts.sum()
    if total == 0:
        return histogram.low, histogram.high
    cut = (100.0 - percentile) / 200.0 * total
    below = np.cumsum(histogram.counts)
    first = int(np.searchsorted(below, cut, side="right"))
    last = int(np.searchsorted(below, total - cut, side="left"))
    low, high = (histogram.limit * (place / _HALF_BINS - 1.0) for place in (first, last + 1))
    return min(0.0, max(histogram.low, low)), max(0.0, min(histogram.high, high))
