"""The report: complete, self-contained, inert against hostile names, honest about what is missing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from report_sample import HOSTILE, QUOTED, cka, region, sample
from report_sample_later import audit, full_sample

from causal_compress.errors import RunFolderError
from causal_compress.explain.findings import findings
from causal_compress.explain.report import _harm_pairs, _ledger, build_report, read_report_json, report_json
from causal_compress.recipe import BudgetSection, LatencySection
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
def full() -> str:
    return build_report(full_sample())


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
    assert len(page.figures) == 11
    for tags in page.figures:
        assert {"svg", "title", "desc", "figcaption", "table"} <= set(tags)
    assert all(attrs.get("role") == "img" for tag, attrs in page.tags if tag == "svg")


def test_sections_stand_in_reading_order(page: Page) -> None:
    found = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert found == [
        "verdict",
        "scorecard",
        "map",
        "front",
        "audit",
        "examples",
        "ledger",
        "recovery",
        "parity",
        "method",
    ]
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_headline_names_accuracy_work_size_and_speed(html: str) -> None:
    top = html[: html.index('id="scorecard"')].replace("\u00a0", " ")
    for text in ("PASS", "93.39 %", "92.20 %", "−1.19 points", "−1.50 to −0.88", "n = 10,000", "126 M", "68.0 M"):
        assert text in top
    for text in ("0.54×", "418 k", "1.72 MB", "2.86 ms", "2.04× as fast", "1.98 to 2.10"):
        assert text in top


def test_headline_shows_int8_where_it_was_chosen_for_its_size() -> None:
    context = full_sample()
    assert context.scorecard is not None
    at = next(row for row in context.scorecard.rows if (row.model, row.runtime) == ("student", "onnxruntime"))
    eight = dataclasses.replace(at, precision="int8", size_bytes=520_000, latency_ms_p50=99.0, accuracy_pct=91.07)
    card = dataclasses.replace(context.scorecard, rows=(*context.scorecard.rows, eight))
    lines = json.loads(report_json(dataclasses.replace(context, scorecard=card)))["headline"]
    told = {line["name"]: line["after"].replace("\u00a0", " ") for line in lines}
    assert told["Accuracy"] == "91.07 %"
    assert told["File size (INT8)"] == "520 kB"
    assert any(name.startswith("Latency (ONNX Runtime") and name.endswith(", INT8)") for name in told)
    without = json.loads(report_json(dataclasses.replace(context, scorecard=None)))["headline"]
    told = {line["name"]: line["after"].replace("\u00a0", " ") for line in without}
    assert (told["Accuracy (validation)"], told["File size (INT8)"]) == ("92.00 %", "520 kB")


def test_a_speed_up_within_the_noise_is_called_no_difference() -> None:
    card = sample().scorecard
    assert card is not None
    rows = tuple(
        dataclasses.replace(row, speedup=1.07, speedup_ci=(0.98, 1.12)) if row.model == "student" else row
        for row in card.rows
    )
    html = build_report(dataclasses.replace(sample(), scorecard=dataclasses.replace(card, rows=rows)))
    top = html[: html.index('id="scorecard"')].replace("\u00a0", " ")
    assert "speed-up 1.07×, 95 % interval 0.98 to 1.12" in top
    assert "as fast" not in top
    assert ", no difference</text>" in html  # beside its bar


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
    assert found["schema"] == 2
    assert found["verdict"] == "PASS"
    assert found["plan"]["macs"] == 0.542
    assert report_json(read_report_json(text)) == text
    assert read_report_json(text).disagreements == sample().disagreements


def test_a_report_of_the_first_schema_is_still_read() -> None:
    old = json.loads(report_json(sample()))
    for later in ("pareto", "latency", "quantized", "audit"):
        del old[later]
    old["schema"], old["groups"]["random_init_cka_mean"] = 1, None
    del old["distilled"]["compiled"]
    read = read_report_json(json.dumps(old))
    assert report_json(read) == report_json(sample())  # as text, since NaN is not equal to itself
    assert "No audit was part of this run" in build_report(read)


@pytest.mark.parametrize("text", ['{"schema": 3}', "[]", "no JSON", '{"schema": 2, "plan": 1}'])
def test_another_form_of_report_is_refused(text: str) -> None:
    with pytest.raises(RunFolderError, match=r"report\.json"):
        read_report_json(text)


def test_all_that_came_later_round_trips_and_stays_small(full: str) -> None:
    text = report_json(full_sample())
    assert report_json(read_report_json(text)) == text
    assert len(full.encode()) < 500_000
    page = Page(full)
    assert page.bad == []
    assert len(page.figures) == 16
    assert all({"svg", "table"} <= set(tags) for tags in page.figures)
    assert "<script" not in full.lower()
    assert page.attributes("onerror") == []


def test_regions_have_names_of_their_own(full: str) -> None:
    page = Page(full)
    regions = [attrs for _, attrs in page.tags if attrs.get("role") == "region"]
    labels = [attrs["aria-label"] for attrs in regions]
    assert len(labels) == len(set(labels))
    assert all(attrs["tabindex"] == "0" for attrs in regions)


def test_every_word_is_explained_once(full: str) -> None:
    words = re.findall("<dfn>(.*?)</dfn>", full)
    assert len(words) == len(set(words))
    assert {"student", "MACs", "95 % interval", "nats", "CKA", "INT8", "Brier score", "noise floor"} <= set(words)
    text = re.sub(r"<style>.*?</style>|<title>.*?</title>|<nav.*?</nav>", "", full, flags=re.DOTALL)
    for word in ("nats", "CKA", "noise floor", "Spearman", "INT8"):
        assert text.index(word) >= text.index(f"<dfn>{word}</dfn>") - 200


def test_search_latency_and_8_bits_are_told_with_their_numbers(full: str) -> None:
    text = re.sub(r"<[^>]*>", "", full).replace("\u00a0", " ")
    for told in (
        "1.10 points in the search (95 % interval 0.55 to 1.65, n = 5,000)",
        "predicted to take 52.0 % of the teacher's time; put together and timed as a whole, it took 55.0 %",
        "ONNX Runtime, batch 1, 1 thread, 88 different parts",
        "1.89× as fast (95 % interval 1.83 to 1.94 over 120 interleaved calls)",
        "INT8 was chosen",
        "does 0.0623 nats of harm on 512 held-out inputs",
        "(0.0210 nats)",
    ):
        assert told in text


def test_findings_say_what_the_intervals_allow() -> None:
    found = {f.question: f for f in findings(audit())}
    assert [f.sign for f in found.values()] == ["worse", "worse", "worse", "worse", "worse", "worse", "same"]
    overall = dataclasses.replace(audit().overall, drop_ci_pp=(-0.1, 0.4))
    same = dataclasses.replace(audit(), overall=overall, per_class=(), corruptions=(), quality=(), groups=None)
    assert [f.sign for f in findings(dataclasses.replace(same, attribution=None, causal_map=None))] == ["same"]
    better = dataclasses.replace(overall, drop_ci_pp=(-0.4, -0.1))
    assert findings(dataclasses.replace(same, overall=better))[0].answer == "No, better"


def test_one_disturbance_of_many_proves_nothing() -> None:
    rows = [r for r in audit().corruptions if r.corruption != "blur" or r.severity == 3]
    (found,) = (f for f in findings(dataclasses.replace(audit(), corruptions=tuple(rows))) if "fragile" in f.question)
    assert found.sign == "unclear"
    assert "1 of 10 disturbances" in found.evidence


def test_an_audit_with_little_in_it_still_makes_a_page() -> None:
    little = dataclasses.replace(
        audit(), per_class=(), corruptions=(), quality=(), groups=None, attribution=None, causal_map=None, gallery=()
    )
    html = build_report(dataclasses.replace(full_sample(), audit=little))
    assert Page(html).bad == []
    assert "No class had inputs to compare" in html


def test_the_same_results_make_the_same_page(html: str) -> None:
    assert build_report(sample()) == html


def test_a_budget_on_latency_is_told_as_asked_for() -> None:
    given = sample()
    latency = BudgetSection(latency_ms=LatencySection(keep=0.49, threads=2))
    page = build_report(dataclasses.replace(given, recipe=given.recipe.model_copy(update={"budget": latency})))
    asked = " ".join(page[page.index("Asked for:") :][:200].split())
    assert asked.startswith("Asked for: latency at most 49")
    assert "on onnxruntime, batch 1, 2 thread(s)" in asked
