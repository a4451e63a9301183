"""One report of everything that was done: frozen results in, one self-contained HTML page or JSON text out."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from causal_compress.errors import RunFolderError
from causal_compress.explain import drawings, formats
from causal_compress.recipe import Recipe
from causal_compress.results import (
    Accuracy,
    Candidates,
    Change,
    Decision,
    Distilled,
    Effects,
    Exported,
    Groups,
    Log,
    Plan,
    Provenance,
    Scorecard,
    ScoreRow,
    Skip,
    TeacherScore,
)

SCHEMA = 1
_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants", ser_json_bytes="base64", val_json_bytes="base64")

# Together they keep the page below 5 MB whatever a network or a recipe brings; what is left out is said on the page.
_IMAGE_BYTES = 2_000_000
_ROWS = 150
_MATRIX = 48
_FRONT = 24
_REFUSED = 6


@dataclass(frozen=True, kw_only=True, config=_config)
class Disagreement:
    """A validation input to which teacher and student give different answers; shown as PNG or as a row of text."""

    index: int
    true_class: str
    teacher_class: str
    student_class: str
    image_png: bytes | None = None
    row: str | None = None


@dataclass(frozen=True, kw_only=True, config=_config)
class ReportInput:
    """All that the report tells; `disagreed` is how many validation inputs they part on, and of how many."""

    recipe: Recipe
    provenance: Provenance
    teacher: TeacherScore
    effects: Effects
    groups: Groups
    candidates: Candidates
    plan: Plan
    rewritten: Log
    pruned: Log
    distilled: Distilled | None
    exported: Exported
    scorecard: Scorecard | None
    disagreements: tuple[Disagreement, ...] = ()
    disagreed: tuple[int, int] | None = None


@plain_dataclass(frozen=True)
class Headline:
    """One headline figure: before, after, what that means, and how sure it is."""

    name: str
    before: str
    after: str
    change: str
    sure: str


@plain_dataclass(frozen=True)
class LedgerRow:
    """A decision beside what was measured when it was carried out."""

    decision: Decision
    measured: tuple[tuple[str, Change], ...]


def build_report(context: ReportInput) -> str:
    """The report as one HTML page without scripts or network requests.

    Args:
        context: The results of a run.

    Returns:
        HTML, at most 5 MB; every name in it is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("number", "fixed", "scaled", "size", "ms", "pct", "share", "times", "seconds")
    environment.filters.update({name: getattr(formats, name) for name in names})
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    environment.globals.update(interval=formats.interval, missing=formats.MISSING, row_limit=_ROWS)
    return environment.get_template("report.html.j2").render(**_view(context))


def report_json(context: ReportInput) -> str:
    """The same report for machines: every result in full, under a schema number.

    Args:
        context: The results of a run.

    Returns:
        JSON text with `schema`, `verdict`, `headline` and one key per field of `ReportInput`; images as base64.
    """
    headline = [{"name": h.name, "before": h.before, "after": h.after, "change": h.change} for h in _headline(context)]
    verdict = context.scorecard.verdict if context.scorecard else None
    results = _strict(TypeAdapter(ReportInput).dump_python(context, mode="json"))
    report = {"schema": SCHEMA, "verdict": verdict, "headline": headline, **results}
    return json.dumps(report, ensure_ascii=False, allow_nan=False)


def read_report_json(text: str) -> ReportInput:
    """The results back from `report_json`.

    Raises:
        RunFolderError: the text is not what `report_json` wrote.
    """
    try:
        found = json.loads(text)
        kept = {key: value for key, value in found.items() if key not in ("schema", "verdict", "headline")}
        return TypeAdapter(ReportInput).validate_json(json.dumps(kept))
    except (ValueError, AttributeError) as error:  # no JSON, no mapping, or other fields
        raise RunFolderError(
            "report.json is damaged, or another version wrote it",
            found=str(error).splitlines()[0],
            remedy="run the compress command on this folder again: it writes report.json anew from the finished stages",
        ) from error


