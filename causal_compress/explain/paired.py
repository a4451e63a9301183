"""Two classifiers on the same inputs: what each answered, and the statistics of where they differ. Numerics only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from causal_compress.errors import DataError, NumericalError
from causal_compress.results import Compared, Estimate, FlipPath, Flips, GroupChange, Quality
from causal_compress.understand.statistics import paired_drop, wilson

Numbers = NDArray[np.float64]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]

ECE_BINS = 15
_MOST_PATHS = 10


@dataclass(frozen=True)
class Answers:
    """One classifier's answers, one entry for each input; what it said of the others is not kept."""

    predicted: Rows
    confidence: Numbers
    nll: Numbers
    brier: Numbers

    def right(self, labels: Rows) -> Mask:
        """Which answers are right."""
        correct: Mask = self.predicted == labels
        return correct


@dataclass(frozen=True)
class Pair:
    """Both classifiers' answers to the same inputs; `divergence` is KL(teacher || student) of each input [nats]."""

    labels: Rows
    teacher: Answers
    student: Answers
    divergence: Numbers

    def compared(self, rows: Rows | None = None) -> Compared:
        """Accuracies and paired drop over some inputs; None: over all."""
        chosen = slice(None) if rows is None else rows
        labels = self.labels[chosen]
        return compare(self.teacher.predicted[chosen] == labels, self.student.predicted[chosen] == labels)


