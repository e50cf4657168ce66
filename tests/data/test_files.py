"""Rows of Parquet, CSV, and folders: what is read, where each row says it comes from, how broken files are refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bnfctl.data.files import read_path
from bnfctl.errors import UsageError
from bnfctl.samplers.file import read_responses

TURNS = [{"role": "user", "content": 'Hi, "you"\nthere'}, {"role": "assistant", "content": "ä"}]
ROWS: list[dict[str, Any]] = [{"prompt": f"Q{i}", "chosen": TURNS, "scores": [1.5, i]} for i in range(5)]


def rows_of(path: Path, split: str = "train", subset: str | None = None) -> list[dict[str, Any]]:
    return [row for _, row in read_path(path, split, subset)]


def places_of(path: Path, split: str = "train") -> list[str]:
    return [where for where, _ in read_path(path, split, None)]


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2, write_page_checksum=True)
    return path


def written(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_parquet_rows_have_places(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet", ROWS)
    assert rows_of(path) == ROWS
    assert places_of(path) == [f"{path} row {number}" for number in range(1, 6)]


def test_parquet_is_read_some_rows_at_a_time(tmp_path: Path) -> None:
    table = pa.table({"prompt": [f"{i} " + "x" * 4000 for i in range(4000)]})
    pq.write_table(table, tmp_path / "p.parquet", compression="zstd")
    del table
    tracemalloc.start()
    assert sum(1 for _ in read_path(tmp_path / "p.parquet", "train", None)) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000, "256 rows of 4 kB, and not 16 MB"


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "flipped"])
def test_a_broken_parquet_file_is_named(tmp_path: Path, damage: str) -> None:
    path = parquet(tmp_path / "p.parquet", ROWS)
    data = path.read_bytes()
    flipped = data[:100] + bytes([data[100] ^ 255]) + data[101:]
    path.write_bytes({"truncated": data[:-50], "text": b"{}", "empty": b"", "flipped": flipped}[damage])
    with pytest.raises(UsageError, match=r"not a readable Parquet file|cannot be read") as caught:
        rows_of(path)
    assert (caught.value.where or "").startswith(str(path))


def test_a_text_that_is_not_utf8_names_its_row(tmp_path: Path) -> None:
    bad = pa.array([b"fine"] * 299 + [b"caf\xe9"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": bad}), tmp_path / "p.parquet")
    found = read_path(tmp_path / "p.parquet", "train", None)
    assert [next(found)[1]["prompt"] for _ in range(256)] == ["fine"] * 256
    with pytest.raises(UsageError, match="cannot be read") as caught:
        list(found)
    assert caught.value.where == f"{tmp_path / 'p.parquet'} row 300"


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(UsageError, match="two columns are called 'prompt'"):
        rows_of(tmp_path / "p.parquet")


def test_csv_with_bom_quotes_and_newlines(tmp_path: Path) -> None:
    path = written(tmp_path / "p.csv", b'\xef\xbb\xbfprompt,answer\r\n"One,\r\n ""two""",1\r\n\r\nthree,\r\n')
    assert rows_of(path) == [{"prompt": 'One,\r\n "two"', "answer": "1"}, {"prompt": "three", "answer": ""}]
    assert places_of(path) == [f"{path}:2", f"{path}:5"], "a row is named by its first line"


def test_csv_cells_with_chat_turns(tmp_path: Path) -> None:
    cell = json.dumps(TURNS, ensure_ascii=True).replace('"', '""')
    looks_like_it = '[1, "role"]'.replace('"', '""')
    path = written(tmp_path / "p.csv", f'prompt,note\n"{cell}","{looks_like_it}"\n[1],"[""role"": x"\n')
    assert rows_of(path) == [{"prompt": TURNS, "note": '[1, "role"]'}, {"prompt": "[1]", "note": '["role": x'}]


