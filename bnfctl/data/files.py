"""Rows of files and folders: JSON Lines, CSV, Parquet, a folder saved by `datasets`, a folder of data files.

Everything streams, and every row says where it comes from: `file:line` where a file has lines, else `file row N`
with N from 1.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bnfctl import console
from bnfctl.data.jsonl import read_jsonl, read_lines, without_surrogates
from bnfctl.errors import UsageError, nearest

Rows = Iterator[tuple[str, dict[str, Any]]]

_BATCH = 256
"""Rows of Parquet in memory at a time: responses of 10 kB make that some megabytes."""
_READ_BYTES = 2**20
"""Of a Parquet column at a time."""
_LONGEST_CELL = 2**31 - 1
"""csv's own limit of 131,072 characters is less than a long response."""
_SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""The words in a file's name that `datasets` takes for a split."""


def read_path(path: Path, split: str, subset: str | None, again: bool = False) -> Rows:
    """The rows of a file, whatever its split is called, or of one split (`train+test` joins some) of a folder.

    A file is read by its ending: .parquet, .csv, .tsv, else JSON Lines.  Where a folder has more than the default split,
    that is said on stderr, but not when it is read `again`.  UsageError names file and row.
    """
    for file in _split_files(path, split, subset, again) if path.is_dir() else [path]:
        yield from _READERS.get(file.suffix.lower(), read_jsonl)(file)


def read_csv(path: Path) -> Rows:
    """The rows below the header line; where a cell holds a JSON list of chat turns, that list.

    An empty cell is an empty text.  UsageError for a row with more or fewer cells than the header, for broken quotes,
    and for a column name that is there twice.
    """
    csv.field_size_limit(_LONGEST_CELL)
    lines = csv.reader(read_lines(path), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{lines.line_num + 1}"
        try:
            cells = next(lines, None)
        except csv.Error as error:
            hint = 'put text with commas, quotes or newlines into quotes, and double the quotes in it: "a ""b"""'
            raise UsageError(f"broken CSV: {error}", where=where, hint=hint) from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _checked_header(cells, where)
            continue
        if len(cells) != len(header):
            raise UsageError(
                f"{len(cells)} cells in a row, {len(header)} in the header", where=where,
                hint="put text with commas or newlines into quotes",
            )  # fmt: skip
        yield where, {name: _cell(cell) for name, cell in zip(header, cells, strict=True)}


def _checked_header(names: list[str], where: str) -> list[str]:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two columns are called '{twice}'", where=where, hint="rename one of them")
    return names


def _cell(text: str) -> Any:
    """A list of chat turns that is written out as JSON, or the text itself."""
    if text.startswith("[") and '"role"' in text:
        try:
            turns = json.loads(text)
            if isinstance(turns, list) and all(isinstance(turn, dict) and "role" in turn for turn in turns):
                return without_surrogates(turns)
        except (ValueError, RecursionError):
            pass  # a response may well look like a list
    return text


def read_parquet(path: Path) -> Rows:
    """The rows of a Parquet file, some hundred in memory at a time."""
    try:
        # without these two, all that is compressed of a row group is in memory at once, and many sets are one group
        file = pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False, buffer_size=_READ_BYTES)
    except Exception as error:  # pyarrow raises many types for a broken file
        raise UsageError(f"not a readable Parquet file: {_first_line(error)}", where=str(path), hint=_REMAKE) from None
    with file:
        yield from _batches(path, file.schema_arrow, file.iter_batches(batch_size=_BATCH))


def read_arrow(path: Path) -> Rows:
    """The rows of an Arrow stream, which is what `save_to_disk` writes."""
    try:
        source = pa.memory_map(str(path))
        stream = pa.ipc.open_stream(source)
    except Exception as error:  # as above
        raise UsageError(f"not a readable Arrow file: {_first_line(error)}", where=str(path), hint=_REMAKE) from None
    with source, stream:
        pieces = (batch.slice(start, _BATCH) for batch in stream for start in range(0, batch.num_rows, _BATCH))
        yield from _batches(path, stream.schema, pieces)


