"""Latencies of several models, called in turn, and whether two of them really differ."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from causal_compress.errors import DataError

Call = Callable[[], object]
SpeedVerdict = Literal["faster", "slower", "no difference"]

MARGIN = 0.03
"""A smaller difference counts as none: two loads of one file can differ by that much (where memory happens to lie)."""
_UNDISTURBED = 0.1
_MIN_ROUNDS = 10
_WARM_UP_ROUNDS = 5


@dataclass(frozen=True)
class Ratio:
    """Reference's latency over another's, with a 95 % interval; above 1 the other is faster."""

    value: float
    low: float
    high: float
    rounds: int

    @property
    def verdict(self) -> SpeedVerdict:
        """Faster or slower only if the whole interval lies beyond the margin."""
        return speed_verdict(self.low, self.high)


def speed_verdict(low: float, high: float) -> SpeedVerdict:
    """What an interval of a speed-up says.

    Args:
        low: Lower end, reference over other.
        high: Upper end.

    Returns:
        "faster" or "slower" (the other than the reference) if the interval lies wholly beyond 3 %; "no difference"
        otherwise, which means "none that this measurement shows".
    """
    if low > 1.0 + MARGIN:
        return "faster"
    return "slower" if high < 1.0 / (1.0 + MARGIN) else "no difference"


def time_in_turn(calls: Sequence[Call], *, repeats: int, seconds: float, seed: int = 0) -> list[NDArray[np.float64]]:
    """Call each in every round, in an order drawn anew for every two rounds and reversed in the second.

    So each follows each other, and itself, equally often; whatever drifts, drifts for all.

    Args:
        calls: What is timed, each without arguments.
        repeats: Rounds wanted.
        seconds: Time limit for each call; fewer rounds where it is reached, but at least 10.
        seed: Of the orders.

    Returns:
        Milliseconds, one array per call, one number per round; an even number of rounds.
    """
    order = np.random.default_rng(seed)
    taken: list[list[float]] = [[] for _ in calls]
    with no_garbage_collection():
        for _ in range(_WARM_UP_ROUNDS):
            for call in calls:
                call()
        end = time.perf_counter() + len(calls) * seconds
        while len(taken[0]) < max(repeats, _MIN_ROUNDS):
            forward = order.permutation(len(calls))
            for which in (*forward, *forward[::-1]):
                start = time.perf_counter_ns()
                calls[which]()
                taken[which].append((time.perf_counter_ns() - start) / 1e6)
            if len(taken[0]) >= _MIN_ROUNDS and time.perf_counter() > end:
                break
    return [np.asarray(column) for column in taken]


def compare_latencies(
    reference_ms: NDArray[np.float64], other_ms: NDArray[np.float64], *, resamples: int = 2000, seed: int = 0
) -> Ratio:
    """How much faster another model is than the reference, from interleaved rounds.

    The ratio is that of the 10th percentiles, the calls that nothing interrupted: on two cores of which one was kept
    busy, more than half of the calls were interrupted for a time slice, and ratios of medians went astray (1.0 to 2.5
    where 1.27 is true) while these stayed between 1.2 and 1.6. What interruptions cost is in p50 to p99. The interval
    comes from a circular block bootstrap over whole rounds: what disturbs a round disturbs both models, and a busy
    neighbour disturbs many rounds on end.

    Args:
        reference_ms: Milliseconds per round.
        other_ms: The same rounds.
        resamples: Bootstrap resamples.
        seed: Of the resamples.

    Returns:
        The ratio, its 95 % interval and the number of rounds.

    Raises:
        DataError: fewer than 4 rounds, unequal numbers of rounds, or a latency of 0.

    Source: Politis and Romano 1992, circular block bootstrap; block length of the order n^(1/3).
    Limits: says how two loaded models compare here and now; loading them again can move the ratio by a percent or two.
    """
    if reference_ms.shape != other_ms.shape or reference_ms.ndim != 1 or reference_ms.size < 4:
        raise DataError(
            "two latencies are compared over the same four or more rounds",
            found=f"shapes {reference_ms.shape} and {other_ms.shape}",
            remedy="measure more rounds: raise benchmark.repeats or benchmark.seconds",
        )
    if not (min(reference_ms.min(), other_ms.min()) > 0.0):
        raise DataError("a latency of 0 ms", remedy="raise --batch: one call is shorter than the clock can tell")
    drawn = _blocks(reference_ms.size, resamples, seed)
    ratios = np.quantile(reference_ms[drawn], _UNDISTURBED, axis=1) / np.quantile(other_ms[drawn], _UNDISTURBED, axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return Ratio(
        value=undisturbed(reference_ms) / undisturbed(other_ms),
        low=float(low),
        high=float(high),
        rounds=int(reference_ms.size),
    )


def undisturbed(taken_ms: NDArray[np.float64]) -> float:
    """The 10th percentile of latencies [ms]: calls that nothing interrupted."""
    return float(np.quantile(taken_ms, _UNDISTURBED))


def percentiles(
    taken_ms: NDArray[np.float64], *, resamples: int = 1000, seed: int = 0
) -> dict[int, tuple[float, tuple[float, float]]]:
    """p50, p95 and p99 of latencies, each with a 95 % interval by block bootstrap.

    Args:
        taken_ms: Milliseconds per round.
        resamples: Bootstrap resamples.
        seed: Of the resamples.

    Returns:
        Percentile -> value and interval [ms].

    Limits: with fewer than some 300 rounds the interval of p99 ends at the slowest round that was seen.
    """
    drawn = np.percentile(taken_ms[_blocks(taken_ms.size, resamples, seed)], (50, 95, 99), axis=1)
    lows, highs = np.percentile(drawn, (2.5, 97.5), axis=1)
    values = np.percentile(taken_ms, (50, 95, 99))
    return {
        which: (float(value), (float(low), float(high)))
        for which, value, low, high in zip((50, 95, 99), values, lows, highs, strict=True)
    }


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python's collector rests inside the block, so that its pauses fall into nobody's time.

    Yields:
        Nothing.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _blocks(n: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """Positions of circular blocks, resamples x n."""
    length = max(1, min(n // 4, round(2 * n ** (1 / 3))))
    count = -(-n // length)
    starts = np.random.default_rng(seed).integers(0, n, (resamples, count, 1))
    positions: NDArray[np.int64] = ((starts + np.arange(length)) % n).reshape(resamples, -1)[:, :n]
    return positions
