"""A table of the report: cells with a text and, where they are numbers, the number, its interval and its rank.

Every cell says in `title` where its number comes from; CSV gives value, interval and rank columns of their own.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

DASH = "–"
"""Stands where there is no number; the cell's title says why."""


@dataclass(frozen=True)
class Cell:
    """What a table shows in one place."""

    text: str
    """The bare number as it is printed, or words."""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    rank: float | None = None
    title: str = ""
    """Where the number comes from (artifacts), or why there is none."""
    sd: float | None = None
    """Over training seeds."""
    best: bool = False
    """The best of its column: shown bold."""


@dataclass(frozen=True)
class Table:
    """A table with its caption."""

    id: str
    """Of its file and of its place in the page."""
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    warnings: tuple[str, ...] = ()
    """What a reader must know before comparing the numbers; shown above them."""
    groups: tuple[tuple[str, int], ...] = ()
    """Headings over several columns: (heading, columns), from the left; all columns, or none."""


def printable(text: str) -> str:
    """A text whose control characters, turned directions, line ends and lone surrogates are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_MARKUP = str.maketrans({**{c: f"\\{c}" for c in "\\`*_{}[]#|~$"}, "<": "&lt;", ">": "&gt;", "&": "&amp;"})


def plain_markdown(text: str) -> str:
    """A text as Markdown shows it, on one line: nothing in it is markup or HTML."""
    return printable(text.replace("\n", " ").replace("\r", " ")).translate(_MARKUP)


def as_markdown(table: Table) -> str:
    """The table as a pipe table under its title, with its warnings above; group headings become part of the columns."""
    parts = [f"### {plain_markdown(table.title)}"]
    parts += [f"> **Warning:** {plain_markdown(warning)}" for warning in table.warnings]
    if table.rows:
        lines = [_line(plain_markdown(name) for name in headings(table)), _line("---" for _ in table.columns)]
        lines += [_line(_marked(cell) for cell in row) for row in table.rows]
        parts.append("\n".join(lines))
    if table.caption:
        parts.append(plain_markdown(table.caption))
    return "\n\n".join(parts) + "\n"


def headings(table: Table) -> list[str]:
    """The columns with their group's heading before them."""
    over = [heading for heading, count in table.groups for _ in range(count)] or [""] * len(table.columns)
    return [f"{group}: {name}" if group else name for group, name in zip(over, table.columns, strict=True)]


def pieces(cell: Cell) -> dict[str, str]:
    """What a cell shows beside its text, as far as it has it: sd "± 0.4", rank "(2)", ci "[76.1, 80.8]".

    All have the decimals of the number; bounds of a number with a sign have one too.
    """
    fraction = re.search(r"\.(\d+)", cell.text)
    decimals = len(fraction[1]) if fraction else 0
    sign = "+" if cell.text[:1] in ("+", "-") else ""
    found = {}
    if cell.sd is not None:
        found["sd"] = f"± {fixed(cell.sd, decimals)}"
    if cell.rank is not None:
        found["rank"] = f"({cell.rank:g})"
    if cell.low is not None and cell.high is not None:
        found["ci"] = f"[{fixed(cell.low, decimals, sign)}, {fixed(cell.high, decimals, sign)}]"
    return found


def shown(cell: Cell) -> str:
    """A cell on one line: 78.5 ± 0.4 (2) [76.1, 80.8]."""
    return " ".join([cell.text, *pieces(cell).values()])


def number(value: float | None, decimals: int = 2, title: str = "", sign: str = "") -> Cell:
    """A cell with a number, or a dash where there is none."""
    if value is None or not math.isfinite(value):
        return Cell(DASH, title=title)
    return Cell(fixed(value, decimals, f"{sign},").replace(",", "" if abs(value) < 10000 else ","), value, title=title)


def fixed(value: float, decimals: int, form: str = "") -> str:
    """A number with so many decimals; form: "+" for a sign, "," between thousands.  No zero is negative."""
    return f"{round(value, decimals) + 0.0:{form}.{decimals}f}"


def finite(*bounds: float) -> tuple[float | None, ...]:
    """The ends of an interval; None for one that there is not."""
    return tuple(bound if math.isfinite(bound) else None for bound in bounds)


def _marked(cell: Cell) -> str:
    text = plain_markdown(shown(cell))
    return f"**{text}**" if cell.best and text else text


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def as_csv(table: Table) -> str:
    """The table for programs: a column of numbers is followed by its low, high, sd and rank, where any row has them.

    A column without numbers is its text.  Numbers are in full precision; an empty field is no number, or no text.
    """
    names: list[str] = []
    columns: list[list[str]] = []
    for place, name in enumerate(headings(table)):
        cells = [row[place] for row in table.rows]
        if all(cell.value is None for cell in cells):
            names.append(name)
            columns.append(["" if cell.text == DASH else _harmless(cell.text) for cell in cells])
            continue
        for part, suffix in (("value", ""), ("low", " low"), ("high", " high"), ("sd", " sd"), ("rank", " rank")):
            values = [getattr(cell, part) for cell in cells]
            if part == "value" or any(value is not None for value in values):
                names.append(name + suffix)
                columns.append(["" if value is None else repr(value) for value in values])
        names.append(f"{name} source")
        columns.append([_harmless(cell.title) for cell in cells])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_harmless, names))
    writer.writerows(zip(*columns, strict=True))
    return out.getvalue()


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""What a spreadsheet's formula begins with, in some languages in wide characters."""


def _harmless(text: str) -> str:
    """A text that no spreadsheet takes for a formula, on one line."""
    return f"'{printable(text)}" if text.startswith(_FORMULA) else printable(text)
