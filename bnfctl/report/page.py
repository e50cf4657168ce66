"""The report as one HTML page that needs nothing else: no network, no other file, no font.

Everything that a model or a user wrote is escaped here: texts by `html.escape`, the responses as JSON that the page's
one script puts into text nodes.  A security policy in the page names that script and the style by their hashes, so that
nothing else could run or be fetched even if an escape were missing.  No dates: an equal report has equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from bnfctl.report.document import Document
from bnfctl.report.figures_svg import Figure
from bnfctl.report.responses import side_by_side
from bnfctl.report.table import Cell, Table, pieces

SECTIONS = {
    "shifts": (
        "What training moved",
        "Policy against reference on greedy responses, token by token: figures 3 and 4 of the paper.",
    ),
    "training": ("Training", "What the trainings wrote down about themselves, step by step."),
    "builds": ("Preference data", "Rewards, margins and lengths of the responses that were trained on."),
}
"""Id -> title and first line; a table of that id stands above the section's figures."""
LONG = 24
"""Rows of a table that is folded up."""
_POLICY = "default-src 'none'; style-src '{style}'; script-src '{script}'; base-uri 'none'; form-action 'none'"
_MARK = re.compile(r"\{\{(\w+)\}\}")

Part = tuple[str, str, str, list[tuple[str, str]]]
"""A section: id, title, HTML, and (id, title) of what the contents list under it."""


def html(document: Document, figures: Sequence[Figure]) -> str:
    """The whole page.  Raises BnfctlError where an artifact's rows are not what its manifest says."""
    data = side_by_side(document.sources)
    parts = [*_results(document), *_figures(document, figures), *_responses(data), *_lineage(document)]
    style, script = _file("page.css"), _file("page.js")
    policy = _POLICY.format(style=_hash(style), script=_hash(script))
    return _filled(
        _file("page.html"), title=escape(document.title), policy=escape(policy), style=style, script=script,
        lede=_lede(document), contents=_contents(parts), sections="\n".join(_section(part) for part in parts),
        data=embedded(data),
    )  # fmt: skip


