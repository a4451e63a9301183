"""One report of everything that was done: frozen results in, one self-contained HTML page or JSON text out."""

from __future__ import annotations

import base64
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from causal_compress.errors import RunFolderError
from causal_compress.explain import audit_drawings, drawings, formats
from causal_compress.explain.findings import findings
from causal_compress.explain.headline import Amounts, Headline, headline
from causal_compress.recipe import Recipe
from causal_compress.results import (
    Accuracy,
    Audit,
    Bisection,
    Candidates,
    Change,
    Decision,
    Distilled,
    Effects,
    Exported,
    Groups,
    LatencyTable,
    Log,
    Pareto,
    Plan,
    Provenance,
    Quantized,
    QuantizedFile,
    Scorecard,
    Skip,
    TeacherScore,
)

T = TypeVar("T")
logger = logging.getLogger(__name__)
STUDENT = "of_student"
"""Key in audit-later.json and bisect.json: the student that they are about."""
SCHEMA = 2
"""2: search, latency, quantization and audit may be there; 1, without them, is still read."""
_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants", ser_json_bytes="base64", val_json_bytes="base64")

# Together they keep the page below 5 MB whatever a network or a recipe brings; what is left out is said on the page.
_IMAGE_BYTES = 2_700_000
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
    """All that the report tells; `disagreed` is how many validation inputs they part on, and of how many.
    What is None was not asked for: `pareto` without a search, `latency` where the plan's cost was not time,
    `bisection` before `bisect`.
    """

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
    pareto: Pareto | None = None
    latency: LatencyTable | None = None
    quantized: Quantized | None = None
    audit: Audit | None = None
    bisection: Bisection | None = None


@plain_dataclass(frozen=True)
class Example:
    """One input on which teacher and student part, as the page shows it; probabilities are of each one's own answer."""

    index: int
    true_class: str
    teacher_class: str
    student_class: str
    png_base64: str
    row: str
    teacher_probability: float | None = None
    student_probability: float | None = None


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
    names = ("number", "fixed", "signed", "p_value", "scaled", "size", "ms", "pct", "share", "times", "seconds")
    environment.filters.update({name: getattr(formats, name) for name in names})
    environment.globals.update(
        interval=formats.interval,
        opposite=formats.opposite,
        count=formats.count,
        setting_name=drawings.setting_name,
        missing=formats.MISSING,
        row_limit=_ROWS,
    )
    return environment.get_template("report.html.j2").render(**_view(context))


def report_json(context: ReportInput) -> str:
    """The same report for machines: every result in full, under a schema number.

    Args:
        context: The results of a run.

    Returns:
        JSON text with `schema`, `verdict`, `headline` and one key per field of `ReportInput`; images as base64.
    """
    lines = [{"name": h.name, "before": h.before, "after": h.after, "change": h.change} for h in _headline(context)]
    verdict = context.scorecard.verdict if context.scorecard else None
    results = formats.strict(TypeAdapter(ReportInput).dump_python(context, mode="json"))
    report = {"schema": SCHEMA, "verdict": verdict, "headline": lines, **results}
    return json.dumps(report, ensure_ascii=False, allow_nan=False)


def bisected(folder: Path, student: str) -> Bisection | None:
    """What `bisect` found about a run, if it was asked about this student (`stages.student_mark`)."""
    return _found_later(folder / "bisect.json", student, Bisection)


def audited_later(folder: Path, student: str) -> Audit | None:
    """The last audit of a run that was asked for after it (`afterwards.audit_file`), if any was of this student."""
    found = (_found_later(folder / name, student, Audit) for name in ("audit-later.json", "audit.json"))
    return next(filter(None, found), None)


def _found_later(path: Path, student: str, result_type: type[T]) -> T | None:
    found = json.loads(path.read_bytes()) if path.exists() else {}
    about = found.pop(STUDENT, None)  # the run's own audit.json doesn't say
    if about != student:
        if about is not None:
            logger.warning("%s is about an earlier student and not told in the report: ask again", path)
        return None
    return TypeAdapter(result_type).validate_json(json.dumps(found))


def read_report_json(text: str) -> ReportInput:
    """The results back from `report_json`, of this schema or an older one.

    Raises:
        RunFolderError: the text is not what `report_json` wrote.
    """
    try:
        found = json.loads(text)
        kept = {key: value for key, value in found.items() if key not in ("schema", "verdict", "headline")}
        if found.get("schema") == 1:
            _upgrade(kept)
        elif found.get("schema") != SCHEMA:
            raise ValueError(f"schema {found.get('schema')!r}, this version reads 1 to {SCHEMA}")
        return TypeAdapter(ReportInput).validate_json(json.dumps(kept))
    except (ValueError, AttributeError, TypeError) as error:  # no JSON, no mapping, or other fields
        raise RunFolderError(
            "report.json is damaged, or another version wrote it",
            found=str(error).splitlines()[0],
            remedy="run the compress command on this folder again: it writes report.json anew from the finished stages",
        ) from error


