"""From the audit and the search to figures: which rows are shown, and how each figure is told in words."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from causal_compress.explain import estimates, formats
from causal_compress.explain.estimates import Panel, Spot
from causal_compress.explain.figures import Bar
from causal_compress.explain.svg import Caption
from causal_compress.results import Accuracy, CorruptionRow, GroupChange, MapDrift, Pareto

CLASSES = 24
SURE = 0.05


def pareto(found: Pareto) -> Markup:
    """Every point of the search: work kept against the drop on validation data."""
    healed = [p.drop_pp - p.judged_pp for p in found.points]
    spots = [
        Spot(100 * p.macs, p.judged_pp, p.drop_ci_pp[0] - less, p.drop_ci_pp[1] - less)
        for p, less in zip(found.points, healed, strict=True)
    ]
    best = found.points[found.chosen]
    desc = (
        f"{formats.count(found.sizes, 'size')} that were tried; the chosen one keeps {formats.share(best.macs)} of the "
        f"MACs and loses {formats.fixed(best.judged_pp)} points; {formats.fixed(found.limit_pp)} are allowed."
    )
    if found.in_full:
        desc += f" {found.in_full} of them were recovered in full."
    if found.remains is not None:
        desc += (
            f" That left at most {formats.share(found.remains)} of the drop after a short recovery, and the "
            "drops of the others are drawn where they are expected to end."
        )
    caption = Caption("fig-search", "What the search for the smallest network tried", desc)
    labels = ("MACs kept [% of the teacher]", "Accuracy lost on validation data [points]")
    return estimates.tradeoff(caption, spots, labels, front=found.front, chosen=found.chosen, limit=found.limit_pp)


def most_changed(rows: Sequence[GroupChange], limit: int = CLASSES) -> tuple[GroupChange, ...]:
    """The rows whose accuracy changed most, in their own order; all where they are few."""
    changed = sorted(range(len(rows)), key=lambda i: -abs(rows[i].compared.drop_pp))[:limit]
    return tuple(rows[i] for i in sorted(changed))


def group_changes(key: str, title: str, rows: Sequence[GroupChange]) -> Markup | None:
    """Change of accuracy of each class or group with its interval."""
    shown = most_changed(rows)
    if not shown:
        return None
    bars = [_change_bar(row) for row in shown]
    sure = [bar.label for bar in bars if bar.strong]
    desc = f"{len(bars)} rows; beyond chance after Holm's correction: {', '.join(sure) or 'none'}."
    return estimates.forest(Caption(key, title, desc), bars, ("student worse", "student better [points]"))


def _change_bar(row: GroupChange) -> Bar:
    drop, (low, high) = row.compared.drop_pp, row.compared.drop_ci_pp
    text = f"{formats.signed(-drop)} (n = {row.compared.teacher.n:,})"
    return Bar(row.name, -drop, -high, -low, text, row.p_holm < SURE)


def corruptions(rows: Sequence[CorruptionRow]) -> Markup | None:
    """Accuracy of both networks at every severity, one small picture per corruption."""
    plain = [row for row in rows if row.severity == 0]
    kinds = dict.fromkeys(row.corruption for row in rows if row.severity > 0)
    if not kinds:
        return None
    shown = []
    for kind in kinds:
        steps = [*plain, *sorted((r for r in rows if r.corruption == kind), key=lambda r: r.severity)]
        teacher = tuple(_spot(i, row.compared.teacher) for i, row in enumerate(steps))
        student = tuple(_spot(i, row.compared.student) for i, row in enumerate(steps))
        shown.append(Panel("JPEG" if kind == "jpeg" else kind.capitalize(), teacher, student))
    desc = f"Accuracy of teacher and student under {', '.join(kinds)}, from untouched (0) to severe."
    caption = Caption("fig-corruptions", "Accuracy on disturbed inputs", desc)
    return estimates.panels(caption, shown, ("severity", "Accuracy [%]"))


def _spot(step: int, accuracy: Accuracy) -> Spot:
    return Spot(step, accuracy.pct, accuracy.low_pct, accuracy.high_pct)


def map_drift(drift: MapDrift) -> Markup | None:
    """The causal effect at every place that both networks have."""
    if not drift.nodes:
        return None
    # the change is from the teacher under the student's masks, so that is where the ring stands
    pairs = [
        (n.again, Spot(i, n.student, n.again + n.change.low, n.again + n.change.high))
        for i, n in enumerate(drift.nodes)
    ]
    desc = (
        f"{len(pairs)} places that teacher and student share, both under the same masks; where ring and dot lie level, "
        "nothing changed."
    )
    caption = Caption("fig-drift", "Causal effect before and after", desc)
    return estimates.dumbbells(caption, pairs, "Average causal effect [nats]")
