"""Figures whose numbers are uncertain: every mark comes with the line of its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from causal_compress.explain import svg
from causal_compress.explain.figures import Bar
from causal_compress.explain.svg import Axis, Caption, make_axis


@dataclass(frozen=True)
class Spot:
    """A measured point: where it lies, and its interval upwards and downwards."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """One small picture of several with the same scale; x counts steps from 0."""

    name: str
    teacher: tuple[Spot, ...]
    student: tuple[Spot, ...]


def tradeoff(
    caption: Caption, spots: Sequence[Spot], labels: tuple[str, str], *, front: Sequence[int], chosen: int, limit: float
) -> Markup:
    """Points that were tried, the best of them joined, the chosen one in colour, and the limit they had to keep.

    Args:
        caption: Title and description.
        spots: In the order in which they were tried; numbered from 1.
        labels: Names of the horizontal and the vertical axis, with units.
        front: Positions of points that no other beats.
        chosen: Position of the point that was carried out.
        limit: Height of the dashed line.

    Returns:
        SVG markup.
    """
    left, right, top, floor = 72.0, 640.0, 34.0, 300.0
    reach = (0.06 if len(spots) > 1 else 0.1) * (max(s.x for s in spots) - min(s.x for s in spots) or 10.0)
    x = Axis(min(s.x for s in spots) - reach, max(s.x for s in spots) + reach, left, right)
    y = make_axis([limit, 0.0, *(v for s in spots for v in (s.low, s.high))], floor, top)
    parts = [svg.text(0, 14, f"{labels[1]} ↑", css="strong"), *svg.y_grid(y, left, right), *svg.x_ticks(x, floor + 4)]
    parts.append(svg.text(right, floor + 42, f"{labels[0]} →", anchor="end", css="strong"))
    parts.append(svg.line(left, y.at(limit), right, y.at(limit), "guide"))
    parts.append(svg.text(right, y.at(limit) - 6, "limit", anchor="end", css="halo"))
    parts.append(_curve([(x.at(spots[i].x), y.at(spots[i].y)) for i in sorted(front, key=lambda i: spots[i].x)], ""))
    for i, spot in enumerate(spots):
        at, strong = (x.at(spot.x), y.at(spot.y)), i == chosen
        parts += [svg.whisker(at[0], y.at(spot.low), y.at(spot.high)), svg.dot(*at, 6 if strong else 4, strong=strong)]
        name = f"{i + 1} (chosen)" if strong else str(i + 1)
        parts.append(svg.text(at[0] + 10, at[1] - 8, name, css="node halo" if strong else "halo"))
    return svg.document(caption, 700, floor + 48, parts)


def forest(caption: Caption, bars: Sequence[Bar], sides: tuple[str, str], *, room: float = 200.0) -> Markup:
    """One line per row: a dot and its interval about zero; what stands apart from zero is drawn in colour.

    Args:
        caption: Title and description.
        bars: Rows from top to bottom.
        sides: What lies left and right of zero, in words.
        room: Pixels for the names.

    Returns:
        SVG markup.
    """
    right, top = 650.0, 26.0
    finite = [v for b in bars for v in (b.value, b.low, b.high) if math.isfinite(v)]
    edge = 1.08 * (max(map(abs, finite), default=1.0) or 1.0)
    x = Axis(-edge, edge, room, right)
    floor = top + 24.0 * len(bars)
    parts = [svg.text(room, 14, f"← {sides[0]}", css="strong")]
    parts.append(svg.text(right, 14, f"{sides[1]} →", anchor="end", css="strong"))
    parts += [svg.line(x.at(t), top, x.at(t), floor, "grid") for t in x.ticks()]
    parts += [*svg.x_ticks(x, floor), svg.line(x.at(0), top, x.at(0), floor, "rule")]
    for row, bar in enumerate(bars):
        y, css = top + 24.0 * row + 12, "strong" if bar.strong else ""
        name = bar.label if len(bar.label) <= 23 else bar.label[:22] + "…"
        parts += [svg.text(room - 10, y + 4, name, anchor="end", css=css)]
        if _is_known(bar.low, bar.high):
            parts.append(svg.line(x.at(bar.low), y, x.at(bar.high), y, "whisker"))
        if _is_known(bar.value):
            parts.append(svg.dot(x.at(bar.value), y, 5, strong=bar.strong))
        parts.append(svg.text(right + 12, y + 4, bar.text, css=css))
    return svg.document(caption, 868, floor + 26, parts)


def panels(caption: Caption, shown: Sequence[Panel], labels: tuple[str, str], *, columns: int = 4) -> Markup:
    """Small pictures side by side on one scale: the teacher as rings, the student as dots in colour.

    Args:
        caption: Title and description.
        shown: One per kind; all have steps 0, 1, 2 ..
        labels: What a step is, and the vertical axis with its unit.
        columns: Pictures in a row.

    Returns:
        SVG markup.
    """
    left, pitch, width, height = 44.0, 206.0, 176.0, 150.0
    steps = max(len(p.teacher) for p in shown)
    values = [v for p in shown for s in (*p.teacher, *p.student) for v in (s.low, s.high)]
    parts = [svg.text(0, 14, f"{labels[1]} ↑", css="strong"), *_key(280)]
    parts.append(svg.text(868, 14, f"{labels[0]} →", anchor="end", css="strong"))
    for i, panel in enumerate(shown):
        start, top = left + pitch * (i % columns), 52 + (height + 74) * (i // columns)
        x = Axis(-0.4, steps - 0.6, start, start + width)
        y = make_axis(values, top + height, top)
        parts.append(svg.text(start, top - 10, panel.name, css="strong"))
        parts += svg.y_grid(y, start, start + width) if i % columns == 0 else svg.y_lines(y, start, start + width)
        parts += [svg.text(x.at(t), top + height + 18, str(t), anchor="middle") for t in range(len(panel.teacher))]
        parts += _compared(panel, x, y)
    rows = math.ceil(len(shown) / columns)
    return svg.document(caption, 868, 52 + (height + 74) * rows - 44, parts)


def _compared(panel: Panel, x: Axis, y: Axis) -> list[Markup]:
    parts = []
    for spots, shift, strong in ((panel.teacher, -4.0, False), (panel.student, 4.0, True)):
        at = [(x.at(s.x) + shift, y.at(s.y)) for s in spots]
        parts.append(_curve(at, "strong" if strong else ""))
        parts += [svg.whisker(a, y.at(s.low), y.at(s.high)) for (a, _), s in zip(at, spots, strict=True)]
        parts += [svg.dot(a, b, 4, strong=True) if strong else svg.ring(a, b, 4) for a, b in at]
    return parts


def dumbbells(caption: Caption, pairs: Sequence[tuple[float, Spot]], label: str) -> Markup:
    """The same quantity at several places, before and after: rings for the teacher, dots for the student.

    Args:
        caption: Title and description.
        pairs: The teacher's value and the student's, in order from the input to the answer.
        label: Name of the vertical axis, with its unit.

    Returns:
        SVG markup.
    """
    left, right, top, floor = 64.0, 860.0, 40.0, 230.0
    positive = [v for before, after in pairs for v in (before, after.y) if v > 0]
    spread = max(positive, default=1.0) / min(positive, default=1.0)
    if spread > 50 and len(positive) == 2 * len(pairs):
        y = Axis(min(positive) / 1.6, max(positive) * 1.6, floor, top, log=True)
    else:
        ends = [v for before, after in pairs for v in (before, after.y, after.low, after.high)]
        y = make_axis(ends, floor, top, zero=True)
    step = (right - left) / max(1, len(pairs))
    scale = " (log scale)" if y.log else ""
    parts = [svg.text(0, 14, f"{label}{scale} ↑", css="strong"), *_key(380), *svg.y_grid(y, left, right)]
    every = max(1, len(pairs) // 20)
    for i, (before, after) in enumerate(pairs):
        x = left + (i + 0.5) * step
        if _is_known(after.low, after.high):
            parts.append(svg.whisker(x + 4, y.at(after.low), y.at(after.high)))
        parts.append(svg.ring(x - 4, y.at(before), 5))
        parts.append(svg.dot(x + 4, y.at(after.y), 4.5, strong=True))
        if i % every == 0:
            parts.append(svg.text(x, floor + 20, str(i + 1), anchor="middle"))
    parts.append(
        svg.text(left, floor + 42, "Places that both networks have, from the input to the answer; names in the table")
    )
    return svg.document(caption, 868, floor + 52, parts)


def _is_known(*values: float) -> bool:
    """Whether they can be drawn; NaN is the interval of a single input."""
    return not any(map(math.isnan, values))


def _key(x: float) -> list[Markup]:
    parts = [svg.ring(x, 10, 4), svg.text(x + 10, 14, "teacher")]
    return [*parts, svg.dot(x + 80, 10, 4, strong=True), svg.text(x + 90, 14, "student")]


def _curve(at: Sequence[tuple[float, float]], css: str) -> Markup:
    if len(at) < 2:
        return Markup("")
    return Markup('<path d="M{}" class="curve {}"/>').format("L".join(f"{a:.1f} {b:.1f}" for a, b in at), css)
