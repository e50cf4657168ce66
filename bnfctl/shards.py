"""Parquet rows: parts while a stage works, shards in input order when it is done.

A part is one durable file of whole records, written as soon as they are ready, in any order.  At publish the
parts are rewritten in input order into shards of fixed size, so that order of completion, number of workers
and interruptions leave no trace in the bytes.
"""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from bnfctl import durable

T = TypeVar("T")
SHARD_ROWS = 8192
"""Rows per shard: about 100 MB of candidates of 2,000 tokens."""

_BATCH = 1024
"""Rows that are Python objects at one time."""

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
IDS = pa.list_(pa.int32())


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    """One Parquet file (zstd), atomically and durably."""
    write_table(path, pa.Table.from_pylist(list(rows), schema=schema))


def write_table(path: Path, table: pa.Table) -> None:
    """The same for rows that are an Arrow table already."""
    durable.write_file(path, lambda temporary: _write(table, temporary))


def _write(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def read_parquet(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of one file, a batch at a time."""
    for batch in _batches(path, columns):
        yield from batch.to_pylist()


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """One file as an Arrow table, its columns in the order that is asked for."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read(columns=columns)
    return table if columns is None else table.select(columns)


def read_rows(folder: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """All rows of a folder of shards, in order, never more than a batch in memory."""
    for path in sorted(folder.glob("*.parquet")):
        yield from read_parquet(path, columns)


def write_shards(folder: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> int:
    """Write rows, already in their final order, as shards of SHARD_ROWS; returns how many rows."""
    return write_tables(folder, recut(tables_of(rows, schema), schema))


def tables_of(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows as Arrow tables of a batch each: as Python objects, token ids take ten times their room."""
    found = iter(rows)
    while batch := list(islice(found, _BATCH)):
        yield pa.Table.from_pylist(batch, schema=schema)


def recut(tables: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """The same rows in tables as large as a shard, one chunk a column, so that the bytes don't show how they came.

    One empty table where there are no rows; never more than a shard and one incoming table in memory.
    """
    pending: list[pa.Table] = []
    held = total = 0
    for table in tables:
        table = table.cast(schema)  # lists that were read from Parquet name their items otherwise
        while held + table.num_rows >= SHARD_ROWS:
            first = table.slice(0, SHARD_ROWS - held)
            yield pa.concat_tables([*pending, first]).combine_chunks()
            table, pending, held, total = table.slice(first.num_rows), [], 0, total + SHARD_ROWS
        if table.num_rows:
            pending.append(table)
            held += table.num_rows
    if held or not total:
        yield pa.concat_tables([*pending, schema.empty_table()]).combine_chunks()


def cut(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """Rows in groups as large as a shard; one empty group where there are none."""
    for start in range(0, max(1, len(rows)), SHARD_ROWS):
        yield rows[start : start + SHARD_ROWS]


def write_tables(folder: Path, tables: Iterable[pa.Table]) -> int:
    """Arrow tables, one a shard, as the only content of a folder; returns how many rows."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    total = 0
    for number, table in enumerate(tables):
        write_table(folder / f"{number:05d}.parquet", table)
        total += table.num_rows
    return total


class Parts:
    """The unfinished rows of a draft: numbered parts, each holding all rows of one unit of work.

    A unit (a chunk of prompts) is done when its part exists, whatever process wrote it.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder, self.schema = folder, schema
        folder.mkdir(parents=True, exist_ok=True)

    def done(self) -> set[int]:
        """The units whose part is whole."""
        return {int(path.stem) for path in self.folder.glob("[0-9]*.parquet")}

    def write(self, unit: int, rows: Sequence[dict[str, Any]]) -> None:
        """Save one unit's rows durably."""
        write_parquet(self.folder / f"{unit:07d}.parquet", rows, self.schema)

    def publish(self, target: Path) -> int:
        """Rewrite all parts in unit order into `target`; returns the number of rows."""
        parts = (read_table(path) for path in sorted(self.folder.glob("*.parquet")))
        return write_tables(target, recut(parts, self.schema))


class Slices:
    """Rows by their number, out of shards; made for readers that go forward: one batch is in memory at a time.

    A step back opens its shard again.
    """

    def __init__(self, files: Iterable[Path], columns: list[str] | None = None) -> None:
        self.files, self.columns = list(files), columns
        sizes = [pq.read_metadata(path).num_rows for path in self.files]
        self._starts = [0, *accumulate(sizes)]
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._shard = -1
        self._first = 0
        """The shard that is open, and the number of the first row of its batch."""

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The rows from `start` up to, not including, `stop`."""
        while start < stop:
            self._seek(start)
            assert self._batch is not None
            part = self._batch.slice(start - self._first, stop - start)
            yield from part.to_pylist()
            start += part.num_rows

    def _seek(self, row: int) -> None:
        shard = bisect_right(self._starts, row) - 1
        if shard != self._shard or row < self._first:
            self._shard, self._first = shard, self._starts[shard]
            self._batches, self._batch = _batches(self.files[shard], self.columns), None
        while self._batch is None or row >= self._first + self._batch.num_rows:
            self._first += self._batch.num_rows if self._batch is not None else 0
            self._batch = next(self._batches)


def _batches(path: Path, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        yield from file.iter_batches(batch_size=_BATCH, columns=columns)