def answer_both(teacher: nn.Module, student: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Pair:
    """Run both classifiers over the same batches; a few numbers for each input are kept.

    Args:
        teacher: Classifier in evaluation mode.
        student: The other one.
        batches: Inputs and labels.

    Raises:
        DataError: no inputs.
        NumericalError: NaN or infinity among the logits.
    """
    labels: list[Tensor] = []
    told: list[Tensor] = []
    with torch.inference_mode():
        for x, y in batches:
            before, after = (
                _log_probabilities(model, x, name) for model, name in ((teacher, "teacher"), (student, "student"))
            )
            divergence = (before.exp() * (before - after)).sum(1).clamp_min(0)
            told.append(torch.cat([_told(before, y), _told(after, y), divergence[None]]))
            labels.append(y)
    if not labels:
        raise DataError("there is nothing to audit", found="a split without inputs", remedy="give more data")
    rows = torch.cat(told, 1).numpy()
    return Pair(torch.cat(labels).numpy(), _answers(rows[:4]), _answers(rows[4:8]), rows[8])


def _log_probabilities(model: nn.Module, x: Tensor, name: str) -> Tensor:
    logits = model(x)
    if not torch.isfinite(logits).all():
        raise NumericalError(
            f"the {name}'s logits are not finite", found="NaN or infinity", remedy="check the weights and the inputs"
        )
    return F.log_softmax(logits.double(), 1)


def _told(log_p: Tensor, labels: Tensor) -> Tensor:
    """Answer, confidence, NLL and Brier score of each input: four rows."""
    p = log_p.exp()
    confidence, predicted = p.max(1)
    brier = (p - F.one_hot(labels, p.shape[1])).square().sum(1)
    nll = -log_p.gather(1, labels[:, None])[:, 0]
    return torch.stack([predicted.double(), confidence, nll, brier])


def _answers(rows: Numbers) -> Answers:
    return Answers(rows[0].astype(np.int64), rows[1], rows[2], rows[3])


def compare(teacher_right: Mask, student_right: Mask) -> Compared:
    """Accuracies with Wilson intervals, the paired drop, and McNemar's exact test.

    Args:
        teacher_right: One entry for each input.
        student_right: The same inputs.

    Source: McNemar 1947; exact: the discordant inputs are tosses of a fair coin. p = 1 where there are none.
    """
    from scipy.stats import binomtest

    n = len(teacher_right)
    lost, gained = int((teacher_right & ~student_right).sum()), int((~teacher_right & student_right).sum())
    drop, interval = paired_drop(lost, gained, n)
    return Compared(
        teacher=wilson(int(teacher_right.sum()), n),
        student=wilson(int(student_right.sum()), n),
        drop_pp=drop,
        drop_ci_pp=interval,
        teacher_only=lost,
        student_only=gained,
        p_value=float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, so that the chance of any false alarm stays below the level.

    Args:
        p_values: Of a family of tests.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65-70.
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(factors * np.asarray(p_values, dtype=float)[order]))
    return [float(value) for value in corrected]


def by_group(pair: Pair, groups: Sequence[tuple[str, Rows]]) -> tuple[GroupChange, ...]:
    """The change in each group of inputs, with Holm's correction over the groups.

    Args:
        pair: Both classifiers' answers.
        groups: Name and inputs of each; none empty.
    """
    compared = [pair.compared(rows) for _, rows in groups]
    corrected = holm([one.p_value for one in compared])
    return tuple(
        GroupChange(name=name, compared=one, p_holm=p)
        for (name, _), one, p in zip(groups, compared, corrected, strict=True)
    )


def flips(pair: Pair, classes: Sequence[str]) -> Flips:
    """How answers changed, both ways, and the commonest ways in which they did."""
    before, after = pair.teacher.predicted, pair.student.predicted
    was, still = pair.teacher.right(pair.labels), pair.student.right(pair.labels)
    same = before == after
    parted = np.flatnonzero(~same)
    triples = zip(pair.labels[parted].tolist(), before[parted].tolist(), after[parted].tolist(), strict=True)
    paths = sorted(Counter(triples).items(), key=lambda item: (-item[1], item[0]))[:_MOST_PATHS]
    return Flips(
        n=len(same),
        both_right=int((was & still).sum()),
        right_to_wrong=int((was & ~still).sum()),
        wrong_to_right=int((~was & still).sum()),
        wrong_to_other_wrong=int((~was & ~still & ~same).sum()),
        same_wrong=int((~was & same).sum()),
        agreement=wilson(int(same.sum()), len(same)),
        commonest=tuple(
            FlipPath(true_class=classes[y], teacher_class=classes[a], student_class=classes[b], count=count)
            for (y, a, b), count in paths
        ),
    )


def calibration_error(confidence: Numbers, right: Mask, bins: int = ECE_BINS) -> float:
    """Expected calibration error: how far confidence is from accuracy, averaged over bins of equally many inputs.

    Args:
        confidence: Probability of the own answer, 0 to 1.
        right: Whether it was right.
        bins: Of equal mass; fewer where there are fewer inputs.

    Returns:
        0 (calibrated) to 1.

    Source: Naeini et al. 2015; equal mass as in Nixon et al. 2019, arXiv:1904.01685.
    Limits: above 0 even for a calibrated classifier, the more so the fewer inputs; compare, do not read alone.
    """
    order = np.argsort(confidence, kind="stable")
    _, equal = np.unique(confidence, return_inverse=True)
    # where confidences tie, no order of the inputs is right: each counts as its tie's mean
    accuracy = (np.bincount(equal, weights=right) / np.bincount(equal))[equal]
    parts = np.array_split(np.stack([confidence[order], accuracy[order]]), min(bins, len(order)), axis=1)
    return float(sum(abs(float((part[0] - part[1]).sum())) for part in parts) / len(order))


def quality(pair: Pair, resamples: int, seed: int) -> tuple[Quality, ...]:
    """ECE, overconfidence, NLL and Brier score of both; but for the ECE student minus teacher with a paired interval.

    Limits: too sure in some places and too unsure in others can leave no overconfidence; the ECE sees both, but its
        change has no interval: resampling raises it, so the bootstrap misses the true change.
    """
    was, still = pair.teacher.right(pair.labels), pair.student.right(pair.labels)
    unit = f"share, {ECE_BINS} bins of equal mass, largest probability"
    before, after = calibration_error(pair.teacher.confidence, was), calibration_error(pair.student.confidence, still)
    found = [Quality(measure="ece", unit=unit, teacher=before, student=after, change=None)]
    too_sure = (pair.teacher.confidence - was, pair.student.confidence - still)
    measured: tuple[tuple[Literal["overconfidence", "nll", "brier"], str, Numbers, Numbers], ...] = (
        ("overconfidence", "mean confidence minus accuracy, share", *too_sure),
        ("nll", "nats an input", pair.teacher.nll, pair.student.nll),
        ("brier", "squared error summed over classes, 0 to 2", pair.teacher.brier, pair.student.brier),
    )
    for measure, unit, first, second in measured:
        change = mean_interval(second - first, resamples, seed)
        before, after = float(first.mean()), float(second.mean())
        found.append(Quality(measure=measure, unit=unit, teacher=before, student=after, change=change))
    return tuple(found)


def paired_interval(statistic: Callable[[Rows], float], n: int, resamples: int, seed: int) -> Estimate:
    """A statistic over inputs with its 95 % percentile bootstrap interval.

    Args:
        statistic: Takes positions of inputs (with repetitions), gives one number; whole inputs are drawn, so what is
            paired over inputs stays paired.
        n: Number of inputs.
        resamples: Bootstrap resamples.
        seed: Of the draws.

    Returns:
        The estimate; the ends are NaN for fewer than two inputs, which say nothing about others.

    Limits: inputs are taken as independent draws; percentile intervals are a little narrow below some 30 inputs.
    """
    if n < 2:
        return Estimate(value=statistic(np.arange(n)), low=float("nan"), high=float("nan"), n=n)
    generator = np.random.default_rng(seed)
    drawn = [statistic(generator.integers(0, n, n)) for _ in range(resamples)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Estimate(value=statistic(np.arange(n)), low=float(low), high=float(high), n=n)


def mean_interval(values: Numbers, resamples: int, seed: int) -> Estimate:
    """The mean of one number for each input, with its 95 % bootstrap interval."""
    return paired_interval(lambda rows: float(values[rows].mean()), len(values), resamples, seed)
