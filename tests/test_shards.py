"""Shards: the same bytes, however the rows came."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bnfctl import shards

SCHEMA = pa.schema([("id", pa.string()), ("ids", shards.IDS), ("turns", shards.MESSAGES), ("reward", pa.float64())])


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"r{i}", "ids": None if i % 5 == 0 else list(range(i % 40)), "reward": None if i % 3 else i / 7,
         "turns": [{"role": "user", "content": "x" * (i % 11)}] * (i % 4)}
        for i in range(count)
    ]  # fmt: skip


def by_hand(folder: Path, count: int) -> None:
    """Each shard from its rows at once."""
    folder.mkdir()
    found = rows(count)
    for start in range(0, max(1, count), shards.SHARD_ROWS):
        table = pa.Table.from_pylist(found[start : start + shards.SHARD_ROWS], schema=SCHEMA)
        path = folder / f"{start // shards.SHARD_ROWS:05d}.parquet"
        pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pieces(count: int, size: int) -> Iterator[pa.Table]:
    """Tables of `size` rows, an empty one between them, each cut out of a larger one."""
    whole = pa.Table.from_pylist(rows(count), schema=SCHEMA)
    for start in range(0, count, size):
        yield whole.slice(start, size)
        yield whole.slice(start, 0)


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 250])
def test_bytes_do_not_show_how_the_rows_came(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 100)
    monkeypatch.setattr(shards, "_BATCH", 7)
    by_hand(tmp_path / "by hand", count)
    expected = contents(tmp_path / "by hand")
    assert shards.write_shards(tmp_path / "rows", iter(rows(count)), SCHEMA) == count
    assert contents(tmp_path / "rows") == expected
    for size in (1, 30, 100, 1000):
        written = shards.write_tables(tmp_path / "tables", shards.recut(pieces(count, size), SCHEMA))
        assert (written, contents(tmp_path / "tables")) == (count, expected)
    parts = shards.Parts(tmp_path / "parts", SCHEMA)
    for unit in reversed(range(0, count, 33)):
        parts.write(unit, rows(count)[unit : unit + 33])
    assert parts.publish(tmp_path / "published") == count
    assert contents(tmp_path / "published") == expected
    assert list(shards.read_rows(tmp_path / "published")) == rows(count)


def test_what_was_there_before_is_gone(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "00007.parquet").write_text("old")
    shards.write_shards(tmp_path / "rows", rows(2), SCHEMA)
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["00000.parquet"]


def test_columns_come_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    shards.write_shards(tmp_path / "rows", rows(3), SCHEMA)
    assert shards.read_table(tmp_path / "rows" / "00000.parquet", ["reward", "id"]).column_names == ["reward", "id"]


def test_no_more_than_a_shard_and_a_table_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 100)
    given = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal given
        for _ in range(20):
            given += 30
            yield pa.Table.from_pylist(rows(30), schema=SCHEMA)

    for number, table in enumerate(shards.recut(tables(), SCHEMA), 1):
        assert given - 100 * (number - 1) < 130 + table.num_rows
    assert given == 600
