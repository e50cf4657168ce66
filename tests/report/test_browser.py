"""The page in a real browser: nothing is fetched, nothing complains, the search works, and it is readable everywhere.

BNFCTL_BROWSER names a Chromium; then a missing or a broken one is a failure.  Without it the first of the PATH is taken.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bnfctl import report
from bnfctl.artifact import Artifact, Store
from bnfctl.report.collect import collect
from bnfctl.report.document import Document
from bnfctl.report.page import html
from tests.conftest import REPOSITORY
from tests.report.colours import contrast, luminance
from tests.report.conftest import ITEMS, TASKS
from tests.report.evals import BASE, publish, row
from tests.report.lab_run import lab_run
from tests.report.page_world import HOSTILE, publish_build, publish_train

VARIABLE = "BNFCTL_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FIGURES = {
    *(f"figure-3{letter}" for letter in "abcdef"), "figure-4", "training-objective", "training-shift",
    "training-margin", "training-coefficient", "build-0",
}  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    named = os.environ.get(VARIABLE)
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)
    if named and not found:
        pytest.fail(f"{VARIABLE} is {named}, which is no program")
    if not found:
        pytest.skip(f"no Chromium in the PATH ({', '.join(NAMES)}); {VARIABLE} may name one")
    if named:
        from playwright.sync_api import sync_playwright
    else:
        sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found)
        yield started
        started.close()


@pytest.fixture(scope="session", params=["made", pytest.param("lab", marks=pytest.mark.slow)])
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of two methods with two seeds each: made up, or a real one of the lab."""
    if request.param == "made":
        made: Path = request.getfixturevalue("hostile")
        return made
    folder = tmp_path_factory.mktemp("lab")
    store, artifacts = lab_run(folder)
    return report.write(artifacts, store, folder / "report").index


@pytest.fixture(scope="session")
def hostile(made_run: tuple[Store, list[Artifact], report.Written]) -> Path:
    """The page of the one that is made up, which has hostile responses."""
    return made_run[2].index


@dataclass
class Opened:
    """A page, everything that it or the browser said about it, and what it asked the network for."""

    page: Any
    complaints: list[str]
    requests: list[str]

    def asked(self) -> list[str]:
        """The requests, once there has been none for a while."""
        self.page.wait_for_load_state("networkidle")
        return self.requests

    def matches(self) -> int:
        return int(self.page.inner_text("#found").split()[0])

    def found(self, text: str) -> int:
        """Search, until the list, which waits for more keys first, is another one; how many items match."""
        self.page.evaluate("document.getElementById('items').append(document.createElement('hr'))")
        self.page.fill("#search", text)
        self.page.locator("#items > hr").wait_for(state="detached")
        return self.matches()


@contextmanager
def opened(browser: Any, path: Path, width: int = 1440, **context: Any) -> Iterator[Opened]:
    with browser.new_context(viewport={"width": width, "height": 900}, **context) as made:
        made.set_default_timeout(10_000)
        page = made.new_page()
        complaints: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        yield Opened(page, complaints, requests)


