"""The page as text: whole in itself, nothing written by a model or a user is markup, equal bytes, a bounded sample."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bnfctl.artifact import Store
from bnfctl.report import page, responses
from bnfctl.report.collect import collect
from bnfctl.report.document import Document
from bnfctl.report.figures_svg import Figure
from bnfctl.report.responses import side_by_side
from bnfctl.report.sources import Sources
from bnfctl.report.table import Cell, Table
from tests.report.evals import publish, row
from tests.report.page_world import HOSTILE, publish_build, publish_train

VOID = {"meta", "input", "br", "img", "link"}


class Page(HTMLParser):
    """Elements with their attributes and the text in them, however deep; and whether each was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[tuple[str, int]] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, number in self._open:
            self.texts[number] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for (name, _), text in zip(self.elements, self.texts, strict=True) if name == tag]


def sources_of(store: Store, rows: Sequence[dict[str, Any]], *more: Sequence[dict[str, Any]]) -> Sources:
    """The base with `rows`, and a BNF training for each other list, whose seeds count from 0."""
    made = [publish(store, list(rows))]
    for seed, theirs in enumerate(more):
        policy = publish_train(store, publish_build(store, records=4), "bnf", seed, steps=2).pinned()
        made.append(publish(store, list(theirs), policy, seed=seed))
    return collect(made, store)


def rows_of(task: str, grades: Sequence[float | None], response: str = "fine") -> list[dict[str, Any]]:
    return [row(task, item, grade, response) for item, grade in enumerate(grades)]


@pytest.fixture
def hostile(store: Store) -> Document:
    """A document in which everything that somebody else may write is hostile."""
    answers = {"game1": [{"choices": [{"text": HOSTILE, "finish": "stop"}]}, {"refused": "no"}]}
    rows = [row(HOSTILE, 0, 1.0, HOSTILE, {HOSTILE: HOSTILE}, answers=json.dumps(answers), finish_reason=HOSTILE,
                prompt=[{"role": HOSTILE, "content": HOSTILE}])]  # fmt: skip
    cell = Cell(HOSTILE, 1.0, 0.5, 1.5, 1, HOSTILE)
    table = Table("t", HOSTILE, HOSTILE, (HOSTILE, HOSTILE), ((cell, cell),), (HOSTILE,), ((HOSTILE, 2),))
    entry = {
        "ref": f"train/{HOSTILE}", "name": HOSTILE, "digest": HOSTILE, "config": {HOSTILE: [HOSTILE]},
        "inputs": {HOSTILE: {"ref": HOSTILE, "digest": HOSTILE}}, "provenance": {"host": HOSTILE}, "command": HOSTILE,
    }  # fmt: skip
    return Document(f"{HOSTILE} {{{{data}}}}", sources_of(store, rows), (table,), (HOSTILE,), (entry,))


JUDGE = [["game1", HOSTILE], ["game1", "refused: no"]]
FIGURE = Figure("f", HOSTILE, HOSTILE, HOSTILE, '<svg role="img"></svg>', "shifts", ((HOSTILE, "n"), ("1", HOSTILE)))


SHOWN = {
    "title": (1, 1), "h1": (1, 1), "h3": (2, 2), "p": (4, 10), "li": (8, 10), "caption": (2, 2), "th": (5, 7), "td": (2, 2),
    "figcaption": (1, 1), "option": (1, 2), "summary": (1, 4), "strong": (1, 2), "code": (3, 4), "pre": (1, 1),
}  # fmt: skip
"""Of the elements of a kind, how many say something hostile, and how many there are."""


def test_nothing_that_somebody_wrote_becomes_markup(hostile: Document) -> None:
    made = Page(page.html(hostile, [FIGURE]))
    assert not made.all("img") and not made.all("b")
    assert [one.get("type") for one in made.all("script")] == ["application/json", None]
    names = {name for _, attributes in made.elements for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "style")], names
    links = [str(one["href"]) for one in made.all("a")]
    assert links and all(link.startswith("#") for link in links)
    assert made.text("h1") == [f"{HOSTILE} {{{{data}}}}"], "shown as it is, a place for text included"
    shown = {tag: [HOSTILE in text for text in made.text(tag)] for tag in SHOWN}
    assert {tag: (sum(found), len(found)) for tag, found in shown.items()} == SHOWN


