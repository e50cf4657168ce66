"""1,000 broken files through plan and run: a good artifact that accounts for every row, or an error with file and row.

The rows are counted here without bnfctl's readers.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnfctl.artifact import Store
from bnfctl.config import BuildConfig, GenerateConfig
from bnfctl.data.sources import pin_data, read_prompts
from bnfctl.errors import BnfctlError
from tests.stages.chain import run

Row = dict[str, Any]

BUDGET = settings(
    max_examples=250, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)  # fmt: skip

USER = {"role": "user", "content": "Hi?", "name": None}
TURNS = [USER, {"role": "assistant", "content": "Hello"}]
GOOD: dict[str, list[Row]] = {
    "responses": [
        {"id": "a", "prompt": "1?", "answer": "1", "responses": ["1", "2"]},
        {"prompt_id": "b", "messages": [USER], "all_generated_responses": ["x", "y", "z"]},
        {"prompt": "1?", "response": {"text": "1", "model": "m"}},
        {"prompt": "1?", "response": "3"},
    ],
    "prompts": [
        {"id": "a", "prompt": "1?", "answer": "1"},
        {"prompt": "2?"},
        {"prompt": "2?", "answer": 3},
        {"messages": TURNS},
    ],
    "preference": [
        {"id": "a", "prompt": "1?", "chosen": "yes", "rejected": "no", "score_chosen": 1.5},
        {"prompt": "1?", "chosen": TURNS, "rejected": [USER, {"role": "assistant", "content": "No"}]},
        {"chosen": "Q: 1? A: yes", "rejected": "Q: 1? A: no", "all_rm_scores": [0.5, 2]},
        {"prompt": [USER], "chosen": [TURNS[1]], "rejected": "same", "chosen_reward": None},
    ],
    "feedback": [
        {"prompt": "1?", "response": "yes", "label": "up"},
        {"prompt": [USER], "completion": [TURNS[1]], "label": False},
        {"prompt": "1?", "response": "no", "label": -1, "reward": 3},
        {"completion": TURNS, "label": "thumbs_down"},
    ],
}
"""Rows of every kind that is read; `GOOD` as it is makes an artifact."""

COLUMNS = sorted({name for rows in GOOD.values() for row in rows for name in row})
ODD_TEXTS = ["", " ", "\u2028", "\x00", "\ud83d", "a\udc00b", "\ufeff", "🙂" * 50, "x" * 140_000, '"', "\\", 'a,"b\n', "\r", "[", "NaN",
             '[{"role": "user"}]', '[{"role": "user", "content": "x"}]', "\u202eabc", "e\u0301", "null", "1", "1e400", "up"]  # fmt: skip
texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.sampled_from([0, -1, 1, 2, 10**30, 1.5, 1e300, float("nan"), float("inf")]) | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "model"]) | texts, inner, max_size=3)
        | st.tuples(st.sampled_from(["system", "user", "assistant", "tool", "", "human"]), inner).map(
            lambda turn: [{"role": turn[0], "content": turn[1]}]
        )
    ),
    max_leaves=4,
)


@st.composite
def broken_rows(draw: st.DrawFn, kind: str) -> list[Row]:
    """Up to six good rows of a kind, with up to three cells, columns or rows changed."""
    rows = [dict(draw(st.sampled_from(GOOD[kind]))) for _ in range(draw(st.integers(0, 6)))]
    for _ in range(draw(st.integers(0, 3)) if rows else 0):
        row = draw(st.sampled_from(rows))
        column = draw(st.sampled_from([*row, *COLUMNS]))
        change = draw(st.sampled_from(["value", "value", "value", "drop", "rename", "id"]))
        if change == "value":
            row[column] = draw(values)
        elif change == "id":
            row["prompt_id"] = "a"
        else:
            value = row.pop(column, None)
            if change == "rename":
                row[draw(texts | st.sampled_from(COLUMNS))] = value
    return rows


@st.composite
def broken_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with up to two cuts, insertions, flips or repetitions."""
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 40)))
        piece = draw(st.sampled_from([b"", b"\n", b"\r\n", b"\xff", b"\xef\xbb\xbf", b"\x00", b"{", b'"', b"\\ud83d", b",", b"\xc3"])
                     | st.binary(max_size=6) | st.just(data[at:end] * 2))  # fmt: skip
        data = data[:at] + piece + data[end:]
    return data


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("broken")


WHOLE_FILE = (
    "no responses",
    "no prompts",
    "the input is empty",
    "no records",
    "not a readable Parquet file",
    "two columns are called",
)
"""What is wrong with a file rather than with a row of it."""


def named(error: BnfctlError, path: Path) -> None:
    """The error says which file, which row of it, and what to do."""
    whole = error.what.startswith(WHOLE_FILE)
    assert re.match(
        rf"{re.escape(str(path))}(:\d+| row \d+|$)" if whole else rf"{re.escape(str(path))}(:| row )\d+",
        error.where or "",
    )
    assert error.hint and error.what.strip()


def responses_of(row: Row) -> int:
    listed = next((row[name] for name in ("responses", "all_generated_responses") if row.get(name) is not None), [None])
    return len(json.loads(listed) if isinstance(listed, str) else listed)