def _strict(value: Any) -> Any:
    """JSON has no NaN: as a string it survives every parser, and pydantic reads it back as a number."""
    match value:
        case dict():
            return {key: _strict(item) for key, item in value.items()}
        case list():
            return [_strict(item) for item in value]
        case float() if not math.isfinite(value):
            return str(value)
        case _:
            return value


def _view(context: ReportInput) -> dict[str, Any]:
    shown, left_out = _affordable(context.disagreements)
    ranges = drawings.node_ranges(context.groups.chosen)
    return {
        "c": context,
        "title": context.recipe.report.title or context.recipe.model.arch or "Compressed network",
        "headline": _headline(context),
        "settings": drawings.settings(context.scorecard),
        "figures": _figures(context, ranges),
        "effects": {node.site: node for node in context.effects.nodes},
        "ranges": ranges,
        "matrix_shown": len(context.effects.cka) <= _MATRIX,
        "features": drawings.top_features(context.effects),
        "front": _thin(context.plan.front),
        "ledger": _ledger(context),
        "changes": _changes(context),
        "refused_limit": _REFUSED,
        "skips": _skips(context),
        "journey": _journey(context),
        "shown": shown,
        "left_out": left_out,
    }


def _headline_rows(scorecard: Scorecard | None) -> tuple[ScoreRow, ScoreRow] | None:
    """Teacher and student where they will be used: a deployment runtime rather than torch, one input at a time."""
    rows = sorted(
        scorecard.rows if scorecard else (),
        key=lambda r: (r.runtime == "torch", r.batch, r.threads, r.latency_ms_p50),
    )
    for student in (r for r in rows if r.model == "student"):
        place = (student.runtime, student.batch, student.threads)
        for teacher in rows:
            if teacher.model == "teacher" and place == (teacher.runtime, teacher.batch, teacher.threads):
                return teacher, student
    return None


def _headline(context: ReportInput) -> tuple[Headline, ...]:
    teacher, pair = context.teacher, _headline_rows(context.scorecard)
    macs, params, counted = context.pruned.macs, context.pruned.params, "exact count"
    lines = [_validation_line(context)]
    size_before, size_after = float(teacher.size_bytes), float(context.exported.size_bytes)
    if pair:
        before, after = pair
        macs, params, size_before, size_after = after.macs, after.params, before.size_bytes, after.size_bytes
        lines = [_accuracy_line(before, after)]
    lines += [
        _ratio_line("Work per input (MACs)", teacher.macs, macs, "", counted),
        _ratio_line("Parameters", teacher.params, params, "", counted),
        _ratio_line("File size", size_before, size_after, "B", "exact size"),
    ]
    return (*lines, _latency_line(*pair)) if pair else tuple(lines)


def _validation_line(context: ReportInput) -> Headline:
    before, after = context.teacher.accuracy, _journey(context)[-1][1]
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
    low, high = sorted(-v for v in after.drop_ci_pp)
    return Headline(
        name="Accuracy",
        before=formats.pct(before.accuracy_pct),
        after=formats.pct(after.accuracy_pct),
        change=f"{formats.signed(-after.drop_pp)} points",
        sure=f"95 % interval {formats.interval(low, high)}, n = {after.n:,}",
    )


def _ratio_line(name: str, before: float, after: float, unit: str, sure: str) -> Headline:
    change = f"{formats.times(after / before)} of the teacher" if before else formats.MISSING
    return Headline(name, formats.scaled(before, unit), formats.scaled(after, unit), change, sure)


def _latency_line(before: ScoreRow, after: ScoreRow) -> Headline:
    return Headline(
        name=f"Latency ({drawings.setting_name(after.runtime, after.batch, after.threads)})",
        before=formats.ms(before.latency_ms_p50),
        after=formats.ms(after.latency_ms_p50),
        change=f"{formats.times(after.speedup)} as fast",
        sure=f"95 % interval {formats.interval(*after.speedup_ci)}",
    )


