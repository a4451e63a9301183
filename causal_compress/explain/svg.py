"""The pen for all figures: axes, ticks, lines and texts as SVG markup; every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

from causal_compress.explain import formats


@dataclass(frozen=True)
class Caption:
    """What a figure is, for people who can't see it; `key` makes the ids unique in the page."""

    key: str
    title: str
    desc: str


@dataclass(frozen=True)
class Axis:
    """Maps values low..high to pixels start..end, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Pixel of a value; values outside are drawn at the edge."""
        value = min(max(value, self.low), self.high)
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> tuple[float, ...]:
        """Round values inside the axis, about five."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def _linear_ticks(low: float, high: float) -> tuple[float, ...]:
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(i * step for i in range(first, last + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1,) if len(decades) > 3 else (1, 2, 5)
    step = max(1, len(decades) // 6)
    every = (m * 10.0**d for d in decades[::step] for m in multiples)
    return tuple(t for t in every if low * 0.999 <= t <= high * 1.001)


def make_axis(values: Iterable[float], start: float, end: float, *, zero: bool = False) -> Axis:
    """An axis that holds all finite values: logarithmic where positive values span more than a factor of 50.

    Args:
        values: What has to fit; non-finite values are left out.
        start: Pixel of the low end.
        end: Pixel of the high end.
        zero: A linear axis starts at zero.

    Returns:
        The axis, with a little room at both ends.
    """
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if low > 0 and high / low > 50:
        return Axis(low / 1.5, high * 1.5, start, end, log=True)
    low = min(0.0, low) if zero else low
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(low if zero and low == 0 else low - room, high + room, start, end)


def document(caption: Caption, width: float, height: float, body: Iterable[str]) -> Markup:
    """One figure, announced to screen readers by its title and description."""
    head = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {w:.0f} {h:.0f}" style="--w:{w:.0f}px" '
        'aria-labelledby="{k}-t {k}-d"><title id="{k}-t">{t}</title><desc id="{k}-d">{d}</desc>'
    ).format(w=width, h=height, k=caption.key, t=caption.title, d=caption.desc)
    return head + Markup("").join(body) + Markup("</svg>")


def text(x: float, y: float, content: str, *, anchor: str = "start", css: str = "") -> Markup:
    """A line of text; `content` is escaped."""
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(
        x, y, anchor, css, content
    )


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    """A straight line."""
    return Markup(f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" class="{css}"/>')


def rect(x: float, y: float, width: float, height: float, css: str) -> Markup:
    """A rectangle; negative sizes are drawn as nothing."""
    width, height = max(0.0, width), max(0.0, height)
    return Markup(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{css}"/>')


def shade(x: float, y: float, width: float, height: float, fullness: float) -> Markup:
    """A rectangle in the accent colour, from empty (0) to full (1)."""
    return Markup(
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="cell" '
        f'fill-opacity="{fullness:.2f}"/>'
    )


def dot(x: float, y: float, radius: float, *, strong: bool = False) -> Markup:
    """A filled dot, in the accent colour where it is strong."""
    css = "dot strong" if strong else "dot"
    return Markup(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{css}"/>')


def ring(x: float, y: float, radius: float) -> Markup:
    """An empty dot, so that two kinds of points differ by more than their colour."""
    return Markup(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="ring"/>')


def whisker(x: float, low: float, high: float) -> Markup:
    """A vertical error bar from pixel low to pixel high."""
    caps = line(x - 2, low, x + 2, low, "whisker") + line(x - 2, high, x + 2, high, "whisker")
    return line(x, low, x, high, "whisker") + caps


def y_grid(axis: Axis, left: float, right: float) -> list[Markup]:
    """Grid lines and numbers of a vertical axis."""
    parts = []
    for tick in axis.ticks():
        y = axis.at(tick)
        parts += [line(left, y, right, y, "grid"), text(left - 8, y + 4, formats.tick(tick), anchor="end")]
    return parts


def y_lines(axis: Axis, left: float, right: float) -> list[Markup]:
    """Grid lines of a vertical axis whose numbers stand elsewhere."""
    return [line(left, axis.at(tick), right, axis.at(tick), "grid") for tick in axis.ticks()]


def x_ticks(axis: Axis, y: float) -> list[Markup]:
    """Ticks and numbers of a horizontal axis below y."""
    return [
        line(axis.at(t), y, axis.at(t), y + 4, "rule") + text(axis.at(t), y + 18, formats.tick(t), anchor="middle")
        for t in axis.ticks()
    ]