def test_tsv_and_cells_longer_than_csv_allows_by_itself(tmp_path: Path) -> None:
    path = written(tmp_path / "p.tsv", f"prompt\tanswer\n{'x' * 200_000}\ta,b\n")
    ((row),) = rows_of(path)
    assert (len(row["prompt"]), row["answer"]) == (200_000, "a,b")


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("a,b\n1,2\n1\n", "1 cells in a row, 2 in the header", 3),
        ("a,b\n1,2,3\n", "3 cells in a row, 2 in the header", 2),
        ('a,b\n"1\n",2\n"1"x,2\n', "broken CSV", 4),
        ('a,b\n1,2\n"1,2\n3,4\n', "broken CSV: unexpected end", 3),
        ("a,a\n1,2\n", "two columns are called 'a'", 1),
        (b"a,b\n1,2\n\xff,2\n", "not UTF-8", 3),
        ("a,b\r1,2\r", "broken CSV", 1),
    ],
)
def test_broken_csv(tmp_path: Path, text: str | bytes, what: str, line: int) -> None:
    path = written(tmp_path / "p.csv", text)
    with pytest.raises(UsageError, match=what) as caught:
        rows_of(path)
    assert caught.value.where == f"{path}:{line}"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"prompt": "a", "turns": [{"role": "user", "role": "tool"}]}', "the key 'role' is there twice"),
        (b"caf\xe9", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, None),
    ],
)
def test_broken_lines_of_a_large_file(tmp_path: Path, line: bytes, what: str | None) -> None:
    path = written(tmp_path / "p.jsonl", b'{"prompt": "x"}\n' * 3000 + line + b"\n")
    if what is None:
        assert len(rows_of(path)) == 3001
        return
    with pytest.raises(UsageError, match=what) as caught:
        rows_of(path)
    assert caught.value.where == f"{path}:3001"


@pytest.mark.parametrize("text", ['[\n {"prompt": "x"}\n]', '[{"prompt": "x"}]'])
def test_a_json_array_gets_a_hint(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        rows_of(written(tmp_path / "p.json", text))
    assert "jq -c" in str(caught.value.hint)


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(tmp_path / "one", num_shards=2)
    made.select([4, 0]).save_to_disk(tmp_path / "picked")
    datasets.DatasetDict({"train_prefs": made, "test_prefs": made.select(range(2))}).save_to_disk(tmp_path / "dict")
    assert rows_of(tmp_path / "one") == ROWS
    assert places_of(tmp_path / "one")[3:] == [f"{tmp_path}/one/data-00001-of-00002.arrow row {n}" for n in (1, 2)]
    assert [row["prompt"] for row in rows_of(tmp_path / "picked")] == ["Q4", "Q0"]
    assert rows_of(tmp_path / "dict", "test_prefs") == ROWS[:2]
    assert rows_of(tmp_path / "dict", "test_prefs+train_prefs") == ROWS[:2] + ROWS
    with pytest.raises(UsageError, match=r"no split 'train' \(did you mean 'train_prefs'") as caught:
        rows_of(tmp_path / "dict")
    assert caught.value.hint == "--split train_prefs+test_prefs"


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("state.json", b"{", "not readable"),
        ("state.json", b"[]", "_data_files is not a list"),
        ("state.json", b'{"_data_files": [1]}', "not a list of file names"),
        ("state.json", b'{"_data_files": [{"filename": "none.arrow"}]}', "not a readable Arrow file"),
        ("dataset_dict.json", b"{}", "splits is not a list"),
        ("data-00000-of-00001.arrow", b"", "not a readable Arrow file"),
        ("data-00000-of-00001.arrow", None, "not a readable Arrow file|cannot be read"),
    ],
)
def test_a_saved_folder_that_is_broken(tmp_path: Path, name: str, text: bytes | None, what: str) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "d")
    file = tmp_path / "d" / name
    file.write_bytes(file.read_bytes()[:-300] if text is None else text)
    with pytest.raises(UsageError, match=what) as caught:
        rows_of(tmp_path / "d")
    assert str(tmp_path / "d") in (caught.value.where or "")


HUB = {
    "data/train_prefs-00000-of-00002-abc.parquet": "train_prefs", "data/train_prefs-00001-of-00002-abc.parquet": "train_prefs",
    "data/test_prefs-00000-of-00001.parquet": "test_prefs",
}  # fmt: skip


