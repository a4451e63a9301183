"""The report in a real browser: silent, complete without scripts, narrow, dark, printed, accessible, inert."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report_sample_later import HOSTILE, QUOTED, full_sample

from causal_compress.explain.report import build_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium"),
    # the interpreter closes playwright's pipes after the loop that they belong to
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(build_report(full_sample()), encoding="utf-8")
    return path


@pytest.fixture
def visit(browser: Any, file: Path) -> Iterator[Callable[..., Any]]:
    """Open the report in a fresh context; what it asked for and complained of hangs on the page as `heard`."""
    contexts = []

    def opened(**options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        page, heard = context.new_page(), []
        page.on("request", lambda request: heard.append(request.url))
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
        page.goto(file.as_uri())
        page.heard = [url for url in heard if not url.startswith("data:image/png;base64,")]
        return page

    yield opened
    for context in contexts:
        context.close()


def test_it_asks_for_nothing_and_complains_of_nothing(visit: Callable[..., Any], file: Path) -> None:
    assert visit().heard == [file.as_uri()]


def test_it_stays_below_five_megabytes(file: Path) -> None:
    assert file.stat().st_size <= 5_000_000


def test_without_scripts_every_word_is_there(visit: Callable[..., Any]) -> None:
    with_scripts = visit().locator("body").text_content()
    without = visit(java_script_enabled=False).locator("body").text_content()
    assert without == with_scripts
    assert "What compression did to the answers" in without


def test_hostile_names_stay_text(visit: Callable[..., Any], file: Path) -> None:
    page = visit()
    assert page.heard == [file.as_uri()]
    assert page.locator("script").count() == 0
    names = page.evaluate("[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())")
    assert not [name for name in names if name.lower().startswith("on")]
    assert page.evaluate("[...document.images].every(i => i.src.startsWith('data:image/png') && i.naturalWidth > 0)")
    shown = page.locator("#audit").text_content()
    assert HOSTILE in shown
    assert QUOTED in shown


@pytest.mark.parametrize("width", [320, 768])
def test_narrow_screens_scroll_boxes_and_not_the_page(visit: Callable[..., Any], width: int) -> None:
    page = visit(viewport={"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
        " && !e.closest('.plot, .scroll') && !e.matches('.skip')).map(e => e.outerHTML.slice(0, 90))"
    )
    assert wide == []
    boxes = page.evaluate(
        "[...document.querySelectorAll('.plot, .scroll')].filter(e => e.scrollWidth > e.clientWidth)"
        ".map(e => [e.tabIndex, e.getAttribute('role'), !!e.getAttribute('aria-label')])"
    )
    assert boxes
    assert all(box == [0, "region", True] for box in boxes)


def test_dark_scheme_is_dark_and_light_is_light(visit: Callable[..., Any]) -> None:
    def paper(scheme: str) -> list[int]:
        colour = visit(color_scheme=scheme).evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return [int(v) for v in colour.removeprefix("rgb(").removesuffix(")").split(",")]

    assert max(paper("dark")) < 60
    assert min(paper("light")) > 230


def test_print_opens_every_table_on_white_paper(visit: Callable[..., Any]) -> None:
    page = visit(color_scheme="dark")
    hidden = page.locator("#audit details table").first
    assert not hidden.is_visible()
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert hidden.bounding_box()["height"] > 20
    assert page.pdf().startswith(b"%PDF")


def test_the_first_tab_skips_to_the_verdict_and_every_stop_shows_itself(visit: Callable[..., Any]) -> None:
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    for _ in range(14):
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_axe_finds_no_violation(visit: Callable[..., Any], scheme: str, width: int) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is not installed: pip install axe-playwright-python"
    )
    page = visit(color_scheme=scheme, viewport={"width": width, "height": 900}, bypass_csp=True)  # axe is a script
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = axe.Axe().run(page).response["violations"]
    assert [(v["id"], v["help"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_in_figures_have_contrast(visit: Callable[..., Any], scheme: str) -> None:
    page = visit(color_scheme=scheme)
    fills = page.evaluate("[...new Set([...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill))]")
    grounds = page.evaluate(
        "['--paper', '--band'].map(n => getComputedStyle(document.documentElement).getPropertyValue(n).trim())"
    )
    assert fills
    for fill in fills:
        for ground in grounds:
            assert contrast(rgb(fill), rgb(ground)) >= 4.5, (fill, ground)


def rgb(colour: str) -> tuple[float, ...]:
    """A CSS colour as shares of red, green, blue."""
    if colour.startswith("#"):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        return tuple(int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return tuple(float(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3])


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Contrast ratio as WCAG defines it."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