_REMAKE = "fetch or write the file again"
_READERS: dict[str, Callable[[Path], Rows]] = {
    ".parquet": read_parquet, ".arrow": read_arrow, ".csv": read_csv, ".tsv": read_csv,
}  # fmt: skip
FILE_ENDINGS = (*_READERS, ".jsonl", ".json", ".ndjson")
_FOLDER_ENDINGS = (".parquet", ".jsonl", ".csv", ".tsv", ".ndjson", ".json")
"""The first of which there are files is what the folder holds."""
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What `datasets` writes beside the rows."""
_DEFAULT_SPLIT = "train"


def _batches(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Rows:
    _checked_header(schema.names, str(path))
    number = 0
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # a flipped byte can come out as any of pyarrow's errors
            where = f"{path} row {number + 1} or later"
            raise UsageError(f"cannot be read: {_first_line(error)}", where=where, hint=_REMAKE) from None
        if batch is None:
            return
        for row in _rows_of(batch, path, number):
            number += 1
            yield f"{path} row {number}", row


def _rows_of(batch: pa.RecordBatch, path: Path, before: int) -> list[dict[str, Any]]:
    try:
        return list(batch.to_pylist())
    except Exception:  # text that is not UTF-8, a date out of range: find the row
        for index in range(batch.num_rows):
            try:
                batch.slice(index, 1).to_pylist()
            except Exception as error:
                where = f"{path} row {before + index + 1}"
                raise UsageError(f"cannot be read: {_first_line(error)}", where=where, hint=_REMAKE) from None
        raise


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _split_files(folder: Path, split: str, subset: str | None, again: bool) -> list[Path]:
    """The files of one split, in order; UsageError lists the splits that are there."""
    if subset is not None:
        if not (folder / subset).is_dir():
            raise UsageError(f"no subset '{subset}'", where=str(folder), hint="the name of a folder in it")
        folder = folder / subset
    splits = _saved_splits(folder) or _named_splits(folder)
    if not splits:
        raise UsageError("no data files in this folder", where=str(folder), hint="Parquet, JSONL or CSV files")
    wanted = split.split("+")
    for name in wanted:
        if name not in splits:
            hint = f"--split {'+'.join(splits)}"
            raise UsageError(f"no split '{name}'{nearest(name, splits)}", where=str(folder), hint=hint)
    unread = [name for name, files in splits.items() if not any(files == splits[one] for one in wanted)]
    if unread and split == _DEFAULT_SPLIT and not again:
        joined = "+".join([split, *unread])
        console.say(f"{folder}: only split {split} is read, not {', '.join(unread)}: --split {joined} reads all")
    return [file for name in wanted for file in splits[name]]


def _saved_splits(folder: Path) -> dict[str, list[Path]]:
    """What `save_to_disk` of a Dataset ("train" then) or of a DatasetDict left; empty where it is no such folder."""
    if (folder / "dataset_dict.json").is_file():
        names = _listed(folder / "dataset_dict.json", "splits")
        return {str(name): _saved_files(folder / str(name)) for name in names}
    if not (folder / "state.json").is_file():
        return {}
    files = _saved_files(folder)
    named = _json(folder / "state.json").get("_split")
    return {"train": files, **({str(named): files} if named else {})}


def _saved_files(folder: Path) -> list[Path]:
    entries = _listed(folder / "state.json", "_data_files")
    if _json(folder / "state.json").get("_indices_data_files"):
        raise UsageError(
            "saved with an index, by an old version of datasets", where=str(folder),
            hint="load it with datasets, call flatten_indices(), and save it again",
        )  # fmt: skip
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    if not all(isinstance(name, str) for name in names):
        raise UsageError("_data_files is not a list of file names", where=str(folder / "state.json"), hint=_REMAKE)
    return [folder / str(name) for name in names]


def _listed(file: Path, name: str) -> list[Any]:
    value = _json(file).get(name)
    if not isinstance(value, list):
        raise UsageError(f"{name} is not a list", where=str(file), hint="save the data set again")
    return value


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"not readable: {_first_line(error)}", where=str(file), hint="save the data set again"
        ) from None
    return value if isinstance(value, dict) else {}


def _named_splits(folder: Path) -> dict[str, list[Path]]:
    """Split -> files, by the names that hub repositories and `bnfctl export` use; one kind of file only."""
    for ending in _FOLDER_ENDINGS:
        splits: dict[str, list[Path]] = {}
        for file in sorted(folder.rglob(f"*{ending}")):
            inside = file.relative_to(folder)
            if file.is_file() and file.name not in _ABOUT and not any(part.startswith(".") for part in inside.parts):
                splits.setdefault(_split_of(inside), []).append(file)
        if splits:
            return splits
    return {}


def _split_of(file: Path) -> str:
    """`data/train_prefs-00000-of-00001.parquet` is of train_prefs, `test/0000.parquet` of test, `x.parquet` of train."""
    if numbered := re.match(r"(.+?)-\d+-of-\d+", file.stem):
        return numbered[1]
    for part in (file.stem, *reversed(file.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return "train"