@cache
def _file(name: str) -> str:
    return files("bnfctl.report").joinpath(name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _filled(template: str, **values: str) -> str:
    """In one pass, so that what looks like a place for text inside a text is left alone."""
    return _MARK.sub(lambda found: values[found[1]], template)


def embedded(data: Any) -> str:
    """JSON inside a <script>: no character of it can end the element, open a comment, or end a line of JavaScript."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _section(part: Part) -> str:
    id_, title, inner, _ = part
    return f'<section id="{id_}" aria-labelledby="{id_}-title">{_heading(2, id_, title)}\n{inner}\n</section>'


def _heading(level: int, id_: str, title: str) -> str:
    link = f'<a class="anchor" href="#{escape(id_)}" aria-label="Link to {escape(title)}">#</a>'
    return f'<h{level} id="{escape(id_)}-title">{escape(title)}{link}</h{level}>'


def _contents(parts: Sequence[Part]) -> str:
    def listed(entries: Iterable[tuple[str, str, str]]) -> str:
        lines = "".join(
            f'<li><a href="#{escape(id_)}">{escape(title)}</a>{inner}</li>' for id_, title, inner in entries
        )
        return f"<ul>{lines}</ul>" if lines else ""

    return listed((id_, title, listed((one, said, "") for one, said in inside)) for id_, title, _, inside in parts)


def _lede(document: Document) -> str:
    sources = document.sources
    methods = [method for method in sources.methods if not method.is_base]
    runs = sum(len(method.runs) for method in methods)
    bases = [base for base in dict.fromkeys(method.base for method in sources.methods) if base]
    said = f"{_counted(len(methods), 'method')}, {_counted(runs, 'run')}, {_counted(len(sources.evals), 'evaluation')}"
    said += f", from {', '.join(bases)}" if bases else ""
    lines = [
        f"{said}.",
        "Hold the pointer over a number for the artifact that it comes from; the lineage is at the end.",
    ]
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _results(document: Document) -> Iterator[Part]:
    notes = "".join(f"<li>{escape(note)}</li>" for note in document.notes)
    inner = f'<ul class="notes">{notes}</ul>\n' if notes else ""
    tables = [table for table in document.tables if table.id not in SECTIONS]
    inner += "\n".join(map(_table, tables))
    if inner:
        yield "results", "Results", inner, [(_place(table), table.title) for table in tables]


def _table(table: Table) -> str:
    warnings = "".join(f'<p class="warning"><strong>Warning:</strong> {escape(one)}</p>' for one in table.warnings)
    rows = _rows(table) if table.rows else ""
    if len(table.rows) > LONG:
        rows = f"<details><summary>All {len(table.rows):,} rows</summary>{rows}</details>"
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    heading = _heading(3, _place(table), table.title)
    return f'<div class="table" id="{_place(table)}">{heading}{warnings}{rows}{caption}</div>'


def _place(table: Table) -> str:
    """Tables, figures and sections may share a name."""
    return f"table-{escape(table.id)}"


def _rows(table: Table) -> str:
    numeric = [any(row[place].value is not None for row in table.rows) for place in range(len(table.columns))]
    head = ""
    if table.groups:
        cells = "".join(
            f'<th colspan="{count}" scope="colgroup" class="group">{f"<span>{escape(name)}</span>" if name else ""}</th>'
            for name, count in table.groups
        )
        head = f"<tr>{cells}</tr>"
    columns = "".join(
        f'<th scope="col"{_numeric(number)}>{escape(name)}</th>'
        for name, number in zip(table.columns, numeric, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row"{_title(row[0])}>{escape(row[0].text)}</th>'
        f"{''.join(_cell(cell, number) for cell, number in zip(row[1:], numeric[1:], strict=True))}</tr>"
        for row in table.rows
    )
    name = escape(table.title)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table><caption class="sr">{name}</caption>'
        f"<thead>{head}<tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _numeric(number: bool) -> str:
    return ' class="num"' if number else ""


def _title(cell: Cell) -> str:
    return f' title="{escape(cell.title)}"' if cell.title else ""


def _cell(cell: Cell, numeric: bool) -> str:
    text = cell.text if cell.value is None else _with_minus(cell.text)
    inner = f'<span class="value">{escape(text)}</span>'
    for name, piece in pieces(cell).items():
        # The interval stands on a line of its own.
        inner += f'<span class="{name}">{"" if name == "ci" else " "}{_with_minus(piece)}</span>'
    classes = " ".join(filter(None, ["num" if numeric else "text", "best" if cell.best else ""]))
    return f'<td class="{classes}"{_title(cell)}>{inner}</td>'


def _with_minus(number: str) -> str:
    return re.sub(r"(?<!\w)-(?=\d)", "−", number)


def _figures(document: Document, figures: Sequence[Figure]) -> Iterator[Part]:
    for section, (title, lead) in SECTIONS.items():
        mine = [figure for figure in figures if figure.section == section]
        about = [table for table in document.tables if table.id == section]
        if mine or about:
            inner = f'<p class="lead">{escape(lead)}</p>{"".join(map(_table, about))}'
            inner += f'<div class="figures">{"".join(map(_figure, mine))}</div>'
            listed = [(_place(table), table.title) for table in about]
            yield section, title, inner, [*listed, *((figure.id, figure.title) for figure in mine)]


def _figure(figure: Figure) -> str:
    id_ = escape(figure.id)
    numbers = ""
    if len(figure.numbers) > 1:
        head, *body = figure.numbers
        columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
        rows = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
            for row in body
        )
        table = f'<table><caption class="sr">The numbers of {escape(figure.title)}</caption><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table>'
        box = f'<div class="scroll" tabindex="0" role="region" aria-label="The numbers of {escape(figure.title)}">'
        numbers = f"<details><summary>The numbers</summary>{box}{table}</div></details>"
    return (
        f'<figure class="card{" wide" if figure.wide else ""}" id="{id_}">{_heading(3, figure.id, figure.title)}'
        f'<div class="plot" role="group" aria-describedby="{id_}-alt">{figure.svg}</div>'
        f'<p class="sr" id="{id_}-alt">{escape(figure.alt)}</p>'
        f"<figcaption>{escape(figure.caption)}</figcaption>{numbers}</figure>\n"
    )


def _responses(data: dict[str, Any]) -> Iterator[Part]:
    tasks = [task for task in data["tasks"] if task["items"]]
    if not tasks:
        return
    counts = "; ".join(f"{task['name']}: {len(task['items']):,} of {task['total']:,}" for task in tasks)
    order = (
        "those whose grades differ most between the models first, then in order"
        if len(data["models"]) > 1
        else "in order"
    )
    options = "".join(f"<option>{escape(task['name'])}</option>" for task in tasks)
    yield (
        "responses",
        "Responses side by side",
        f"""\
<p class="lead">A sample of the items, {order}.  In this page are {escape(counts)} items.  All of them are in the artifacts:
<code>bnfctl show REF --rows N</code>.</p>
<noscript><p class="warning">The responses need the page's script, which is turned off.</p></noscript>
<div class="controls" role="search" hidden>
<label class="grow" for="search">Search prompts and responses<input type="search" id="search" autocomplete="off" spellcheck="false"></label>
<label for="task">Task<select id="task"><option value="">all tasks</option>{options}</select></label>
<label class="check" for="differ"><input type="checkbox" id="differ">grades differ</label>
<details><summary>Models</summary><ul id="models"></ul></details>
</div>
<p id="found" class="muted" role="status"></p>
<div id="items"></div>
<button type="button" id="more" hidden>Show more</button>""",
        [],
    )


def _lineage(document: Document) -> Iterator[Part]:
    if document.lineage:
        known = {str(entry["ref"]) for entry in document.lineage}
        entries = "".join(_lineage_entry(entry, known) for entry in document.lineage)
        lead = "Every artifact that a number of this page comes from, inputs before what was made from them."
        yield "lineage", "Lineage", f'<p class="lead">{lead}</p><div class="lineage">{entries}</div>', []


def _lineage_entry(entry: dict[str, Any], known: set[str]) -> str:
    name = f" <strong>{escape(entry['name'])}</strong>" if entry.get("name") else ""
    lines = [("digest", f"<code>{escape(str(entry['digest']))}</code>")] if entry.get("digest") else []
    inputs = "".join(
        f"<li>{escape(kind)}: {_linked(str(one.get('ref')), known)} "
        f'<span class="muted">{escape(str(one.get("digest"))[:12])}</span></li>'
        for kind, one in (entry.get("inputs") or {}).items()
    )
    lines += [("inputs", f"<ul>{inputs}</ul>")] if inputs else []
    for title in ("config", "provenance"):
        values = "".join(
            f"<li>{escape(str(key))}: {escape(_value(value))}</li>" for key, value in (entry.get(title) or {}).items()
        )
        lines += [(title, f"<ul>{values}</ul>")] if values else []
    lines += [("again with", f"<pre>{escape(entry['command'])}</pre>")] if entry.get("command") else []
    inner = "".join(f"<dt>{title}</dt><dd>{said}</dd>" for title, said in lines)
    ref = str(entry["ref"])
    # The id is inside: a browser that is sent to it unfolds what is around it.
    return f'<details><summary><code>{escape(ref)}</code>{name}</summary><dl id="{_anchor(ref)}">{inner}</dl></details>'


def _anchor(ref: str) -> str:
    return f"made-{escape(ref).replace('/', '-')}"


def _linked(ref: str, known: set[str]) -> str:
    shown = f"<code>{escape(ref)}</code>"
    return f'<a href="#{_anchor(ref)}">{shown}</a>' if ref in known else shown


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
