"""The items of a benchmark: a hub data set with the number of rows that was published, or a folder of the user's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfctl import console, hub
from bnfctl.artifact import Pinned
from bnfctl.data.files import read_path
from bnfctl.data.jsonl import without_surrogates
from bnfctl.data.sources import read_rows
from bnfctl.errors import UsageError

Rows = Iterator[tuple[str, dict[str, Any]]]

ENDINGS = (".jsonl", ".json", ".ndjson", ".parquet", ".csv")


@dataclass(frozen=True)
class Source:
    """Where a task's items are published."""

    hub: str
    """owner/name@commit; without a commit where the content is checked by its digest.  A stage resolves it with
    `sources.pin_data(source.hub, store, where)` and hands that on."""
    subset: str | None
    split: str
    rows: int
    """In the published set."""
    names: tuple[str, ...]
    """What a file or folder in the user's own folder may be called."""
    digest: str | None = None
    """Of the published content (`zeroeval.digest`), where it is known: figures on other content are not comparable."""
    inside: str = ""
    """Where the name is that of a folder: the file in it."""

    @property
    def wanted(self) -> str:
        """The file that a hint names."""
        return f"{self.names[0]}{self.inside}.jsonl"

    def local(self, data_dir: Path) -> Path:
        """The file or folder with this task's rows: `data_dir` itself where it is a file.

        UsageError says which names were looked for.
        """
        if data_dir.is_file():
            return data_dir
        places = [data_dir / f"{name}{ending}" for name in self.names for ending in (*ENDINGS, "")]
        found = next((place for place in places if place.exists()), None)
        if found is None:
            wanted = " or ".join(f"{name}.jsonl" for name in self.names)
            raise UsageError(
                f"no {wanted} (or .json, .parquet, .csv) in it", where=f"--data-dir {data_dir}",
                hint="one file for each task, with the columns of the published set",
            )  # fmt: skip
        return found


def read_items(source: Source, data_dir: Path | None, pinned: Pinned | None) -> list[tuple[str, dict[str, Any]]]:
    """All ("where", row) in the published order.

    `data_dir`: the user's files; another number of rows than the published one is said, and allowed.  Else the hub, at
    the commit of `pinned` or of the source: another number of rows is a UsageError.
    """
    if data_dir is not None:
        place = source.local(data_dir)
        rows = list(read_path(place, source.split, source.subset) if place.is_dir() else read_file(place))
        if not rows:
            raise UsageError("no items", where=str(place), hint="the file is empty")
        if len(rows) != source.rows:
            console.say_once(
                f"{place}: {len(rows)} items; the published set has {source.rows}, so figures don't compare"
            )
        return rows
    pinned = pinned or current(source)
    rows = list(read_rows(pinned, source.split, source.subset))
    if len(rows) != source.rows:
        raise UsageError(
            f"{len(rows)} rows, where the published set has {source.rows}", where=pinned.ref,
            hint="the data set was changed: --data-dir FOLDER with the published rows",
        )  # fmt: skip
    return rows


def current(source: Source) -> Pinned:
    """The hub's data set at its commit, else at the newest, or the cached one; UsageError where there is neither."""
    commit, why = hub.commit_of(source.hub, "dataset")
    if commit is None:
        hint = f"--data-dir FOLDER with {source.wanted} in it"
        raise UsageError(f"the items cannot be fetched: {why}", where=source.hub, hint=hint)
    return Pinned("hub-data", f"{hub.split_revision(source.hub)[0]}@{commit}", commit)


def read_file(path: Path) -> Rows:
    """("where", row) of one file: a JSON array of objects, or whatever `data.files` reads (JSONL, Parquet, CSV).

    UsageError for a missing or broken file.
    """
    if path.suffix.lower() != ".json" or not path.is_file() or not _is_array(path):
        yield from read_path(path, "test", None)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"broken JSON: {error}", where=str(path), hint="fetch or write the file again") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError(
                f"expected an object, found {type(row).__name__}", where=f"{path} row {number}", hint='[{"id": ...}]'
            )
        yield f"{path} row {number}", without_surrogates(row)


def _is_array(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def text_column(row: dict[str, Any], names: Sequence[str], where: str) -> str:
    """The first of these columns that the row has, as text; UsageError names the columns that are there."""
    for name in names:
        if isinstance(row.get(name), (str, int)) and not isinstance(row[name], bool):
            return str(row[name])
    raise UsageError(
        f"no text in column '{names[0]}'", where=where, hint=f"columns here: {', '.join(map(str, row)) or 'none'}"
    )
