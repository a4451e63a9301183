"""The scorecard: does the result satisfy the budget, what must a reader know, and its forms as CSV and Markdown."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Literal

from causal_compress.deploy.timing import MARGIN, speed_verdict
from causal_compress.recipe import BudgetSection, LatencySection
from causal_compress.results import Scorecard, ScoreRow, TeacherScore, Verdict
from causal_compress.understand.statistics import wilson

_SHORTFALL = 0.75  # a speed-up below this share of the fall in MACs is worth a note
_DISAGREEMENT_PP = 0.1
_MEMORY_PP = 1.0
_ORDER: tuple[Verdict, ...] = ("FAIL", "INCONCLUSIVE", "PASS")


def verdict(rows: Sequence[ScoreRow], budget: BudgetSection) -> tuple[Verdict, tuple[str, ...]]:
    """Judge measured rows against the budget.

    Args:
        rows: Teacher and student rows of one benchmark.
        budget: Largest shares of MACs, parameters and latency, largest file, largest drop of accuracy.

    Returns:
        FAIL if a cost is missed or the whole 95 % interval of the drop lies above the limit; INCONCLUSIVE if the
        interval contains the limit; PASS otherwise. Reasons in plain words. Of the drops, which are judged row by row,
        the worst verdict counts; latency and file are those of the INT8 row where there is one, since only a form that
        was chosen is measured.
    """
    judged = [*_judge_costs(rows, budget), *_judge_drop(rows, budget)]
    if not judged:
        return "PASS", ("no budget was set",)
    return min((outcome for outcome, _ in judged), key=_ORDER.index), tuple(reason for _, reason in judged)


def measured_notes(rows: Sequence[ScoreRow]) -> tuple[str, ...]:
    """What a reader must know about the numbers: noise, speed that falls short of MACs, runtimes that disagree.

    Args:
        rows: Teacher and student rows of one benchmark.

    Returns:
        Sentences; empty if there is nothing to say.
    """
    notes: list[str] = []
    for _, student in _pairs(rows):
        notes += _speed_notes(student)
    notes += _shortfalls(rows)
    notes += _disagreements(rows)
    if any(row.peak_memory_bytes is None for row in rows):
        notes.append("peak memory could not be measured everywhere: the separate process failed")
    return tuple(notes)


def seen_in_training(teacher: TeacherScore, scorecard: Scorecard) -> str | None:
    """A warning where the teacher's validation accuracy is too good for its test accuracy, or None.

    A checkpoint from elsewhere was often trained on all training data, the validation inputs among them. They then say
    little about a drop.

    Args:
        teacher: As scored on the validation split.
        scorecard: As measured on the test split.
    """
    rows = [row for row in scorecard.rows if row.model == "teacher"]
    if not rows:
        return None
    test = wilson(round(rows[0].accuracy_pct * rows[0].n / 100), rows[0].n)
    if teacher.accuracy.low_pct <= test.high_pct + _MEMORY_PP:
        return None
    return (
        f"the teacher is right on {teacher.accuracy.pct:.1f} % of the validation inputs and on {test.pct:.1f} % of the "
        "test inputs: it was probably trained on the former, so validation accuracies flatter (set "
        "data.validation_from: test)"
    )


def scorecard_csv(scorecard: Scorecard) -> str:
    """One line per row; the columns of ScoreRow, intervals as two columns each.

    Args:
        scorecard: Result of the benchmark.

    Returns:
        CSV with a header line.
    """
    table = [_flat(row) for row in scorecard.rows]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, fieldnames=list(table[0]) if table else [field.name for field in _fields()], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def scorecard_markdown(scorecard: Scorecard) -> str:
    """Verdict, reasons, a table for people, and notes.

    Args:
        scorecard: Result of the benchmark.

    Returns:
        Markdown text.
    """
    lines = [f"**{scorecard.verdict}**", "", *(f"- {reason}" for reason in scorecard.reasons), ""]
    titles, aligns = zip(*_COLUMNS, strict=True)
    lines += [f"| {' | '.join(titles)} |", f"|{'|'.join(aligns)}|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in scorecard.rows]
    if any(row.model == "student" for row in scorecard.rows):
        lines += ["", "Brackets: 95 % intervals; drop paired over inputs, speed-up over interleaved rounds."]
    lines += ["", *(f"- note: {note}" for note in scorecard.notes)] if scorecard.notes else []
    lines += ["", f"Measured on: {'; '.join(scorecard.runtimes)}."] if scorecard.runtimes else []
    return "\n".join(lines) + "\n"


_Judged = tuple[Verdict, str]


def _judge_costs(rows: Sequence[ScoreRow], budget: BudgetSection) -> Iterator[_Judged]:
    teacher, student = _first(rows, "teacher"), _first(rows, "student")
    if budget.macs is not None:
        yield _judge_share("MACs", student.macs, teacher.macs, budget.macs)
    if budget.params is not None:
        yield _judge_share("parameters", student.params, teacher.params, budget.params)
    if budget.size_bytes is not None:
        yield _judge_size(rows, budget.size_bytes)
    if budget.latency_ms is not None:
        yield _judge_latency(rows, budget.latency_ms)


def _judge_size(rows: Sequence[ScoreRow], limit: int) -> _Judged:
    files = [row for row in rows if row.model == "student" and row.runtime == "onnxruntime"]
    if not files:
        return "INCONCLUSIVE", "the ONNX file was not measured: add onnxruntime to benchmark.runtimes"
    student = max(files, key=lambda row: row.precision == "int8")
    text = f"the ONNX file ({student.precision}) has {student.size_bytes:,} bytes; the budget allows {limit:,}"
    return ("PASS", text) if student.size_bytes <= limit else ("FAIL", text + ": missed")


def _judge_latency(rows: Sequence[ScoreRow], limit: LatencySection) -> _Judged:
    wanted = (limit.runtime, limit.batch, limit.threads)
    there = [student for _, student in _pairs(rows) if (student.runtime, student.batch, student.threads) == wanted]
    if not there:
        where = f"{limit.runtime}, batch {limit.batch}, {limit.threads} thread(s)"
        return "INCONCLUSIVE", f"the latency on {where} was not measured: add it to the benchmark section"
    student = max(there, key=lambda row: row.precision == "int8")
    share = 1.0 / student.speedup
    low, high = (1.0 / speedup for speedup in reversed(student.speedup_ci))
    text = (
        f"{share:.3f} of the teacher's latency kept on {_where(student)} (95 % interval {low:.3f} to {high:.3f}); "
        f"the budget allows {limit.keep:g}"
    )
    if high <= limit.keep:
        return "PASS", text
    if low > limit.keep:
        return "FAIL", text + ": missed"
    return "INCONCLUSIVE", text + ": the interval contains the limit"


def _judge_share(what: str, kept: int, whole: int, limit: float) -> _Judged:
    share = kept / whole if whole else 0.0
    met = kept <= limit * whole
    # One digit more than the limit needs, so that a near miss does not read as met.
    told = f"{share:.4f}" if share >= 0.01 or share == 0 else f"{share:.3g}"
    text = f"{told} of the teacher's {what} kept ({kept:,} of {whole:,}); the budget allows {limit:g}"
    return ("PASS", text) if met else ("FAIL", text + ": missed")


def _judge_drop(rows: Sequence[ScoreRow], budget: BudgetSection) -> Iterator[_Judged]:
    limit = budget.max_accuracy_drop
    if limit is None:
        return
    students = [row for row in rows if row.model == "student"]
    # A smaller drop may have the wider interval, and contain the limit where the largest drop does not.
    worst = min(students, key=lambda row: (_ORDER.index(_drop_verdict(row, limit)), -row.drop_pp, -row.drop_ci_pp[1]))
    low, high = worst.drop_ci_pp
    text = (
        f"drop of accuracy {worst.drop_pp:.2f} pp on {worst.runtime} {worst.precision} "
        f"(95 % interval {low:.2f} to {high:.2f}, n = {worst.n:,}); the budget allows {limit:g} pp"
    )
    outcome = _drop_verdict(worst, limit)
    yield outcome, text + _WHY[outcome]


def _drop_verdict(row: ScoreRow, limit: float) -> Verdict:
    low, high = row.drop_ci_pp
    return "PASS" if high <= limit else "FAIL" if low > limit else "INCONCLUSIVE"


_WHY: dict[Verdict, str] = {
    "PASS": "",
    "FAIL": ": missed",
    "INCONCLUSIVE": ": the interval contains the limit, more test inputs would settle it",
}


def _speed_notes(student: ScoreRow) -> Iterator[str]:
    low, high = student.speedup_ci
    interval = f"95 % interval {low:.2f}x to {high:.2f}x over {student.rounds} rounds"
    where = _where(student)
    told = speed_verdict(low, high)
    if told == "no difference":
        margin = f"what may be within {100 * MARGIN:g} % counts as none"
        yield f"{where}: no difference in latency: {student.speedup:.2f}x ({interval}; {margin})"
    elif told == "slower":
        yield f"{where}: the student is slower than the teacher: {student.speedup:.2f}x ({interval})"


def _shortfalls(rows: Sequence[ScoreRow]) -> Iterator[str]:
    """One note for all places where latency fell by much less than MACs."""
    falls = [(student, teacher.macs / student.macs) for teacher, student in _pairs(rows) if student.macs]
    short = [(row, fall) for row, fall in falls if fall > 1.0 and row.speedup_ci[1] < _SHORTFALL * fall]
    if short:
        listed = "; ".join(f"{row.speedup:.2f}x on {_where(row)}" for row, _ in short)
        yield (
            f"MACs fell {short[0][1]:.1f}x, latency {listed}: MACs are not speed (a budget.latency_ms plans for it; "
            "plan.align: cpu helps, and plan.low_rank: false, since split layers are more operators)"
        )


def _where(row: ScoreRow) -> str:
    return f"{row.runtime} {row.precision}, batch {row.batch}, {row.threads} thread(s)"


def _disagreements(rows: Sequence[ScoreRow]) -> Iterator[str]:
    # INT8 may well answer otherwise than FP32: only rows of one precision are runtimes that should agree.
    for model, precision in dict.fromkeys((row.model, row.precision) for row in rows):
        alike = [row for row in rows if (row.model, row.precision) == (model, precision)]
        found = {row.runtime: row.accuracy_pct for row in alike}
        if max(found.values()) - min(found.values()) > _DISAGREEMENT_PP:
            listed = ", ".join(f"{accuracy:.2f} % on {runtime}" for runtime, accuracy in found.items())
            yield f"the runtimes disagree on the {model}'s {precision} accuracy: {listed}"


def _pairs(rows: Sequence[ScoreRow]) -> Iterator[tuple[ScoreRow, ScoreRow]]:
    teachers = {(row.runtime, row.batch, row.threads): row for row in rows if row.model == "teacher"}
    for row in rows:
        teacher = teachers.get((row.runtime, row.batch, row.threads))
        if row.model == "student" and teacher is not None:
            yield teacher, row


def _first(rows: Sequence[ScoreRow], model: Literal["teacher", "student"]) -> ScoreRow:
    return next(row for row in rows if row.model == model)


def _fields() -> tuple[dataclasses.Field[object], ...]:
    return dataclasses.fields(ScoreRow)


def _flat(row: ScoreRow) -> dict[str, object]:
    flat: dict[str, object] = {}
    for field in _fields():
        value = getattr(row, field.name)
        if isinstance(value, tuple):
            flat[f"{field.name}_low"], flat[f"{field.name}_high"] = value
        else:
            flat[field.name] = value
    return flat


_COLUMNS = (
    ("model", "---"),
    ("runtime", "---"),
    ("precision", "---"),
    ("batch", "--:"),
    ("threads", "--:"),
    ("accuracy %", "--:"),
    ("drop pp", "--:"),
    ("params", "--:"),
    ("MACs", "--:"),
    ("size MB", "--:"),
    ("p50 ms", "--:"),
    ("p95 ms", "--:"),
    ("p99 ms", "--:"),
    ("inputs/s", "--:"),
    ("speed-up", "--:"),
    ("peak memory MB", "--:"),
)


def _cells(row: ScoreRow) -> tuple[str, ...]:
    student = row.model == "student"
    drop = f"{row.drop_pp:.2f} [{row.drop_ci_pp[0]:.2f}, {row.drop_ci_pp[1]:.2f}]" if student else "-"
    speedup = f"{row.speedup:.2f}x [{row.speedup_ci[0]:.2f}, {row.speedup_ci[1]:.2f}]" if student else "-"
    memory = "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:.1f}"
    return (
        row.model,
        row.runtime,
        row.precision,
        str(row.batch),
        str(row.threads),
        f"{row.accuracy_pct:.2f} (n={row.n})",
        drop,
        f"{row.params:,}",
        f"{row.macs:,}",
        f"{row.size_bytes / 1e6:.2f}",
        f"{row.latency_ms_p50:.3f}",
        f"{row.latency_ms_p95:.3f}",
        f"{row.latency_ms_p99:.3f}",
        f"{row.throughput_per_s:,.0f}",
        speedup,
        memory,
    )
