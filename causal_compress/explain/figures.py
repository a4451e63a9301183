"""Figures as inline SVG: numbers in, markup out; colours come from the page's CSS, so they follow its scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from causal_compress.explain import svg
from causal_compress.explain.svg import Axis, Caption, make_axis

_LEVELS = 16


@dataclass(frozen=True)
class Bar:
    """One bar with an optional whisker, both in the unit of the figure."""

    label: str
    value: float
    low: float
    high: float
    text: str
    strong: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one curve; `line` joins them, `strong` draws them in the accent colour."""

    name: str
    points: tuple[tuple[float, float], ...]
    line: bool = True
    strong: bool = False


def latency_bars(caption: Caption, groups: Sequence[tuple[str, Sequence[Bar]]]) -> Markup:
    """Bars in groups; every group has its own scale, since a batch of 64 dwarfs a batch of 1.

    Args:
        caption: Title and description.
        groups: Heading and bars (milliseconds; the whisker ends at the 95th percentile) of each setting.

    Returns:
        SVG markup.
    """
    parts, y, left, right = [], 0.0, 118.0, 640.0
    for heading, bars in groups:
        parts.append(svg.text(0, y + 14, heading, css="strong"))
        y += 24
        top = max((b.high for b in bars if math.isfinite(b.high)), default=1.0) or 1.0
        for bar in bars:
            end, tip = left + (right - left) * bar.value / top, left + (right - left) * bar.high / top
            parts += [
                svg.text(0, y + 13, bar.label),
                svg.rect(left, y, end - left, 18, "mark" if bar.strong else "base"),
            ]
            parts += [svg.line(end, y + 9, tip, y + 9, "whisker"), svg.line(tip, y + 5, tip, y + 13, "whisker")]
            parts.append(svg.text(tip + 8, y + 13, bar.text, css="strong"))
            y += 24
        y += 16
    return svg.document(caption, 860, y - 8, parts)


def bar_list(caption: Caption, bars: Sequence[Bar]) -> Markup:
    """Horizontal bars on one scale from zero, longest first as given, each with its interval."""
    left, right = 190.0, 620.0
    top = max((b.high for b in bars if math.isfinite(b.high)), default=1.0) or 1.0
    parts = []
    for row, bar in enumerate(bars):
        y = 24.0 * row
        low, end, tip = (left + (right - left) * max(0.0, v) / top for v in (bar.low, bar.value, bar.high))
        name = bar.label if len(bar.label) <= 26 else bar.label[:25] + "…"
        parts += [svg.text(left - 10, y + 14, name, anchor="end"), svg.rect(left, y + 3, end - left, 14, "pale")]
        parts += [svg.line(low, y + 10, tip, y + 10, "whisker"), svg.text(tip + 8, y + 14, bar.text)]
    return svg.document(caption, 720, 24.0 * len(bars), parts)


