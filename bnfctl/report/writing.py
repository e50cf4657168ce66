"""Writes a report: DIR/index.html, DIR/report.md and DIR/tables/*.csv, each of them whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bnfctl import durable
from bnfctl.artifact import Artifact, Store
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.report.collect import collect
from bnfctl.report.document import Document, document_of
from bnfctl.report.lineage import lineage_table
from bnfctl.report.table import as_csv, as_markdown, plain_markdown

PAGE, MARKDOWN, TABLES = "index.html", "report.md", "tables"
MARK = "<!-- made by bnfctl report; the next report here replaces it -->"
"""First line of report.md, which is written first: what tells a report of ours, whole or not, from other folders."""


@dataclass(frozen=True)
class Written:
    """Where the report is."""

    index: Path
    markdown: Path
    tables: tuple[Path, ...]


def write(artifacts: Sequence[Artifact], store: Store, out: Path, title: str | None = None) -> Written:
    """Write the report on these artifacts, and what they were made from, into the folder `out`.

    It may be new, empty or hold an earlier report, which is replaced file by file: the page that is there stays readable
    until the new one takes its place.  UsageError, with nothing written, for a folder that holds anything else, and for
    artifacts that cannot be reported on; BnfctlError where the disk does not take it.
    """
    from bnfctl.report.figures import figures
    from bnfctl.report.page import html

    check_folder(out)
    sources = collect(artifacts, store)
    document = document_of(sources, title)
    drawn = figures(sources)
    page = html(document, drawn)
    tables = {f"{table.id}.csv": as_csv(table) for table in (*document.tables, lineage_table(document.lineage))}
    listed = [(figure.title, figure.caption) for figure in drawn]
    try:
        # The mark comes first: what a crash leaves is then known as ours.
        _put(out / MARKDOWN, markdown(document, listed))
        for name, text in tables.items():
            _put(out / TABLES / name, text)
        _put(out / PAGE, page)
        for left in (out / TABLES).iterdir():
            # Temporary files may be those of another report that is written here now.
            if left.name not in tables and not _is_torn(left):
                left.unlink(missing_ok=True)
    except OSError as error:
        what = f"could not write the report: {error.strerror or error}"
        raise BnfctlError(what, where=str(out), hint="check its permissions and the free disk; run it again") from None
    return Written(out / PAGE, out / MARKDOWN, tuple(out / TABLES / name for name in tables))


def _put(path: Path, text: str) -> None:
    """Half of a surrogate pair (an answer of a judge that was cut there) has no bytes: it is written as its escape."""
    durable.write_bytes(path, text.encode(errors="backslashreplace"))


def check_folder(out: Path) -> None:
    """UsageError where `out` is no folder, or holds what no report of ours has written."""
    if not out.exists():
        return
    hint = "a new folder, an empty one, or that of an earlier report"
    if not out.is_dir():
        raise UsageError("a file is in the report's place", where=f"-o {out}", hint=hint)
    names = {path.name for path in out.iterdir() if not _is_torn(path)}
    if not names:
        return
    others = names - {PAGE, MARKDOWN, TABLES}
    if (out / TABLES).is_dir():
        others |= {
            f"{TABLES}/{path.name}" for path in (out / TABLES).iterdir() if path.suffix != ".csv" and not _is_torn(path)
        }
    if not others and not _is_marked(out / MARKDOWN):
        others = names
    if others:
        what = f"this folder holds other things: {', '.join(sorted(others)[:3])}"
        raise UsageError(what, where=f"-o {out}", hint=hint)


def _is_torn(path: Path) -> bool:
    """A temporary file of ours, which a crash left."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _is_marked(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().rstrip("\n") == MARK
    except (OSError, UnicodeDecodeError):
        return False


def markdown(document: Document, figures: Sequence[tuple[str, str]] = ()) -> str:
    """report.md: title, notes, tables, lineage.  figures: (title, caption) of those that are in the page."""
    parts = [MARK, f"# {plain_markdown(document.title)}"]
    parts += [f"> {plain_markdown(note)}" for note in document.notes]
    parts += [as_markdown(table).rstrip("\n") for table in document.tables]
    if figures:
        lines = [f"- **{plain_markdown(title)}**: {plain_markdown(caption)}" for title, caption in figures]
        parts += [f"### Figures\n\nThey are in [{PAGE}]({PAGE}).", "\n".join(lines)]
    parts.append(as_markdown(lineage_table(document.lineage)).rstrip("\n"))
    return "\n\n".join(parts) + "\n"
