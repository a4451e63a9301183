"""The few figures that stand at the top of the report: before, after, what that means, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from causal_compress.explain import drawings, formats
from causal_compress.results import Accuracy, Scorecard, ScoreRow


@dataclass(frozen=True)
class Headline:
    """One headline figure."""

    name: str
    before: str
    after: str
    change: str
    sure: str


@dataclass(frozen=True)
class Amounts:
    """What teacher (first) and student (second) need, where no scorecard tells; `int8`: the student's form."""

    macs: tuple[int, int]
    params: tuple[int, int]
    size_bytes: tuple[int, int]
    int8: bool = False


def headline(
    scorecard: Scorecard | None, validation: tuple[Accuracy, Accuracy], amounts: Amounts
) -> tuple[Headline, ...]:
    """Accuracy, latency where it was measured, work, parameters and file size.

    Args:
        scorecard: What was measured on the test data; None: nothing.
        validation: Teacher's and student's accuracy on validation data, for want of a scorecard.
        amounts: What they need, for want of a scorecard.
    """
    pair = used_rows(scorecard)
    if pair is None:
        return (_validation_line(*validation), *_amount_lines(amounts))
    before, after = pair
    measured = Amounts(
        (amounts.macs[0], after.macs),
        (amounts.params[0], after.params),
        (before.size_bytes, after.size_bytes),
        after.precision == "int8",
    )
    return (_accuracy_line(before, after), _latency_line(before, after), *_amount_lines(measured))


def used_rows(scorecard: Scorecard | None) -> tuple[ScoreRow, ScoreRow] | None:
    """Teacher and student where they will be used: a deployment runtime rather than torch, one input at a time, and
    INT8 where there is such a row, since it is measured only where it was chosen.
    """
    rows = sorted(
        scorecard.rows if scorecard else (),
        key=lambda r: (r.runtime == "torch", r.batch, r.threads, r.precision != "int8", r.latency_ms_p50),
    )
    for student in (r for r in rows if r.model == "student"):
        teacher = _beside(student, rows)
        if teacher:
            return teacher, student
    return None


def _beside(student: ScoreRow, rows: Sequence[ScoreRow]) -> ScoreRow | None:
    place = (student.runtime, student.batch, student.threads)
    teachers = (r for r in rows if r.model == "teacher" and place == (r.runtime, r.batch, r.threads))
    return next(teachers, None)


def _amount_lines(amounts: Amounts) -> tuple[Headline, ...]:
    return (
        _ratio_line("Work per input (MACs)", amounts.macs, "", "exact count"),
        _ratio_line("Parameters", amounts.params, "", "exact count"),
        _ratio_line("File size (INT8)" if amounts.int8 else "File size", amounts.size_bytes, "B", "exact size"),
    )


def _validation_line(before: Accuracy, after: Accuracy) -> Headline:
    change = f"{formats.signed(after.pct - before.pct)} points"
    low, high = formats.fixed(after.low_pct), formats.fixed(after.high_pct)
    return Headline(
        name="Accuracy (validation)",
        before=formats.pct(before.pct),
        after=formats.pct(after.pct),
        change=change,
        sure=f"student 95 % interval {low} to {high} %, n = {after.n:,}",
    )


def _accuracy_line(before: ScoreRow, after: ScoreRow) -> Headline:
    return Headline(
        name="Accuracy",
        before=formats.pct(before.accuracy_pct),
        after=formats.pct(after.accuracy_pct),
        change=f"{formats.signed(-after.drop_pp)} points",
        sure=f"95 % interval {formats.opposite(*after.drop_ci_pp)}, n = {after.n:,}",
    )


def _ratio_line(name: str, amounts: tuple[int, int], unit: str, sure: str) -> Headline:
    before, after = amounts
    change = f"{formats.times(after / before)} of the teacher" if before else formats.MISSING
    return Headline(name, formats.scaled(before, unit), formats.scaled(after, unit), change, sure)


def _latency_line(before: ScoreRow, after: ScoreRow) -> Headline:
    interval = f"95 % interval {formats.interval(*after.speedup_ci)}"
    speed = drawings.speed_in_words(after)
    setting = drawings.setting_name(after.runtime, after.batch, after.threads)
    return Headline(
        name=f"Latency ({setting}{', INT8' if after.precision == 'int8' else ''})",
        before=formats.ms(before.latency_ms_p50),
        after=formats.ms(after.latency_ms_p50),
        change=speed,
        sure=interval if "fast" in speed else f"speed-up {formats.times(after.speedup)}, {interval}",
    )
