"""The report in a real browser, wide and narrow, light and dark."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from ggufkit import pipeline
from ggufkit.evaluate.report.values import Report
from tests.browser import browser
from tests.evaluate.reporting import make_measured

WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")
LETTERS = "0123456789"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A report of every kind of result; one text and the models have unhandy names."""
    root = tmp_path_factory.mktemp("models")
    stem = "A-model-with-quite-a-long-name-" + 4 * LETTERS + "<img src=x onerror=alert(1)>"
    bench = make_measured(root, stem=stem, text="<script>alert(2)</script>.txt")
    made = pipeline.report(out=root / "page.html", models_dir=bench.store.root)
    return made.page, made.report


@pytest.fixture(params=[(w, s) for w in WIDTHS for s in SCHEMES], ids=lambda p: f"{p[0]}-{p[1]}")
def opened(
    request: pytest.FixtureRequest, chromium: Browser, written: tuple[Path, Report]
) -> Iterator[Page]:
    """The page, after which nothing may have been said, asked or fetched."""
    width, scheme = request.param
    page = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    fetched: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(written[0].as_uri())
    yield page
    page.close()
    assert said == []
    assert fetched == [written[0].as_uri()]


def test_the_page_fits_and_names_the_file(opened: Page, written: tuple[Path, Report]) -> None:
    recommended = opened.locator("[data-recommended]")
    assert recommended.is_visible()
    assert recommended.inner_text() == written[1].studies[0].recommendation.file
    assert recommended.inner_text().endswith("-Q4_K_M.gguf")
    width, visible = opened.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert width == visible
    assert _sticking_out(opened) == []


def test_each_plot_has_one_shape_that_can_be_read(opened: Page) -> None:
    figures = opened.locator("figure:has(svg)")
    assert figures.count() == 5
    for number in range(figures.count()):
        shown = figures.nth(number).locator("svg:visible")
        assert shown.count() == 1
        # Pixels of the screen per pixel that it was drawn for, of which letters have 10 or 12.
        drawn_for = float((shown.get_attribute("viewBox") or "").split()[2])
        box = shown.bounding_box()
        assert box
        assert 0.85 < box["width"] / drawn_for < 1.4


def test_colours_follow_the_scheme(opened: Page) -> None:
    dark = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = opened.evaluate(
        "getComputedStyle([...document.querySelectorAll('svg .label text')].find("
        "t => t.checkVisibility())).fill"
    )
    assert (_brightness(ground) < 128) == dark
    assert (_brightness(ink) > 128) == dark


def test_maps_of_types_open(opened: Page) -> None:
    maps = opened.locator("details")
    assert maps.count() == 6
    opened_before = opened.locator("details[open]").count()
    maps.first.locator("summary").click()
    assert opened.locator("details[open]").count() == opened_before + 1
    cell = maps.first.locator("td i").first
    assert cell.is_visible()
    assert cell.get_attribute("title") == "block 0, attn_q: Q2_K"
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")


def _sticking_out(page: Page) -> list[str]:
    """Elements that reach over the window's edge and do not scroll in a place of their own."""
    found: list[str] = page.evaluate(
        """[...document.querySelectorAll("main *")].filter(element =>
            !element.closest(".scroll, .map, svg") && element.checkVisibility() &&
            element.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"""
    )
    return found


def _brightness(colour: str) -> float:
    red, green, blue = (float(part) for part in colour.strip("rgb()").split(","))
    return 0.3 * red + 0.6 * green + 0.1 * blue
