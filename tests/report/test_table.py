"""Tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io

from bnfctl.report.table import DASH, Cell, Table, as_csv, as_markdown, fixed, number, plain_markdown, shown

TABLE = Table(
    "t", "A <b>title</b>", "Caption | with * marks.", ("Method", "Score", "Why"),
    (
        (Cell("=cmd|x"), Cell("62.4", 62.41, 60.0, 64.96, 2.0, "eval/1", 0.82), Cell("a | b\n`c`")),
        (Cell("BNF"), Cell("70.0", 70.0, best=True), Cell("<script>")),
        (Cell("none"), Cell("–", title="not evaluated"), Cell("")),
    ),
    ("do not compare",), (("", 1), ("Bench", 1), ("", 1)),
)  # fmt: skip


def test_markdown_shows_numbers_whole_and_nothing_else_as_markup() -> None:
    lines = as_markdown(TABLE).splitlines()
    assert lines[0] == "### A &lt;b&gt;title&lt;/b&gt;"
    assert "> **Warning:** do not compare" in lines
    assert "| Method | Bench: Score | Why |" in lines
    assert "| =cmd\\|x | 62.4 ± 0.8 (2) \\[60.0, 65.0\\] | a \\| b \\`c\\` |" in lines
    assert "| BNF | **70.0** | &lt;script&gt; |" in lines
    assert "<" not in as_markdown(TABLE).replace("&lt;", "")


def test_csv_has_a_column_for_each_number() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(TABLE))))
    assert list(rows[0]) == [
        "Method", "Bench: Score", "Bench: Score low", "Bench: Score high", "Bench: Score sd", "Bench: Score rank",
        "Bench: Score source", "Why",
    ]  # fmt: skip
    assert [float(rows[0][f"Bench: Score{part}"]) for part in ("", " low", " high", " sd", " rank")] == [
        62.41, 60.0, 64.96, 0.82, 2.0,
    ]  # fmt: skip
    assert rows[0]["Method"] == "'=cmd|x"  # no formula for a spreadsheet
    assert (rows[2]["Bench: Score"], rows[2]["Bench: Score source"]) == ("", "not evaluated")


def test_a_text_in_a_csv_is_no_formula_has_no_hidden_characters_and_no_dash() -> None:
    given = ("=1+1", "+1", "-1", "@x", "\t=1", "\n=1", "＝1", "a\x00b", "\u202egnp", "half \ud83d", "数", DASH)
    said = ("'=1+1", "'+1", "'-1", "'@x", "'\\t=1", "'\\n=1", "'＝1", "a\\x00b", "\\u202egnp", "half \\ud83d", "数", "")
    made = as_csv(Table("t", "t", "", ("=name",), tuple((Cell(text),) for text in given)))
    assert [row[0] if row else "" for row in csv.reader(io.StringIO(made))] == ["'=name", *said]
    assert "\u202e" not in plain_markdown("a\u202eb") and plain_markdown("a\nb\x07") == "a b\\\\x07"


def test_bounds_have_the_numbers_decimals_and_sign() -> None:
    assert shown(Cell("+1.25", 1.25, -0.5, 3.0)) == "+1.25 [-0.50, +3.00]"
    assert shown(Cell("469 ↓", 469, 450.4, 480.6)) == "469 ↓ [450, 481]"
    assert shown(Cell("0.0", -0.04, -0.04, 0.04)) == "0.0 [0.0, 0.0]"
    assert [fixed(-0.004, 2, "+"), fixed(-0.005001, 2), fixed(-12345.6, 0, ",")] == ["+0.00", "-0.01", "-12,346"]
    assert shown(Cell("12 : 5, p 0.14", 0.14)) == "12 : 5, p 0.14"


def test_what_is_no_number_is_a_dash() -> None:
    assert number(float("nan"), title="why") == Cell("–", title="why")
    assert number(None).value is None
    assert (
        number(11160, 0).text == "11,160" and number(8607, 0).text == "8607" and number(2.5, 1, sign="+").text == "+2.5"
    )
