"""The report: complete, self-contained, inert against hostile names, honest about what is missing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from html.parser import HTMLParser

import pytest
from report_sample import HOSTILE, QUOTED, cka, region, sample

from causal_compress.explain import figures, formats
from causal_compress.explain.report import _harm_pairs, _ledger, build_report, read_report_json, report_json
from causal_compress.explain.svg import Axis, Caption, make_axis
from causal_compress.results import Chain, Skip


class Page(HTMLParser):
    """Tags in order, unbalanced tags, and tables per figure."""

    VOID = frozenset({"meta", "img", "br", "path", "rect", "circle"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.bad: list[str] = []
        self.figures: list[list[str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "figure":
            self.figures.append([])
        if "figure" in self.open:
            self.figures[-1].append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.bad.append(tag)

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


@pytest.fixture(scope="module")
def html() -> str:
    return build_report(sample())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_page_is_balanced_html_with_language_and_policy(html: str, page: Page) -> None:
    assert html.lstrip().lower().startswith("<!doctype html>")
    assert page.bad == []
    assert page.open == []
    assert ("html", {"lang": "en"}) in page.tags
    policies = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_page_loads_nothing_and_runs_nothing(html: str, page: Page) -> None:
    for value in page.attributes("src"):
        assert value.startswith("data:image/png;base64,")
    for value in page.attributes("href"):
        assert value.startswith("#")
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "url(" not in html
    assert "@import" not in html


def test_hostile_names_are_shown_as_text(html: str, page: Page) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script" not in html.lower()
    assert "{{ 7*7 }}" in html
    assert len([t for t, _ in page.tags if t == "img"]) == 7


def test_hostile_names_are_inert_in_every_field() -> None:
    text = report_json(sample()).replace("layer1.", HOSTILE).replace('"cat"', json.dumps(QUOTED))
    page = Page(build_report(read_report_json(text)))
    assert page.bad == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.attributes("onerror") == []


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in page.attributes("href")} <= set(ids)
    named = " ".join(page.attributes("aria-labelledby")).split()
    assert set(named) <= set(ids)


def test_every_figure_has_a_described_image_and_a_table(page: Page) -> None:
    assert len(page.figures) == 9
    for tags in page.figures:
        assert {"svg", "title", "desc", "figcaption", "table"} <= set(tags)
    assert all(attrs.get("role") == "img" for tag, attrs in page.tags if tag == "svg")


def test_sections_stand_in_reading_order(page: Page) -> None:
    found = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert found == ["verdict", "scorecard", "map", "front", "ledger", "recovery", "examples", "parity", "method"]
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_headline_names_accuracy_work_size_and_speed(html: str) -> None:
    top = html[: html.index('id="scorecard"')].replace("\u00a0", " ")
    for text in ("PASS", "93.39 %", "92.20 %", "−1.19 points", "−1.50 to −0.88", "n = 10,000", "126 M", "68.0 M"):
        assert text in top
    for text in ("0.54×", "418 k", "1.72 MB", "2.86 ms", "2.04× as fast", "1.98 to 2.10"):
        assert text in top


def test_missing_parts_are_said() -> None:
    html = build_report(dataclasses.replace(sample(), distilled=None, scorecard=None, disagreements=()))
    for text in ("NOT MEASURED", "No benchmark was run", "was not distilled", "Speed was not measured", "No examples"):
        assert text in html
    assert "Accuracy (validation)" in html
    assert Page(html).bad == []


def test_an_empty_plan_still_makes_a_page() -> None:
    context = sample()
    nothing = dataclasses.replace(context.plan, decisions=(), front=(), skipped=())
    still = [dataclasses.replace(one, changes=(), skipped=()) for one in (context.rewritten, context.pruned)]
    alone = dataclasses.replace(context.groups, path=())
    bare = dataclasses.replace(context.effects, features=(), feature_ace=(), feature_ace_stderr=(), cka=(), nodes=())
    html = build_report(
        dataclasses.replace(context, plan=nothing, rewritten=still[0], pruned=still[1], groups=alone, effects=bare)
    )
    assert "Nothing was changed" in html
    assert "The plan decided nothing" in html
    assert "nan" not in re.sub(r"<[^>]*>", "", html).lower().split()
    assert Page(html).bad == []


def test_harm_of_a_decision_in_two_steps_is_added_up() -> None:
    context = sample()
    change = dataclasses.replace(context.rewritten.changes[0], measured_harm_kl=0.0625)
    logs = [dataclasses.replace(log, changes=(change,)) for log in (context.rewritten, context.pruned)]
    pairs = _harm_pairs(_ledger(dataclasses.replace(context, rewritten=logs[0], pruned=logs[1])))
    assert pairs == ((change.predicted_harm_kl, 0.125),)


def test_what_was_skipped_is_said_once_with_its_first_stage() -> None:
    context, same = sample(), (Skip(what="width of stem", reason="shared along the chain"),)
    html = build_report(
        dataclasses.replace(
            context,
            candidates=dataclasses.replace(context.candidates, skipped=same),
            plan=dataclasses.replace(context.plan, skipped=same),
        )
    )
    assert html.count("width of stem") == 1


def test_size_stays_small_and_is_capped_when_images_are_large(html: str) -> None:
    assert len(html.encode()) < 400_000
    big = tuple(dataclasses.replace(d, image_png=b"\x89PNG" + b"x" * 900_000) for d in sample().disagreements)
    capped = build_report(dataclasses.replace(sample(), disagreements=big))
    assert len(capped.encode()) < 5_000_000
    assert "more were left out" in capped


def test_long_chains_stay_below_the_limit() -> None:
    context, count = sample(), 300
    regions = tuple(dataclasses.replace(region(0), index=i, name=f"block{i}") for i in range(count))
    long = dataclasses.replace(
        context.effects,
        chain=Chain(regions=regions, untraced=()),
        cka=tuple(tuple(cka(i, j) for j in range(count)) for i in range(count)),
    )
    html = build_report(dataclasses.replace(context, effects=long))
    assert len(html.encode()) < 5_000_000
    assert "more rows stand in report.json" in html


def test_json_has_a_schema_and_round_trips() -> None:
    text = report_json(sample())
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["schema"] == 1
    assert found["verdict"] == "PASS"
    assert found["plan"]["macs"] == 0.542
    assert report_json(read_report_json(text)) == text
    assert read_report_json(text).disagreements == sample().disagreements


def test_the_same_results_make_the_same_page(html: str) -> None:
    assert build_report(sample()) == html


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (formats.scaled(1_270_000), "1.27 M"),
        (formats.scaled(853), "853"),
        (formats.size(999_700), "1.00 MB"),
        (formats.ms(12.34), "12.3 ms"),
        (formats.times(0.5419), "0.54×"),
        (formats.number(0.0000123), "1.23 × 10⁻⁵"),
        (formats.number(-0.5), "−0.500"),
        (formats.number(float("nan")), "–"),
        (formats.fixed(-0.0), "0.00"),
        (formats.pct(None), "–"),
        (formats.signed(0.19), "+0.19"),
        (formats.signed(-1.19), "−1.19"),
        (formats.signed(0.001), "0.00"),
        (formats.tick(0.30000000000000004), "0.3"),
        (formats.seconds(0.8), "0.80 s"),
        (formats.seconds(252), "4 min 12 s"),
        (formats.seconds(3725), "1 h 2 min"),
        (formats.interval(-0.61, 1.024), "−0.61 to 1.02"),
    ],
)
def test_numbers_read_well(text: str, wanted: str) -> None:
    assert text.replace("\u00a0", " ") == wanted


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


def test_heat_map_shades_follow_the_numbers() -> None:
    markup = figures.heat_map(Caption("k", HOSTILE, "d"), [[1.0, 0.0], [0.0, 1.0]], [(0, 0), (1, 1)])
    shades = dict(re.findall(r'd="([^"]*)" class="cell" fill-opacity="([^"]*)"', markup))
    assert sorted(shades.values()) == ["0.000", "1.000"]
    assert "<script" not in markup
    assert markup.count('class="frame"') == 2


def test_map_area_is_work() -> None:
    columns = [figures.MapColumn(0.1, 0.01, 100.0), figures.MapColumn(0.2, 0.01, 100.0)]
    markup = figures.causal_map(Caption("k", "t", "d"), columns, [(0, 1)], [figures.MapSpan(0, 1, 50.0)])
    bars = [tuple(map(float, m)) for m in re.findall(r'width="([\d.]+)" height="([\d.]+)" class="base"', markup)]
    student = re.findall(r'width="([\d.]+)" height="([\d.]+)" class="mark"', markup)[-1]
    assert float(student[1]) == pytest.approx(bars[0][1] / 4, abs=0.2)
