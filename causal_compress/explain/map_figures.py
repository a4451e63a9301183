"""Drawings of the network from its input to its answer: causal nodes, effects, work, and what replaced what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from causal_compress.explain import formats, svg
from causal_compress.explain.svg import Axis, Caption, make_axis

_LEFT, _RIGHT = 64.0, 860.0
_LEVELS = 5


@dataclass(frozen=True)
class MapColumn:
    """One region in the causal map; the effect may be unknown."""

    ace: float | None
    error: float
    macs: float


@dataclass(frozen=True)
class MapSpan:
    """Regions first..last (positions on the chain) after compression, and the share of their work that is left."""

    first: int
    last: int
    macs: float
    kept: float = 1.0
    changed: bool = True


def before_and_after(
    caption: Caption, effects: Sequence[float | None], nodes: Sequence[tuple[int, int]], spans: Sequence[MapSpan]
) -> Markup:
    """The teacher's regions above, the student's parts below, joined where one stands for several.

    Args:
        caption: Title and description.
        effects: ACE of each region, in order; the larger, the fuller its box.
        nodes: First and last position of each causal node.
        spans: What became of each stretch of regions; a part is as wide as the share of the work that is left.

    Returns:
        SVG markup.
    """
    step = (_RIGHT - _LEFT) / max(1, len(effects))
    parts = _bands(nodes, step, 78)
    parts += [svg.text(_LEFT - 8, 58, "Teacher", anchor="end", css="strong")]
    for i, fill in enumerate(_fullness(effects)):
        box = (_LEFT + (i + 0.1) * step, 34, 0.8 * step, 40)
        parts += [svg.rect(*box, "paper"), svg.shade(*box, fill), svg.rect(*box, "outline")]
    least = min(4.0, 0.8 * step)  # of a hundred parts even this must not leave the figure
    widths = [max(least, 0.8 * step * (s.last - s.first + 1) * min(1.0, s.kept)) for s in spans]
    gap = 0.2 * step
    at = (_LEFT + _RIGHT - sum(widths) - gap * max(0, len(widths) - 1)) / 2
    parts.append(svg.text(_LEFT - 8, 168, "Student", anchor="end", css="strong"))
    for span, width in zip(spans, widths, strict=True):
        first, last = _LEFT + (span.first + 0.1) * step, _LEFT + (span.last + 0.9) * step
        path = f"M{first:.1f} 80L{last:.1f} 80L{at + width:.1f} 140L{at:.1f} 140z"
        parts.append(Markup('<path d="{}" class="{}"/>').format(path, "funnel" if span.changed else "funnel kept"))
        parts.append(svg.rect(at, 144, width, 40, "mark" if span.changed else "base"))
        if span.last > span.first:
            x = 0.7 * (first + last) / 2 + 0.3 * (at + width / 2)
            count = f"{span.last - span.first + 1}→1"
            parts.append(svg.text(x, 101, count, anchor="middle", css="node small"))
        at += width + gap
    key = "Below: in colour what was changed, grey what was kept; 3→1: one region stands for three"
    return svg.document(caption, 868, 214, [*parts, svg.text(_LEFT, 208, key)])


def _fullness(effects: Sequence[float | None]) -> list[float]:
    """Shares between the smallest and the largest effect on a logarithmic scale, in a few clear steps."""
    known = [math.log(e) for e in effects if e is not None and math.isfinite(e) and e > 0]
    if not known:
        return [0.0] * len(effects)
    low, spread = min(known), (max(known) - min(known)) or 1.0
    shares = [(math.log(e) - low) / spread if e is not None and math.isfinite(e) and e > 0 else 0.0 for e in effects]
    return [math.ceil(_LEVELS * share) / _LEVELS for share in shares]


def causal_map(
    caption: Caption, columns: Sequence[MapColumn], nodes: Sequence[tuple[int, int]], spans: Sequence[MapSpan]
) -> Markup:
    """The chain from left to right: causal nodes as bands, ACE of each site, MACs before and after.

    Args:
        caption: Title and description.
        columns: One per region, in order.
        nodes: First and last position of each causal node.
        spans: What each stretch of regions costs after compression [MACs]; drawn with area equal to its cost.

    Returns:
        SVG markup.
    """
    step = (_RIGHT - _LEFT) / max(1, len(columns))
    ace = make_axis([c.ace for c in columns if c.ace is not None], 172, 52, zero=True)
    macs = Axis(0, max((c.macs for c in columns), default=1.0) * 1.06 or 1.0, 330, 222)
    parts = _bands(nodes, step, 346)
    scale = " (log scale)" if ace.log else ""
    parts += [svg.text(_LEFT, 44, f"Causal effect of each site [nats]{scale}, with 95 % interval", css="strong")]
    parts += svg.y_grid(ace, _LEFT, _RIGHT)
    parts += [svg.text(_LEFT, 214, "Work of each region [MACs]: teacher grey, student in colour", css="strong")]
    parts += [svg.text(_LEFT - 8, macs.at(t) + 4, formats.scaled(t), anchor="end") for t in macs.ticks()]
    parts += [svg.line(_LEFT, macs.at(t), _RIGHT, macs.at(t), "grid") for t in macs.ticks()]
    parts += _columns(columns, ace, macs, step)
    parts += _spans(spans, macs, step)
    every = max(1, len(columns) // 16)
    parts += [svg.text(_LEFT + (i + 0.5) * step, 362, str(i), anchor="middle") for i in range(0, len(columns), every)]
    parts.append(
        svg.text(_LEFT, 382, "Position on the chain, from the input (left) to the answer (right); names in the table")
    )
    return svg.document(caption, 868, 390, parts)


def _bands(nodes: Sequence[tuple[int, int]], step: float, height: float) -> list[Markup]:
    parts = []
    for number, (first, last) in enumerate(nodes, start=1):
        x, width = _LEFT + first * step, (last - first + 1) * step
        parts.append(svg.rect(x, 0, width, height, "band" if number % 2 else "band other"))
        if width >= 16:  # narrower bands have no room for a number
            parts.append(svg.text(x + width / 2, 16, str(number), anchor="middle", css="node"))
    return [*parts, svg.text(_LEFT - 8, 16, "Node", anchor="end")]


def _columns(columns: Sequence[MapColumn], ace: Axis, macs: Axis, step: float) -> list[Markup]:
    parts = []
    for i, column in enumerate(columns):
        x, width = _LEFT + (i + 0.14) * step, 0.72 * step
        parts.append(svg.rect(x, macs.at(column.macs), width, macs.start - macs.at(column.macs), "base"))
        if column.ace is None or not math.isfinite(column.ace):
            continue
        y = ace.at(column.ace)
        parts.append(svg.rect(x, y, width, ace.start - y, "pale"))
        parts.append(svg.whisker(x + width / 2, ace.at(column.ace - column.error), ace.at(column.ace + column.error)))
    return parts


def _spans(spans: Sequence[MapSpan], macs: Axis, step: float) -> list[Markup]:
    parts = []
    for span in spans:
        count = span.last - span.first + 1
        x, width, y = _LEFT + (span.first + 0.14) * step, (count - 0.28) * step, macs.at(span.macs / count)
        parts.append(svg.rect(x, y, width, macs.start - y, "mark"))
        if count > 1:
            parts.append(svg.rect(x, macs.start + 7, width, 4, "merge"))
    return parts
