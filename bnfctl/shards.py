"""Parquet rows: parts while a stage works, shards in input order when it is done.

A part is one durable file of whole records, written as soon as they are ready, in any order.  At publish the
parts are rewritten in input order into shards of fixed size, so that order of completion, number of workers
and interruptions leave no trace in the bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from bnfctl import durable

T = TypeVar("T")
SHARD_ROWS = 8192
"""Rows per shard: about 100 MB of candidates of 2,000 tokens."""

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
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            yield from batch.to_pylist()


def read_rows(folder: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """All rows of a folder of shards, in order, never more than a batch in memory."""
    for path in sorted(folder.glob("*.parquet")):
        yield from read_parquet(path, columns)


def write_shards(folder: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> int:
    """Write rows, already in their final order, as shards of SHARD_ROWS; returns how many rows."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    total, pending = 0, []
    for row in rows:
        pending.append(row)
        if len(pending) == SHARD_ROWS:
            write_parquet(folder / f"{total // SHARD_ROWS:05d}.parquet", pending, schema)
            total, pending = total + len(pending), []
    if pending or not total:
        write_parquet(folder / f"{total // SHARD_ROWS:05d}.parquet", pending, schema)
    return total + len(pending)


def cut(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """Rows in groups as large as a shard; one empty group where there are none."""
    for start in range(0, max(1, len(rows)), SHARD_ROWS):
        yield rows[start : start + SHARD_ROWS]


def write_tables(folder: Path, tables: Iterable[pa.Table]) -> None:
    """Arrow tables, one a shard, as the only content of a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, table in enumerate(tables):
        write_table(folder / f"{number:05d}.parquet", table)


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
        return write_shards(target, read_rows(self.folder), self.schema)