def test_a_browser_that_is_named_and_not_there_is_a_failure() -> None:
    """In a pytest of its own, without plugins, whose import takes longer than all of it."""
    test = f"{__file__}::{test_what_a_page_does_would_be_noticed.__name__}"
    env = {**os.environ, VARIABLE: "nowhere", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", test]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "BNFCTL_BROWSER is nowhere, which is no program" in done.stdout, done.stdout
    assert "1 error" in done.stdout and "skipped" not in done.stdout


def test_what_a_page_does_would_be_noticed(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<img src='http://127.0.0.1:9/a.png' onerror='console.error(1)'><script>no()</script>")
    with opened(browser, path) as seen:
        assert len(seen.asked()) == 2 and any("no is not defined" in one for one in seen.complaints)


@pytest.mark.parametrize("bypass", [False, True], ids=["policy", "no-policy"])
def test_nothing_is_fetched_and_nothing_complains(browser: Any, index: Path, bypass: bool) -> None:
    with opened(browser, index, bypass_csp=bypass) as seen:
        seen.page.click("#more")
        seen.page.emulate_media(media="print")
        seen.page.wait_for_timeout(100)  # in which nothing must happen
        assert seen.asked() == [index.as_uri()]
        assert seen.complaints == []


def test_every_figure_is_there_and_its_labels_can_be_read(browser: Any, index: Path) -> None:
    for width in (1440, 375):
        with opened(browser, index, width) as seen:
            ids = seen.page.eval_on_selector_all("figure", "all => all.map(one => one.id)")
            assert set(ids) == FIGURES
            for box in seen.page.eval_on_selector_all(
                "figure svg[role=img]",
                """all => all.map(svg => {
                  const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
                  const texts = [...svg.querySelectorAll("text")].map(one => [one.getBoundingClientRect().toJSON(),
                    one.textContent, one.getAttribute("font-size") * scale]);
                  return {name: svg.ariaLabel, box: box.toJSON(), texts, marks: svg.querySelectorAll("path, use").length};
                })""",
            ):
                assert box["box"]["width"] > 200 and box["box"]["height"] > 60 and box["marks"] > 5, box["name"]
                assert box["box"]["right"] <= width, box["name"]
                assert min(size for _, _, size in box["texts"]) >= 8, box["name"]
                assert not list(overlaps(box["texts"])), (width, box["name"], list(overlaps(box["texts"])))


def overlaps(texts: list[Any]) -> Iterator[tuple[str, str]]:
    """Pairs of labels that lie on each other by more than a pixel."""
    for number, (one, said, _) in enumerate(texts):
        for other, also, _ in texts[:number]:
            wide = min(one["right"], other["right"]) - max(one["left"], other["left"])
            high = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
            if wide > 1 and high > 1:
                yield said, also


def test_the_search_narrows_the_list(browser: Any, index: Path) -> None:
    with opened(browser, index) as seen:
        page = seen.page
        everything = seen.matches()
        assert page.locator("#items article").count() == 10
        page.click("#more")
        assert page.locator("#items article").count() == 20
        first = page.locator("#items article code").first.inner_text()
        assert 0 < seen.found(first) < everything
        assert page.locator("#items article").count() == seen.found(first.upper()), "upper and lower case are one"
        assert page.locator("mark").count() > 0
        assert seen.found("no response has these words") == 0
        assert page.locator("#items article").count() == 0
        assert not page.is_visible("#more")
        assert seen.found("") == everything


def test_filters_and_keyboard(browser: Any, hostile: Path) -> None:
    with opened(browser, hostile) as seen:
        page = seen.page
        page.get_by_label("Search prompts and responses").focus()
        page.keyboard.type("plus0")
        page.get_by_text(f"{len(TASKS) * ITEMS - 1} of {len(TASKS) * ITEMS} items match; 10 of them").wait_for()
        page.get_by_label("Task").select_option("crux")
        assert page.inner_text("#found").startswith(f"{ITEMS} of {ITEMS} items match")
        assert set(page.locator("#items article header strong").all_inner_texts()) == {"crux"}
        page.get_by_label("grades differ").check()
        assert page.inner_text("#found").startswith(f"{ITEMS} of"), "they differ on every item here"
        assert page.locator("#items article").first.locator(".response").count() == 5
        page.click(".controls summary")
        page.locator("#models").get_by_label("Base").uncheck()
        labels = page.locator("#items article").first.locator(".model").all_inner_texts()
        assert labels == ["DPO, seed 0", "DPO, seed 1", "BNF, seed 0", "BNF, seed 1"]


def test_items_that_tell_the_models_apart_can_be_had_alone(browser: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")
    policy = publish_train(store, publish_build(store, records=4), "bnf", 0, steps=2).pinned()
    made = []
    for model, grades in ((BASE, [1, 0, 1, None]), (policy, [1, 1, None, None])):
        rows = [row("gsm8k", number, grade, "x") for number, grade in enumerate(grades)]
        made.append(publish(store, [*rows[:3], {**rows[3], "prompt": []}], model))
    path = tmp_path / "index.html"
    path.write_text(html(Document("Two models", collect(made, store), ()), []), encoding="utf-8")
    with opened(browser, path) as seen:
        assert seen.matches() == 4
        items = seen.page.locator("#items article").all()
        assert [item.locator("code").inner_text()[-1] for item in items] == ["1", "0", "2", "3"]
        graded = [item.locator(".grade").all_inner_texts() for item in items]
        assert graded == [["grade 0", "grade 1"], ["grade 1", "grade 1"], ["grade 1"], []], "nothing without a grade"
        assert [item.locator(".prompt").count() for item in items] == [1, 1, 1, 0], "no bar without a prompt"
        seen.page.check("#differ")
        assert seen.page.locator("#items article code").all_inner_texts() == ["gsm8k-001"]
        assert seen.page.locator(".grade b").all_inner_texts() == ["0", "1"]


@pytest.mark.parametrize("bypass", [False, True], ids=["policy", "no-policy"])
def test_a_hostile_response_is_shown_as_it_is_and_does_nothing(browser: Any, hostile: Path, bypass: bool) -> None:
    with opened(browser, hostile, bypass_csp=bypass) as seen:
        page, title = seen.page, seen.page.title()
        assert seen.found("onerror=") == 1
        for box in page.locator(".response > .said").all():
            assert box.evaluate("one => one.textContent") == HOSTILE
        page.locator(".response details summary").first.click()
        assert page.locator(".response details .said").first.evaluate("one => one.textContent") == HOSTILE
        page.wait_for_timeout(200)  # in which nothing must happen
        assert page.title() == title and page.locator("#items img, #items script").count() == 0
        assert seen.asked() == [hostile.as_uri()] and seen.complaints == []


LOOKS = """() => {
  const style = getComputedStyle(document.body), text = document.querySelector("figure svg text");
  const line = document.querySelector("figure .s-0");
  return [style.backgroundColor, style.color, getComputedStyle(text).fill, getComputedStyle(line).stroke];
}"""


def test_dark_mode_is_dark_with_figures_that_follow(browser: Any, index: Path) -> None:
    looks = {}
    for mode in ("light", "dark"):
        with opened(browser, index, color_scheme=mode) as seen:
            looks[mode] = seen.page.evaluate(LOOKS)
    assert luminance(looks["dark"][0]) < 0.05 < 0.9 < luminance(looks["light"][0])
    for mode, (ground, *inks) in looks.items():
        for ink, needed in zip(inks, (7, 4.5, 3), strict=True):
            assert contrast(ground, ink) >= needed, (mode, ground, ink)
    assert all(light != dark for light, dark in zip(looks["light"], looks["dark"], strict=True))


def test_a_phone_scrolls_tables_in_their_boxes_and_nothing_else_sideways(browser: Any, index: Path) -> None:
    with opened(browser, index, 375) as seen:
        seen.page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 375
        wider = seen.page.eval_on_selector_all(
            ".scroll", "all => all.filter(o => o.scrollWidth > o.clientWidth).length"
        )
        assert wider > 0, "there is a table that needs it"
        focusable = seen.page.eval_on_selector_all(".scroll", "all => all.every(one => one.tabIndex === 0)")
        assert focusable, "a keyboard can scroll them"


def test_paper_has_everything_open_and_no_controls(browser: Any, index: Path) -> None:
    with opened(browser, index, color_scheme="dark") as seen:
        page = seen.page
        assert page.is_visible(".controls") and not page.is_visible(".lineage dl")
        page.emulate_media(media="print")
        page.locator("details:not([open])").first.wait_for(state="detached")  # all are open
        assert not page.is_visible(".controls") and not page.is_visible("nav") and not page.is_visible("#more")
        assert page.is_visible(".lineage dl") and page.is_visible("figure details table")
        assert luminance(page.evaluate(LOOKS)[0]) == pytest.approx(1)
        assert page.pdf().startswith(b"%PDF")
        page.emulate_media(media="screen")
        page.locator(".lineage details[open]").first.wait_for(state="detached")  # what was closed is closed again
        assert not page.is_visible(".lineage dl")


def test_without_scripts_all_but_the_responses_is_there(browser: Any, index: Path) -> None:
    with opened(browser, index, java_script_enabled=False) as seen:
        assert seen.page.is_visible("noscript p") and not seen.page.is_visible(".controls")
        assert seen.page.locator("figure svg[role=img]").count() > 10
        assert seen.page.get_by_role("table").count() > 3


def test_links_lead_to_what_they_name(browser: Any, index: Path) -> None:
    with opened(browser, index) as seen:
        page = seen.page
        links = page.eval_on_selector_all("nav a", "all => all.map(one => one.getAttribute('href'))")
        assert {f"#{figure}" for figure in FIGURES} < set(links)
        assert all(page.locator(link).count() == 1 for link in links)
        page.locator(".lineage summary").last.click()
        target = page.locator(".lineage dl a:visible").first.get_attribute("href")
        assert not page.is_visible(target)
        page.click(f'.lineage a[href="{target}"]:visible')
        page.locator(target).wait_for()  # the entry unfolds
