"""The page in a real browser: nothing overlaps, nothing is too small or too pale."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import secateur

sync_api = pytest.importorskip("playwright.sync_api")
NAMES_OF_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((path for name in NAMES_OF_CHROMIUM if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

# Texts of visible plots that cover each other, by a pixel at least.
OVERLAPS = """
[...document.querySelectorAll("svg")].filter(svg => svg.clientWidth).flatMap(svg => {
  const texts = [...svg.querySelectorAll("text")]
    .map(t => [t.textContent, t.getBoundingClientRect()]);
  return texts.flatMap(([a, one], i) => texts.slice(i + 1)
    .filter(([_, other]) => one.left + 1 < other.right && other.left + 1 < one.right
      && one.top + 3 < other.bottom && other.top + 3 < one.bottom)
    .map(([b]) => `${svg.getAttribute("aria-label")}: ${a} / ${b}`));
})
"""
# Texts that leave the plot they belong to.
CUT_OFF = """
[...document.querySelectorAll("svg")].filter(svg => svg.clientWidth).flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(t => {
    const box = t.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1;
  }).map(t => `${svg.getAttribute("aria-label")}: ${t.textContent}`);
})
"""
SMALLEST = """
Math.min(...[...document.querySelectorAll("svg[role=img]")].filter(svg => svg.clientWidth)
  .map(svg => 12 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width))
"""
# The lowest contrast of any text to the paper.
CONTRAST = """
(() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const texts = [...document.querySelectorAll("main *, header *, footer *")]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
  return Math.min(...texts.map(e => getComputedStyle(e))
    .map(style => light(style.display === "inline" && style.fill !== "rgb(0, 0, 0)"
      && style.fill.startsWith("rgb") ? style.fill : style.color))
    .map(ink => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)));
})()
"""


class Shown:
    """A page that is shown, what it complained about and what it asked the network for."""

    def __init__(self, page: Any, file: Path) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(file.as_uri())

    def ask(self, script: str) -> Any:
        """The value of an expression."""
        return self.page.evaluate(script)


Show = Callable[..., Shown]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Show]:
    """Load a file as a screen of some width, or a printer, would show it."""
    contexts = []

    def load(file: Path, *, width: int, scheme: str = "light", media: str = "screen") -> Shown:
        size = {"width": width, "height": 800}
        context = browser.new_context(viewport=size, color_scheme=scheme, is_mobile=width < 600)
        contexts.append(context)
        page = context.new_page()
        page.emulate_media(media=media)
        return Shown(page, file)

    yield load
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def files(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each run, and one of all together."""
    folder = tmp_path_factory.mktemp("pages")
    made = {name: secateur.write_report(run, folder / f"{name}.html") for name, run in runs.items()}
    return made | {"all": secateur.write_report([*runs.values()], folder / "all.html")}


NAMES = ("ramp", "small", "sizes", "taught", "trained", "all")


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
@pytest.mark.parametrize("name", NAMES)
def test_page_fits_and_is_legible(
    name: str, width: int, files: dict[str, Path], show: Show
) -> None:
    shown = show(files[name], width=width)
    assert shown.ask("document.documentElement.scrollWidth") <= width
    assert shown.ask("document.querySelector('h1').getBoundingClientRect().height") > 10
    assert shown.ask(SMALLEST) >= 10
    assert shown.ask(OVERLAPS) == []
    assert shown.ask(CUT_OFF) == []
    assert shown.complaints == []
    assert shown.requests == [files[name].as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_with_contrast(
    scheme: str, files: dict[str, Path], show: Show
) -> None:
    shown = show(files["all"], width=1280, scheme=scheme)
    paper = shown.ask("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    assert shown.ask(CONTRAST) >= 4.5


def test_plots_are_described(files: dict[str, Path], show: Show) -> None:
    shown = show(files["all"], width=1280)
    names = shown.ask("[...document.querySelectorAll('svg[role=img]')].map(s => s.ariaLabel)")
    assert names
    assert all(names)


def test_paper_shows_folded_tables_on_white(files: dict[str, Path], show: Show) -> None:
    shown = show(files["ramp"], width=700, scheme="dark", media="print")
    assert shown.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert shown.ask("document.querySelector('details table').getBoundingClientRect().height") > 50
    assert shown.page.pdf(format="A4").startswith(b"%PDF")


def test_tables_that_are_too_wide_scroll_by_themselves(files: dict[str, Path], show: Show) -> None:
    shown = show(files["all"], width=375)
    assert shown.ask(
        "[...document.querySelectorAll('.table')].some(t => t.scrollWidth > t.clientWidth)"
    )