def _upgrade(results: dict[str, Any]) -> None:
    """What early runs under schema 1 wrote and later ones did not, or the other way round."""
    results.get("groups", {}).pop("random_init_cka_mean", None)
    if results.get("distilled"):
        results["distilled"].setdefault("compiled", False)


def _view(context: ReportInput) -> dict[str, Any]:
    shown, left_out = _affordable(_examples(context))
    ranges = drawings.node_ranges(context.groups.chosen)
    named = context.recipe.report.title or (context.recipe.model.arch or "").rpartition("/")[2]
    return {
        "c": context,
        "title": named or "Compressed network",
        "headline": _headline(context),
        "settings": drawings.settings(context.scorecard),
        "quickest": drawings.quickest(context.scorecard),
        "model_name": drawings.model_name,
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
        "findings": findings(context.audit) if context.audit else (),
        "shown": shown,
        "left_out": left_out,
    }


def _headline(context: ReportInput) -> tuple[Headline, ...]:
    teacher, pruned, int8 = context.teacher, context.pruned, _chosen_int8(context.quantized)
    size_bytes, answers = context.exported.size_bytes, _journey(context)[-1][1]
    if int8 is not None:
        size_bytes, answers = int8.size_bytes, int8.accuracy
    amounts = Amounts(
        (teacher.macs, pruned.macs), (teacher.params, pruned.params), (teacher.size_bytes, size_bytes), int8 is not None
    )
    return headline(context.scorecard, (teacher.accuracy, answers), amounts)


def _chosen_int8(quantized: Quantized | None) -> QuantizedFile | None:
    """The INT8 file for CPUs where it was chosen over the FP32 one."""
    files = quantized.files if quantized is not None and quantized.chosen == "int8" else ()
    return next((file for file in files if file.family == "cpu"), None)


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
    steps += [("After narrowing and splitting layers", context.pruned.validation)]
    if context.distilled:
        steps.append(("After distillation", context.distilled.validation))
    return tuple(steps)


def _examples(context: ReportInput) -> tuple[Example, ...]:
    """The audit's gallery, whose inputs part the most; without an audit, validation inputs on which they part."""
    if context.audit and context.audit.gallery:
        return tuple(
            Example(
                x.index,
                x.true_class,
                x.teacher_class,
                x.student_class,
                x.picture_png_base64 or "",
                x.row or "",
                x.teacher_probability,
                x.student_probability,
            )
            for x in context.audit.gallery
        )
    return tuple(
        Example(
            x.index,
            x.true_class,
            x.teacher_class,
            x.student_class,
            base64.b64encode(x.image_png or b"").decode("ascii"),
            x.row or "",
        )
        for x in context.disagreements
    )


def _affordable(examples: Sequence[Example]) -> tuple[tuple[Example, ...], int]:
    shown, spent = [], 0
    for example in examples:
        cost = len(example.png_base64) + len(example.row)
        if spent + cost <= _IMAGE_BYTES:
            shown.append(example)
            spent += cost
    return tuple(shown), len(examples) - len(shown)


def _figures(context: ReportInput, ranges: drawings.Ranges) -> dict[str, Markup | None]:
    """Every figure by name; None where there is nothing to draw."""
    scorecard, effects, plan, groups, audit = (
        context.scorecard,
        context.effects,
        context.plan,
        context.groups,
        context.audit,
    )
    epochs = context.distilled.epochs if context.distilled else ()
    return {
        "latency": drawings.latency(scorecard) if scorecard and scorecard.rows else None,
        "pareto": drawings.accuracy_and_time(scorecard) if scorecard and len(scorecard.rows) > 1 else None,
        "merged": drawings.before_and_after(effects, plan, ranges) if plan.decisions else None,
        "map": drawings.causal_map(effects, plan, ranges) if effects.chain.regions else None,
        "features": drawings.input_features(effects) if drawings.top_features(effects) else None,
        "cka": drawings.similarity(effects, ranges) if effects.cka else None,
        "epsilon": drawings.epsilon_path(groups) if groups.path else None,
        "front": drawings.front(plan, context.recipe.budget.macs) if plan.front else None,
        "harm": drawings.harm(_harm_pairs(_ledger(context))),
        "accuracy": drawings.curve("accuracy", epochs),
        "loss": drawings.curve("loss", epochs),
        "search": audit_drawings.pareto(context.pareto) if context.pareto and context.pareto.points else None,
        **_audit_figures(audit),
    }


def _audit_figures(audit: Audit | None) -> dict[str, Markup | None]:
    if audit is None:
        return dict.fromkeys(("drift", "classes", "groups", "corruptions"))
    drift, groups = audit.causal_map, audit.groups
    return {
        "drift": audit_drawings.map_drift(drift) if drift else None,
        "classes": audit_drawings.group_changes("fig-classes", "Change of accuracy in each class", audit.per_class),
        "groups": audit_drawings.group_changes("fig-groups", "Change of accuracy in each group", groups.rows)
        if groups
        else None,
        "corruptions": audit_drawings.corruptions(audit.corruptions),
    }