def heat_map(caption: Caption, matrix: Sequence[Sequence[float]], nodes: Sequence[tuple[int, int]]) -> Markup:
    """A square matrix of similarities in [0, 1], with the causal nodes as frames on the diagonal.

    Args:
        caption: Title and description.
        matrix: Similarities; values outside [0, 1] are drawn at the edge.
        nodes: First and last position of each causal node.

    Returns:
        SVG markup; one path per shade keeps it small for long chains.
    """
    left, edge, count = 40.0, 440.0, max(1, len(matrix))
    cell = edge / count
    shades: list[list[str]] = [[] for _ in range(_LEVELS + 1)]
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if math.isfinite(value):
                level = round(min(1.0, max(0.0, value)) * _LEVELS)
                shades[level].append(f"M{left + j * cell:.1f} {i * cell:.1f}h{cell:.2f}v{cell:.2f}h-{cell:.2f}z")
    parts = [
        Markup(f'<path d="{"".join(cells)}" class="cell" fill-opacity="{level / _LEVELS:.3f}"/>')
        for level, cells in enumerate(shades)
        if cells
    ]
    parts += [
        svg.rect(left + first * cell, first * cell, (last - first + 1) * cell, (last - first + 1) * cell, "frame")
        for first, last in nodes
    ]
    every = max(1, count // 10)
    for i in range(0, count, every):
        middle = (i + 0.5) * cell
        parts += [
            svg.text(left - 8, middle + 4, str(i), anchor="end"),
            svg.text(left + middle, edge + 16, str(i), anchor="middle"),
        ]
    return svg.document(caption, 580, edge + 24, parts + _shade_key(left + edge + 28))


def _shade_key(x: float) -> list[Markup]:
    parts = [svg.text(x, 12, "CKA", css="strong")]
    for level in range(_LEVELS + 1):
        y = 24 + (_LEVELS - level) * 12
        parts.append(
            Markup(f'<rect x="{x}" y="{y}" width="16" height="12" class="cell" fill-opacity="{level / _LEVELS:.3f}"/>')
        )
    parts.append(svg.rect(x, 24, 16, 12 * (_LEVELS + 1), "outline"))
    return [*parts, *(svg.text(x + 22, 24 + (1 - v) * 12 * _LEVELS + 10, f"{v:g}") for v in (1.0, 0.5, 0.0))]


def epsilon_path(
    caption: Caption, path: Sequence[tuple[float, float, int]], chosen: tuple[float, float, int], epsilon: float
) -> Markup:
    """How many causal nodes there are at each tolerance epsilon; long steps are partitions that persist.

    Args:
        caption: Title and description.
        path: Epsilon low, epsilon high and number of nodes of each partition.
        chosen: The same for the chosen partition.
        epsilon: The chosen tolerance.

    Returns:
        SVG markup.
    """
    x = make_axis([0.0, *(end for low, high, _ in path for end in (low, high))], 56, 640, zero=True)
    y = make_axis([0.0, *(float(count) for _, _, count in path)], 220, 14, zero=True)
    parts = svg.y_grid(y, 56, 640) + svg.x_ticks(x, 220)
    parts.append(svg.line(x.at(epsilon), 14, x.at(epsilon), 220, "guide"))
    for low, high, count in path:
        strong = (low, high, count) == chosen
        parts.append(
            svg.line(
                x.at(low),
                y.at(count),
                max(x.at(high), x.at(low) + 1.5),
                y.at(count),
                "step strong" if strong else "step",
            )
        )
    middle = x.at((chosen[0] + chosen[1]) / 2)
    parts.append(svg.text(middle, y.at(chosen[2]) - 10, f"chosen: {chosen[2]} nodes", anchor="middle", css="node halo"))
    parts.append(
        svg.text(56, 256, "Tolerance epsilon (how far from 1 the similarity may fall) → number of causal nodes ↑")
    )
    return svg.document(caption, 660, 264, parts)


def plot(
    caption: Caption,
    series: Sequence[Series],
    labels: tuple[str, str],
    *,
    guide: float | None = None,
    diagonal: bool = False,
) -> Markup:
    """Curves or points over two axes, each linear or logarithmic as its values ask.

    Args:
        caption: Title and description.
        series: What to draw, in order; the first is drawn lowest.
        labels: Names of the horizontal and the vertical axis, with units.
        guide: Where to draw a dashed vertical line.
        diagonal: Draw the line on which both coordinates are equal, on axes with the same range.

    Returns:
        SVG markup.
    """
    points = [p for s in series for p in s.points if all(map(math.isfinite, p))]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    if diagonal:
        xs = ys = xs + ys
    x = make_axis(xs if guide is None else [*xs, guide], 72, 624)
    y = make_axis(ys, 280, 34)
    parts = [
        svg.text(0, 14, f"{labels[1]}{' (log scale)' if y.log else ''} ↑", css="strong"),
        *svg.y_grid(y, 72, 624),
        *svg.x_ticks(x, 284),
    ]
    parts.append(svg.text(624, 322, f"{labels[0]}{' (log scale)' if x.log else ''} →", anchor="end", css="strong"))
    if guide is not None:
        parts.append(svg.line(x.at(guide), 34, x.at(guide), 284, "guide"))
    if diagonal:
        parts.append(svg.line(x.at(x.low), y.at(y.low), x.at(x.high), y.at(y.high), "guide"))
    for one in series:
        parts += _draw(one, x, y)
    return svg.document(caption, 640, 330, parts)


def _draw(series: Series, x: Axis, y: Axis) -> list[Markup]:
    css = "strong" if series.strong else ""
    spots = [(x.at(a), y.at(b)) for a, b in series.points if math.isfinite(a) and math.isfinite(b)]
    parts = []
    if series.line and len(spots) > 1:
        parts.append(Markup(f'<path d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in spots)}" class="curve {css}"/>'))
    radius = (5 if series.strong else 3.5) if not series.line else (3 if len(spots) <= 40 else 0)
    parts += [svg.dot(a, b, radius, strong=series.strong) for a, b in spots if radius]
    if series.name and spots:
        a, b = spots[-1]
        anchor = "end" if a > 500 else "start"
        parts.append(svg.text(a + (-9 if anchor == "end" else 9), b - 9, series.name, anchor=anchor, css="node halo"))
    return parts