def check(kind: str, path: Path, rows_of: Callable[[bytes], list[Row]]) -> str:
    """Run the stage that reads such rows; returns how it ended."""
    store = Store(path.parent / "artifacts")
    try:
        if kind == "prompts":
            counts: Counter[str] = Counter()
            config = GenerateConfig(prompts=str(path))
            prompts = list(read_prompts(pin_data(str(path), store, "--prompts"), config, counts))
            assert len(prompts) + counts["repeated"] == len(rows_of(path.read_bytes()))
            assert len({prompt.id for prompt in prompts}) == len(prompts)
        elif kind == "responses":
            made = run(GenerateConfig(prompts=str(path), sampler="file"), store)
            rows = list(made.rows(["prompt_id", "sample", "text"]))
            assert made.manifest.summary["candidates"] == len(rows)
            assert len(rows) == sum(map(responses_of, rows_of(path.read_bytes())))
            assert len({(row["prompt_id"], row["sample"]) for row in rows}) == len(rows)
        else:
            made = run(BuildConfig(input=str(path), format="unpaired" if kind == "feedback" else kind), store)
            summary = made.manifest.summary
            lost = sum(count for name, count in summary.items() if name.startswith("dropped_"))
            if kind == "feedback":
                lost += sum(count for name, count in summary.items() if name.startswith("left_out_"))
            assert summary["rows"] == len(rows_of(path.read_bytes())) == summary["records"] + lost
            ids = [row["record_id"] for row in made.rows(["record_id"])]
            assert len(ids) == len(set(ids)) == summary["records"]
    except BnfctlError as error:
        named(error, path)
        return "refused"
    return "made"


kinds = st.sampled_from(sorted(GOOD))


def as_lines(rows: list[Row], ascii_only: bool = True) -> bytes:
    lines = (json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")


def lines_in(data: bytes) -> list[Row]:
    return [json.loads(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]


@BUDGET
@given(st.data())
def test_lines_with_broken_rows(place: Path, data: st.DataObject) -> None:
    kind = data.draw(kinds)
    path = place / "rows.jsonl"
    path.write_bytes(as_lines(data.draw(broken_rows(kind)), data.draw(st.booleans())))
    check(kind, path, lines_in)


@BUDGET
@given(st.data())
def test_lines_with_broken_bytes(place: Path, data: st.DataObject) -> None:
    kind = data.draw(kinds)
    path = place / "bytes.jsonl"
    path.write_bytes(data.draw(broken_bytes(as_lines(GOOD[kind], data.draw(st.booleans())))))
    check(kind, path, lines_in)


def as_csv(rows: list[Row]) -> bytes:
    out = io.StringIO(newline="")
    header = list(dict.fromkeys(name for row in rows for name in row))
    cells = (
        [value if isinstance(value := row.get(name, ""), str) else json.dumps(value) for name in header] for row in rows
    )
    csv.writer(out, strict=True).writerows([header, *cells])
    return out.getvalue().encode("utf-8", "surrogatepass")


def csv_in(data: bytes) -> list[Row]:
    header, *rows = (cells for cells in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")) if cells)
    return [{name: cell for name, cell in zip(header, cells, strict=True) if cell} for cells in rows]


@BUDGET
@given(st.data())
def test_csv(place: Path, data: st.DataObject) -> None:
    kind = data.draw(kinds)
    path = place / "rows.csv"
    rows = data.draw(broken_rows(kind))
    path.write_bytes(data.draw(broken_bytes(as_csv(rows))) if data.draw(st.booleans()) else as_csv(rows))
    check(kind, path, csv_in)


def write_parquet(path: Path, rows: list[Row]) -> None:
    """The rows; in a column of several types all but the texts as JSON."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        cells = [row.get(name) for row in rows]
        column = name.encode("utf-8", "replace").decode()
        try:
            columns[column] = pa.array(cells)
            pq.write_table(pa.table({column: columns[column]}), io.BytesIO())
        except (pa.ArrowException, ValueError, OverflowError):
            columns[column] = pa.array(
                [cell if cell is None or isinstance(cell, str) else json.dumps(cell) for cell in cells]
            )
    pq.write_table(pa.table(columns), path, row_group_size=2, compression="zstd")


def parquet_in(data: bytes) -> list[Row]:
    return pq.read_table(io.BytesIO(data)).to_pylist()


@BUDGET
@given(st.data())
def test_parquet(place: Path, data: st.DataObject) -> None:
    kind = data.draw(kinds)
    path = place / "rows.parquet"
    write_parquet(path, data.draw(broken_rows(kind)))
    if data.draw(st.integers(0, 3)) == 0:
        path.write_bytes(data.draw(broken_bytes(path.read_bytes())))
    check(kind, path, parquet_in)


@pytest.mark.parametrize("kind", GOOD)
def test_the_good_rows_are_good(place: Path, kind: str) -> None:
    path = place / "good.jsonl"
    path.write_bytes(as_lines(GOOD[kind]))
    assert check(kind, path, lines_in) == "made"