def test_the_script_and_the_style_are_those_that_the_policy_names(hostile: Document) -> None:
    text = page.html(hostile, [FIGURE])
    policy = str(Page(text).all("meta")[1]["content"])
    style = text[text.index("<style>") + len("<style>") : text.index("</style>")]
    script = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
    for kind, inner in (("style-src", style), ("script-src", script)):
        hashed = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{kind} 'sha256-{hashed}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert policy.endswith("base-uri 'none'; form-action 'none'")


def embedded(text: str) -> str:
    """The JSON in the page."""
    found = re.search(r'<script type="application/json" id="responses-data">(.*?)</script>', text, re.S)
    assert found
    return found[1]


def test_embedded_json_is_the_data_and_cannot_end_its_element(hostile: Document) -> None:
    inner = embedded(page.html(hostile, []))
    assert not re.search("[<>&\u2028\u2029]", inner)
    data = json.loads(inner)
    assert data == side_by_side(hostile.sources)
    (item,) = data["tasks"][0]["items"]
    assert item["prompt"] == [[HOSTILE, HOSTILE]]
    (response,) = item["responses"]
    assert (response["text"], response["judge"], response["finish"]) == ([HOSTILE], JUDGE, HOSTILE)
    assert json.loads(response["extra"][0]) == {HOSTILE: HOSTILE}


def test_ids_are_unique_and_every_link_has_its_place(hostile: Document) -> None:
    shifts = replace(hostile.tables[0], id="shifts", title="A table of the section")
    document = replace(hostile, tables=(hostile.tables[0], shifts), lineage=(
        {"ref": "build/1", "digest": "d", "inputs": {}, "config": {}, "provenance": {}},
        {"ref": "train/2", "digest": "d", "inputs": {"data": {"ref": "build/1", "digest": "d"}}},
    ))  # fmt: skip
    made = Page(page.html(document, [FIGURE]))
    ids = Counter(attributes["id"] for _, attributes in made.elements if "id" in attributes)
    assert set(ids.values()) == {1}, [one for one, count in ids.items() if count > 1]
    links = {str(one["href"])[1:] for one in made.all("a")}
    assert links <= set(ids) and "made-build-1" in links
    assert {"results", "shifts", "table-shifts", "table-t", "f", "responses", "lineage"} <= set(ids)
    described = {
        str(a[name]) for _, a in made.elements for name in ("aria-describedby", "aria-labelledby") if name in a
    }
    assert described <= set(ids)


def rendered(table: Table, store: Store) -> str:
    sources = sources_of(store, rows_of("gsm8k", [1.0]))
    return page.html(Document("t", sources, (table,)), [])


def test_a_cell_has_its_number_its_rank_its_interval_and_its_source(store: Store) -> None:
    cells = (
        Cell("BNF", title="train/1"),
        Cell("50.5", 50.5, -1.26, 0.004, 2.5, "eval/1 <x>", sd=1.25, best=True),
        Cell("–"),
    )
    text = rendered(Table("t", "T", "said", ("Method", "Elo", "Other"), (cells,), groups=(("", 1), ("Both", 2))), store)
    assert '<th scope="row" title="train/1">BNF</th>' in text
    assert '<td class="num best" title="eval/1 &lt;x&gt;"><span class="value">50.5</span>' in text
    assert (
        '<span class="sd"> ± 1.2</span><span class="rank"> (2.5)</span><span class="ci">[−1.3, 0.0]</span></td>' in text
    )
    assert '<td class="text"><span class="value">–</span></td>' in text
    assert '<th scope="col" class="num">Elo</th><th scope="col">Other</th>' in text
    assert '<th colspan="2" scope="colgroup" class="group"><span>Both</span></th>' in text
    assert '<caption class="sr">T</caption>' in text


def test_bounds_of_a_difference_have_signs_like_the_difference(store: Store) -> None:
    cells = (Cell("a"), Cell("-0.50", -0.5, -1.255, 0.251), Cell("+5", 5.0, 0.3, 9.7))
    text = rendered(Table("t", "T", "", ("", "one", "two"), (cells,)), store)
    assert '<span class="value">−0.50</span><span class="ci">[−1.25, +0.25]</span>' in text
    assert '<span class="value">+5</span><span class="ci">[+0, +10]</span>' in text


