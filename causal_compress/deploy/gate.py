"""The gate of a continuous integration: does a measured student satisfy limits on drop and speed-up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from causal_compress.errors import UsageError
from causal_compress.results import Gated, Scorecard, ScoreRow, Verdict

_ORDER: tuple[Verdict, ...] = ("FAIL", "INCONCLUSIVE", "PASS")


@dataclass(frozen=True)
class Limits:
    """What a student must satisfy, and where: `max_drop_pp` [percentage points], `min_speedup` over the teacher.
    Without a precision it is the form that was chosen: INT8 where it was measured, FP32 otherwise.
    """

    max_drop_pp: float | None = None
    min_speedup: float | None = None
    runtime: str = "onnxruntime"
    precision: str | None = None
    batch: int = 1
    threads: int = 1


def judge(scorecard: Scorecard, limits: Limits) -> Gated:
    """Compare one row of a scorecard with limits; a whole 95 % interval has to lie on the right side of each.

    Args:
        scorecard: Of a finished run.
        limits: At least one of the two.

    Returns:
        FAIL if an interval lies wholly beyond its limit, INCONCLUSIVE if one contains its limit, PASS otherwise.

    Raises:
        UsageError: no limit was given, or the scorecard has no such row.

    Limits: a scorecard from another machine judges that machine; measure on the target before speed is gated.
    """
    if limits.max_drop_pp is None and limits.min_speedup is None:
        raise UsageError("the gate has nothing to judge", remedy="give --max-drop 0.5, --min-speedup 1.5 or both")
    row = _row(scorecard, limits)
    judged = [*_judge_drop(row, limits), *_judge_speed(row, limits)]
    verdict = min((outcome for outcome, _ in judged), key=_ORDER.index)
    reasons = tuple(reason for _, reason in judged)
    where = f"{row.runtime} {row.precision}, batch {row.batch}, {row.threads} thread(s)"
    return Gated(
        verdict=verdict,
        text=f"{verdict} on {where}: {'; '.join(reasons)}",
        reasons=reasons,
        runtime=row.runtime,
        precision=row.precision,
        batch=row.batch,
        threads=row.threads,
    )


def _judge_drop(row: ScoreRow, limits: Limits) -> Iterator[tuple[Verdict, str]]:
    limit = limits.max_drop_pp
    if limit is None:
        return
    low, high = row.drop_ci_pp
    text = f"drop {row.drop_pp:.2f} pp (95 % interval {low:.2f} to {high:.2f}, n = {row.n:,}), limit {limit:g}"
    outcome: Verdict = "PASS" if high <= limit else "FAIL" if low > limit else "INCONCLUSIVE"
    yield outcome, text + ("" if outcome == "PASS" else _WHY[outcome].format("more test inputs would settle it"))


def _judge_speed(row: ScoreRow, limits: Limits) -> Iterator[tuple[Verdict, str]]:
    limit = limits.min_speedup
    if limit is None:
        return
    low, high = row.speedup_ci
    text = f"speed-up {row.speedup:.2f}x (95 % interval {low:.2f} to {high:.2f}, {row.rounds} rounds), limit {limit:g}x"
    outcome: Verdict = "PASS" if low >= limit else "FAIL" if high < limit else "INCONCLUSIVE"
    yield outcome, text + ("" if outcome == "PASS" else _WHY[outcome].format("more rounds would settle it"))


_WHY: dict[Verdict, str] = {"FAIL": ": missed", "INCONCLUSIVE": ": the interval contains the limit, {}"}


def _row(scorecard: Scorecard, limits: Limits) -> ScoreRow:
    students = [row for row in scorecard.rows if row.model == "student"]
    precisions = (limits.precision,) if limits.precision else ("int8", "fp32")  # INT8 is measured only where chosen
    for precision in precisions:
        wanted = (limits.runtime, precision, limits.batch, limits.threads)
        for row in students:
            if (row.runtime, row.precision, row.batch, row.threads) == wanted:
                return row
    there = {(row.runtime, row.precision, row.batch, row.threads) for row in students}
    listed = [
        f"{runtime} {precision}, batch {batch}, threads {threads}" for runtime, precision, batch, threads in there
    ]
    raise UsageError(
        "the scorecard has no such measurement: {} {}, batch {}, threads {}".format(*wanted),
        found="; ".join(sorted(listed)) or "nothing was measured (benchmark: null)",
        remedy="choose with --runtime, --precision, --batch and --threads, or set these in the run's benchmark section",
    )
