"""The report's figures and numbers: what is drawn where, how wide and how dark, and how numbers read."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
from report_sample import HOSTILE, QUOTED
from report_sample_later import audit

from causal_compress.explain import audit_drawings, estimates, figures, formats, map_figures
from causal_compress.explain.svg import Axis, Caption, make_axis
from causal_compress.results import Estimate, MapDrift, NodeDrift


def test_of_many_classes_those_that_changed_most_are_drawn() -> None:
    row = audit().per_class[0]
    rows = [
        dataclasses.replace(row, name=str(i), compared=dataclasses.replace(row.compared, drop_pp=(-1) ** i * i / 10))
        for i in range(100)
    ]
    assert [r.name for r in audit_drawings.most_changed(rows)] == [str(i) for i in range(76, 100)]


def test_losses_lie_left_of_zero_and_only_sure_ones_are_coloured() -> None:
    markup = estimates.forest(
        Caption("k", HOSTILE, "d"),
        [figures.Bar(QUOTED, -2.0, -3.0, -1.0, "t", True), figures.Bar("b", 1.0, -1.0, 3.0, "t")],
        ("worse", "better"),
    )
    dots = re.findall(r'<circle cx="([\d.]+)" cy="[\d.]+" r="5" class="([^"]*)"', markup)
    assert [css for _, css in dots] == ["dot strong", "dot"]
    assert float(dots[0][0]) < 425 < float(dots[1][0])
    assert "<img" not in markup
    assert "<script" not in markup


def test_a_single_input_has_no_whisker() -> None:
    nothing = (math.nan, math.nan)
    rows = estimates.forest(Caption("k", "t", "d"), [figures.Bar("a", 1.0, *nothing, "t")], ("l", "r"))
    places = estimates.dumbbells(Caption("k", "t", "d"), [(1.0, estimates.Spot(0, 2.0, *nothing))], "nats")
    for markup in (rows, places):
        assert "nan" not in markup
        assert 'class="whisker"' not in markup
        assert "<circle" in markup


def test_the_change_at_a_place_is_drawn_about_the_teacher_under_the_same_masks() -> None:
    node = NodeDrift(node="a", teacher=1.0, again=2.0, student=3.0, change=Estimate(value=1.0, low=0.5, high=1.5, n=9))
    markup = audit_drawings.map_drift(MapDrift(nodes=(node,), inputs=9, student=None, floor=None))
    ring = float(re.findall(r'cy="([\d.]+)" r="5"', markup)[0])
    dot = float(re.findall(r'cy="([\d.]+)" r="4.5"', markup)[0])
    ends = [float(v) for v in re.findall(r'd="M[\d.]+ ([\d.]+)L[\d.]+ ([\d.]+)" class="whisker"', markup)[0]]
    assert min(ends) < dot < max(ends) < ring
    assert (ring - dot) == pytest.approx(max(ends) - min(ends), abs=0.3)


def test_a_part_is_as_wide_as_the_work_that_is_left() -> None:
    spans = [map_figures.MapSpan(0, 1, 0.0, kept=0.25), map_figures.MapSpan(2, 3, 0.0, changed=False)]
    markup = map_figures.before_and_after(Caption("k", "t", "d"), [0.1, 1.0, None, 10.0], [(0, 3)], spans)
    (changed,), (kept,) = (re.findall(rf'width="([\d.]+)" height="40.0" class="{c}"', markup) for c in ("mark", "base"))
    assert float(kept) == pytest.approx(4 * float(changed), abs=0.3)
    assert "2→1" in markup
    assert re.findall(r'class="cell" fill-opacity="([\d.]+)"', markup) == ["0.00", "0.60", "0.00", "1.00"]


def test_hundreds_of_parts_stay_inside_their_figure() -> None:
    spans = [map_figures.MapSpan(i, i, 1.0) for i in range(320)]
    markup = map_figures.before_and_after(Caption("k", "t", "d"), [1.0] * 320, [(0, 319)], spans)
    parts = re.findall(r'<rect x="(-?[\d.]+)" y="144.0" width="([\d.]+)"', markup)
    assert len(parts) == 320
    assert all(float(x) > 60 and float(x) + float(width) < 864 for x, width in parts)


def test_heat_map_shades_follow_the_numbers() -> None:
    markup = figures.heat_map(Caption("k", HOSTILE, "d"), [[1.0, 0.0], [0.0, 1.0]], [(0, 0), (1, 1)])
    shades = dict(re.findall(r'd="([^"]*)" class="cell" fill-opacity="([^"]*)"', markup))
    assert sorted(shades.values()) == ["0.000", "1.000"]
    assert "<script" not in markup
    assert markup.count('class="frame"') == 2


def test_map_area_is_work() -> None:
    columns = [map_figures.MapColumn(0.1, 0.01, 100.0), map_figures.MapColumn(0.2, 0.01, 100.0)]
    markup = map_figures.causal_map(Caption("k", "t", "d"), columns, [(0, 1)], [map_figures.MapSpan(0, 1, 50.0)])
    bars = [tuple(map(float, m)) for m in re.findall(r'width="([\d.]+)" height="([\d.]+)" class="base"', markup)]
    student = re.findall(r'width="([\d.]+)" height="([\d.]+)" class="mark"', markup)[-1]
    assert float(student[1]) == pytest.approx(bars[0][1] / 4, abs=0.2)


def test_axis_maps_ends_and_middle() -> None:
    assert Axis(0, 10, 100, 200).at(2.5) == 125
    assert Axis(0.01, 100, 0, 400, log=True).at(1) == pytest.approx(200)
    assert make_axis([0.001, 1.0], 0, 1).log
    assert not make_axis([0.0, 1.0], 0, 1).log
    assert Axis(0, 10, 0, 1).ticks() == (0, 2, 4, 6, 8, 10)


@pytest.mark.parametrize(
    "values", [[], [0.0], [5.0, 5.0], [float("nan"), 1.0], [float("inf")], [-3.0, 4.0], [1e-9, 1e9]]
)
def test_axes_hold_whatever_comes(values: list[float]) -> None:
    axis = make_axis(values, 0, 100)
    assert axis.low < axis.high
    assert all(0 <= axis.at(v) <= 100 for v in values if math.isfinite(v))
    assert all(math.isfinite(t) for t in axis.ticks())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (formats.scaled(1_270_000), "1.27 M"),
        (formats.scaled(853), "853"),
        (formats.size(999_700), "1.00 MB"),
        (formats.ms(12.34), "12.3 ms"),
        (formats.times(0.5419), "0.54×"),
        (formats.times(0.0058), "0.0058×"),
        (formats.times(0.0042), "0.0042×"),
        (formats.times(0.0996), "0.10×"),
        (formats.share(0.004), "0.40 %"),
        (formats.share(0.0145), "1.5 %"),
        (formats.share(0.0), "0 %"),
        (formats.share(0.333), "33 %"),
        (formats.number(0.0000123), "1.23 × 10⁻⁵"),
        (formats.number(-0.5), "−0.500"),
        (formats.number(float("nan")), "–"),
        (formats.fixed(-0.0), "0.00"),
        (formats.pct(None), "–"),
        (formats.signed(0.19), "+0.19"),
        (formats.signed(-1.19), "−1.19"),
        (formats.signed(0.001), "0.00"),
        (formats.signed(math.inf), "–"),
        (formats.fixed(-0.001), "0.00"),
        (formats.opposite(0.61, 1.02), "−1.02 to −0.61"),
        (formats.p_value(0.0004), "below 0.001"),
        (formats.p_value(0.031), "0.031"),
        (formats.count(1, "class", "classes"), "1 class"),
        (formats.count(1200, "input"), "1,200 inputs"),
        (formats.tick(0.30000000000000004), "0.3"),
        (formats.seconds(0.8), "0.80 s"),
        (formats.seconds(252), "4 min 12 s"),
        (formats.seconds(3725), "1 h 2 min"),
        (formats.interval(-0.61, 1.024), "−0.61 to 1.02"),
    ],
)
def test_numbers_read_well(text: str, wanted: str) -> None:
    assert text.replace("\u00a0", " ") == wanted