@pytest.mark.parametrize(
    "files",
    [
        HUB,
        {"train.parquet": "train", "test.parquet": "test"},
        {"train/0000.parquet": "train", "validation/0000.parquet": "validation"},
        {"my-train-set.parquet": "train", "dev.parquet": "validation"},
        {"00000.parquet": "train", "00001.parquet": "train"},
    ],
)
def test_the_splits_of_a_folder_are_those_that_datasets_finds(
    tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for number, name in enumerate(files):
        parquet(tmp_path / "d" / name, [{"prompt": f"{number}"}])
    written(tmp_path / "d" / ".cache" / "train.parquet", b"")
    theirs = datasets.load_dataset(str(tmp_path / "d"))
    ours = {split: [row["prompt"] for row in rows_of(tmp_path / "d", split)] for split in set(files.values())}
    assert ours == {str(split): list(rows["prompt"]) for split, rows in theirs.items()}
    assert set(theirs) == set(files.values())


def test_subsets_and_folders_of_lines(tmp_path: Path) -> None:
    written(tmp_path / "small" / "train.jsonl", '{"prompt": "a"}\n')
    written(tmp_path / "large" / "train.csv", "prompt\nb\n")
    assert rows_of(tmp_path, subset="small") == [{"prompt": "a"}]
    assert rows_of(tmp_path, subset="large") == [{"prompt": "b"}]
    with pytest.raises(UsageError, match="no subset 'medium'"):
        rows_of(tmp_path, subset="medium")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no data files"):
        rows_of(tmp_path / "empty")


@pytest.mark.parametrize("ending", [".json", ".ndjson"])
def test_a_folder_of_lines_under_another_name(tmp_path: Path, ending: str) -> None:
    written(tmp_path / f"train{ending}", '{"prompt": "a"}\n')
    written(tmp_path / f"test{ending}", '{"prompt": "b"}\n')
    written(tmp_path / "dataset_infos.json", '{"default": {}}\n')
    assert rows_of(tmp_path, "train+test") == [{"prompt": "a"}, {"prompt": "b"}]
    written(tmp_path / "x.jsonl", '{"prompt": "c"}\n')
    assert rows_of(tmp_path) == [{"prompt": "c"}]


def test_splits_that_are_not_read_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test", "dev"):
        written(tmp_path / "d" / f"{split}.jsonl", '{"prompt": "a", "response": "b"}\n')
    assert len(list(read_responses(tmp_path / "d"))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("only split train is read, not validation, test: --split train+validation+test reads all")
    for split in ("test", "train+test", "train+validation+test"):
        rows_of(tmp_path / "d", split)
    rows_of(written(tmp_path / "one" / "train.jsonl", "{}").parent)
    saved = datasets.Dataset.from_list([{"prompt": "a"}], split="validation")
    saved.save_to_disk(str(tmp_path / "saved"))
    assert rows_of(tmp_path / "saved") == [{"prompt": "a"}]
    assert "is read" not in capsys.readouterr().err


Make = Callable[[Path], Path]


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: parquet(folder / "p.parquet", ROWS),
        lambda folder: parquet(folder / "hub" / "data" / "train-00000-of-00001.parquet", ROWS).parent.parent,
        lambda folder: written(folder / "p.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(make: Make, tmp_path: Path) -> None:
    assert rows_of(make(tmp_path)) == ROWS


def test_empty_cells_beside_filled_ones(tmp_path: Path) -> None:
    text = "prompt,messages,response,responses\na,,x,\n"
    turns = json.dumps(TURNS[:1]).replace('"', '""')
    path = written(tmp_path / "r.csv", f'{text},"{turns}",,"[""y"", ""z""]"\n')
    first, second = read_responses(path)
    assert (first.prompt.text, [c.text for c in first.candidates]) == ("a", ["x"])
    assert (second.prompt.text, [c.text for c in second.candidates]) == (TURNS[0]["content"], ["y", "z"])