def test_numbers_have_a_real_minus(store: Store) -> None:
    cells = (Cell("Z-1"), Cell("-12.3", -12.34, -14.04, -0.04), Cell("2024-08-01"), Cell("5e-07", 5e-7))
    text = rendered(Table("t", "T", "", ("", "one", "two", "three"), (cells,)), store)
    assert '<span class="value">−12.3</span><span class="ci">[−14.0, +0.0]</span>' in text
    assert all(f">{written}<" in text for written in ("Z-1", "2024-08-01", "5e-07")), "as one types it"


def test_a_long_table_is_folded_and_a_short_one_is_not(store: Store, tmp_path: Path) -> None:
    rows = tuple((Cell(f"m{n}"), Cell("1", 1.0)) for n in range(page.LONG + 1))
    table = Table("t", "T", "", ("Method", "Score"), rows)
    assert f"<summary>All {page.LONG + 1} rows</summary>" in rendered(table, store)
    assert "rows</summary>" not in rendered(replace(table, rows=rows[:-1]), Store(tmp_path / "other"))


def test_a_grade_that_is_no_number_is_none(store: Store) -> None:
    """JSON, which the page is read from, has no NaN."""
    sources = sources_of(store, rows_of("gsm8k", [1.0, None, float("nan"), 0.0]))
    text = page.html(Document("t", sources, ()), [])
    (task,) = json.loads(embedded(text), parse_constant=pytest.fail)["tasks"]
    assert [item["responses"][0].get("grade") for item in task["items"]] == [1.0, None, None, 0.0]


def test_items_on_which_the_models_differ_come_first_then_all_in_order(store: Store) -> None:
    base, one = rows_of("gsm8k", [1, 0, 1, None, 0]), rows_of("gsm8k", [1, 0.5, 0, 1, 1])
    data = side_by_side(sources_of(store, base, one))
    (task,) = data["tasks"]
    assert [item["id"][-1] for item in task["items"]] == ["2", "4", "1", "0", "3"]
    assert task["total"] == 5 and data["models"] == [{"label": "Base", "index": None}, {"label": "BNF", "index": 0}]
    assert [response["model"] for response in task["items"][0]["responses"]] == [0, 1]
    assert "grade" not in next(i for i in task["items"] if i["id"].endswith("3"))["responses"][0], "nobody graded it"
    fewer = side_by_side(sources_of(store, base, one), items=2)
    assert [item["id"][-1] for item in fewer["tasks"][0]["items"]] == ["2", "4"]
    assert fewer["tasks"][0]["total"] == 5


def test_seeds_are_told_apart_and_a_model_without_an_item_has_no_response(store: Store) -> None:
    base = rows_of("gsm8k", [1, 0])
    data = side_by_side(sources_of(store, base, rows_of("gsm8k", [0]), rows_of("gsm8k", [1, 1])))
    assert [model["label"] for model in data["models"]] == ["Base", "BNF, seed 0", "BNF, seed 1"]
    by_id = {item["id"]: [one["model"] for one in item["responses"]] for item in data["tasks"][0]["items"]}
    assert by_id == {"gsm8k-000": [0, 1, 2], "gsm8k-001": [0, 2]}


def test_the_page_holds_no_more_text_than_it_has_room_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of("gsm8k", [1] * 20, "x" * 500) + rows_of("crux", [1] * 20, "y" * 500)
    sources = sources_of(store, rows)
    data = side_by_side(sources, characters=6000)
    assert [len(task["items"]) for task in data["tasks"]] == [5, 5], "half of the room each"
    assert [len(task["items"]) for task in side_by_side(sources, characters=1)["tasks"]] == [1, 1]
    monkeypatch.setattr(responses, "LONGEST", 100)
    cut = side_by_side(sources)["tasks"][0]["items"][0]["responses"][0]["text"]
    assert cut == ["x" * 100, 400]
    said = page.html(Document("t", sources, ()), [])
    assert "gsm8k: 20 of 20; crux: 20 of 20 items" in said


def test_without_responses_or_figures_there_is_no_such_section(store: Store) -> None:
    sources = collect([publish_build(store, records=3)], store)
    made = Page(page.html(Document("Only a build", sources, ()), []))
    assert made.all("section") == []
    assert "0 methods, 0 runs, 0 evaluations" in made.text("header")[0]
