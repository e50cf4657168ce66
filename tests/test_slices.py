"""Rows by their number, across shards and batches."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest

from bnfctl import shards

SCHEMA = pa.schema([("number", pa.int64()), ("text", pa.string())])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shards, "SHARD_ROWS", 100)
    monkeypatch.setattr(shards, "_BATCH", 32)
    shards.write_shards(tmp_path, ({"number": i, "text": str(i)} for i in range(430)), SCHEMA)
    assert len(list(tmp_path.iterdir())) == 5
    return tmp_path


def test_any_range_in_any_order(folder: Path) -> None:
    rows = shards.Slices(sorted(folder.iterdir()), ["number"])
    ranges = [(0, 430), (0, 1), (429, 430), (95, 105), (99, 100), (100, 101), (31, 33), (7, 7), (250, 430)]
    rng = random.Random(0)
    ranges += [tuple(sorted(rng.sample(range(431), 2))) for _ in range(50)]  # type: ignore[misc]
    for start, stop in ranges:
        assert [row["number"] for row in rows.read(start, stop)] == list(range(start, stop))


def test_a_reader_that_goes_forward_opens_each_shard_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    inner = shards._batches

    def counted(path: Path, columns: list[str] | None) -> object:
        opened.append(path.name)
        return inner(path, columns)

    monkeypatch.setattr(shards, "_batches", counted)
    rows = shards.Slices(sorted(folder.iterdir()))
    for start in range(0, 430, 17):
        list(rows.read(start, min(start + 9, 430)))
    assert opened == [f"{number:05d}.parquet" for number in range(5)]


def test_shards_without_rows_are_passed_over(tmp_path: Path) -> None:
    shards.write_tables(tmp_path, [SCHEMA.empty_table(), *shards.tables_of([{"number": 1, "text": "a"}], SCHEMA)])
    assert list(shards.Slices(sorted(tmp_path.iterdir())).read(0, 1)) == [{"number": 1, "text": "a"}]