def _thin(front: Sequence[Any]) -> tuple[Any, ...]:
    step = max(1, math.ceil(len(front) / _FRONT))
    return (*front[::step], *(front[-1:] if front and (len(front) - 1) % step else ()))


def _changes(context: ReportInput) -> tuple[tuple[str, Change], ...]:
    return tuple((log.stage, change) for log in (context.rewritten, context.pruned) for change in log.changes)


def _ledger(context: ReportInput) -> tuple[LedgerRow, ...]:
    changes = _changes(context)
    return tuple(
        LedgerRow(decision, tuple((stage, change) for stage, change in changes if change.node == decision.node))
        for decision in context.plan.decisions
    )


def _harm_pairs(ledger: Sequence[LedgerRow]) -> tuple[tuple[float, float], ...]:
    """A decision that merges and narrows is carried out in two steps, so its measured harm is their sum."""
    pairs = []
    for row in ledger:
        measured = [change.measured_harm_kl for _, change in row.measured if change.measured_harm_kl is not None]
        if measured:
            pairs.append((row.decision.predicted_harm_kl, sum(measured)))
    return tuple(pairs)


def _skips(context: ReportInput) -> tuple[tuple[str, Skip], ...]:
    sources: tuple[tuple[str, Iterable[Skip]], ...] = (
        ("trace", context.effects.chain.untraced),
        ("intervene", context.effects.skipped),
        ("candidates", context.candidates.skipped),
        ("plan", context.plan.skipped),
        (context.rewritten.stage, context.rewritten.skipped),
        (context.pruned.stage, context.pruned.skipped),
    )
    # the plan repeats what the candidates left out: the first stage to say it is named
    first: dict[tuple[str, str], tuple[str, Skip]] = {}
    for stage, skips in sources:
        for skip in skips:
            first.setdefault((skip.what, skip.reason), (stage, skip))
    return tuple(first.values())


def _journey(context: ReportInput) -> tuple[tuple[str, Accuracy], ...]:
    """Validation accuracy after each stage that touched the weights."""
    steps = [("Teacher", context.teacher.accuracy)]
    steps += [("After merging and refitting", context.rewritten.validation)]
    steps += [("After removing channels", context.pruned.validation)]
    if context.distilled:
        steps.append(("After distillation", context.distilled.validation))
    return tuple(steps)


def _affordable(examples: Sequence[Disagreement]) -> tuple[tuple[Disagreement, ...], int]:
    shown, spent = [], 0
    for example in examples:
        cost = len(example.image_png or b"") + len(example.row or "")
        if spent + cost <= _IMAGE_BYTES:
            shown.append(example)
            spent += cost
    return tuple(shown), len(examples) - len(shown)


def _figures(context: ReportInput, ranges: drawings.Ranges) -> dict[str, Markup | None]:
    """Every figure by name; None where there is nothing to draw."""
    scorecard, effects, plan, groups = context.scorecard, context.effects, context.plan, context.groups
    epochs = context.distilled.epochs if context.distilled else ()
    return {
        "latency": drawings.latency(scorecard) if scorecard and scorecard.rows else None,
        "map": drawings.causal_map(effects, plan, ranges) if effects.chain.regions else None,
        "features": drawings.input_features(effects) if drawings.top_features(effects) else None,
        "cka": drawings.similarity(effects, ranges) if effects.cka else None,
        "epsilon": drawings.epsilon_path(groups) if groups.path else None,
        "front": drawings.front(plan, context.recipe.budget.macs) if plan.front else None,
        "harm": drawings.harm(_harm_pairs(_ledger(context))),
        "accuracy": drawings.curve("accuracy", epochs),
        "loss": drawings.curve("loss", epochs),
    }
