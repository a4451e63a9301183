"""Intervals for what was measured: accuracies, paired drops, ratios of latencies."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from causal_compress.errors import DataError
from causal_compress.results import Accuracy

_Z95 = NormalDist().inv_cdf(0.975)


def wilson(correct: int, n: int) -> Accuracy:
    """Accuracy [percent] with its 95 % Wilson score interval.

    Args:
        correct: Number of right answers.
        n: Number of answers.

    Returns:
        The share and its interval, in percent.

    Raises:
        DataError: no answers, or more right answers than answers.

    Source: Wilson 1927, as in scipy.stats.binomtest.
    Limits: the inputs are taken as independent draws; near-duplicates make the interval too narrow.
    """
    if n < 1 or not 0 <= correct <= n:
        raise DataError(
            "accuracy needs at least one answer, and no more right ones than answers",
            found=f"{correct} right of {n}",
            remedy="check that the split is not empty",
        )
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Accuracy(
        pct=100.0 * correct / n, n=n, low_pct=100.0 * float(interval.low), high_pct=100.0 * float(interval.high)
    )


def paired_drop(teacher_only: int, student_only: int, n: int) -> tuple[float, tuple[float, float]]:
    """Accuracy lost from teacher to student on the same inputs, with a 95 % paired interval [pp].

    Args:
        teacher_only: Inputs that only the teacher gets right.
        student_only: Inputs that only the student gets right.
        n: All inputs, those on which both agree included.

    Returns:
        The drop (positive: the student is worse) and its interval, in percentage points.

    Raises:
        DataError: counts that do not fit together.

    Source: Agresti and Min 2005, Statistics in Medicine 24:729-740: Wald after adding 0.5 to each of the four cells.
    Limits: the raw drop is not the middle of the interval, which is drawn a little towards 0.
    """
    if n < 1 or min(teacher_only, student_only) < 0 or teacher_only + student_only > n:
        raise DataError(
            "a paired drop needs discordant counts that fit into the number of inputs",
            found=f"{teacher_only} and {student_only} of {n}",
            remedy="check that the split is not empty",
        )
    difference, discordant, total = teacher_only - student_only, teacher_only + student_only + 1, n + 2
    centre = difference / total
    half = _Z95 * float(np.sqrt(discordant - difference**2 / total)) / total
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return 100.0 * difference / n, (100.0 * low, 100.0 * high)


def ratio_of_medians(
    numerator: NDArray[np.float64], denominator: NDArray[np.float64], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Ratio of two medians from paired rounds, with a 95 % bootstrap interval over rounds.

    Args:
        numerator: One positive number per round, any unit.
        denominator: The same rounds, the same unit.
        resamples: Bootstrap resamples; a resample draws whole rounds, so that what disturbs a round disturbs both.
        seed: Of the resamples.

    Returns:
        Unitless ratio and its percentile interval.

    Raises:
        DataError: fewer than two rounds, or unequal numbers of rounds.

    Limits: neighbouring rounds are not independent, so the interval speaks for this machine at this moment only.
    """
    if numerator.shape != denominator.shape or numerator.ndim != 1 or numerator.size < 2:
        raise DataError(
            "a ratio of medians needs the same two or more rounds on both sides",
            found=f"shapes {numerator.shape} and {denominator.shape}",
            remedy="measure at least two rounds",
        )
    rounds = np.random.default_rng(seed).integers(0, numerator.size, (resamples, numerator.size))
    ratios = np.median(numerator[rounds], axis=1) / np.median(denominator[rounds], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(np.median(numerator) / np.median(denominator)), (float(low), float(high))
