from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bnfctl.config import GenerateConfig
from bnfctl.errors import UsageError
from bnfctl.samplers.file import FileSampler, read_responses


def write(path: Path, *rows: Any) -> Path:
    file = path / "responses.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return file


def test_one_row_per_prompt(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"prompt_id": "a", "prompt": "1+1?", "answer": 2, "responses": ["2", {"text": "3", "model": "m"}]},
        "",
        {"id": 7, "messages": [{"role": "user", "content": "hi"}], "responses": [{"output": "x"}, {"content": ""}]},
    )
    first, second = read_responses(file)
    assert (first.prompt.id, first.prompt.text, first.prompt.answer) == ("a", "1+1?", "2")
    assert first.prompt.where == f"{file}:1"
    assert [(c.sample, c.text, c.source) for c in first.candidates] == [(0, "2", None), (1, "3", "m")]
    assert all(c.token_ids is None and c.finish_reason is None and c.seed is None for c in first.candidates)
    assert second.prompt.id == "7"
    assert second.prompt.answer is None
    assert [c.text for c in second.candidates] == ["x", ""]
    assert list(FileSampler(file).groups()) == [first, second]


def test_flat_rows_are_grouped_by_prompt(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"prompt": "a", "response": "a0", "model": "m"},
        {"prompt": "b", "response": {"text": "b0"}},
        {"prompt": "a", "response": "a1"},
    )
    found = list(read_responses(file))
    assert [[c.text for c in group.candidates] for group in found] == [["a0", "a1"], ["b0"]]
    assert [c.sample for c in found[0].candidates] == [0, 1]
    assert found[0].candidates[0].source == "m"
    assert {c.prompt_id for c in found[0].candidates} == {found[0].prompt.id}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("{broken", "broken JSON"),
        ("[1]", "JSON object"),
        ({"responses": ["x"]}, "no prompt"),
        ({"prompt": "a"}, "no responses"),
        ({"prompt": "a", "responses": []}, "not a list"),
        ({"prompt": "a", "responses": "x"}, "not a list"),
        ({"prompt": "a", "responses": [None]}, "no text"),
        ({"prompt": "a", "responses": [{}]}, "no text"),
        ({"prompt": "a", "responses": [{"text": 3}]}, "no text"),
        ({"prompt": "", "responses": ["x"]}, "empty prompt"),
        ({"prompt": "a", "id": {}, "responses": ["x"]}, "id is not"),
        ({"prompt": "b", "id": "same", "responses": ["x"]}, "two prompts with the id same"),
    ],
)
def test_errors_name_the_line(row: Any, what: str, tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "a", "id": "same", "response": "x"}, row)
    with pytest.raises(UsageError, match=what) as caught:
        list(read_responses(file))
    assert f"{file}:2" in (caught.value.where or "")
    assert caught.value.exit_code == 2


def test_a_missing_and_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        list(read_responses(tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match="no responses"):
        list(read_responses(write(tmp_path, "")))


def test_unicode_long_texts_and_lone_surrogates(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "日本 \ud83d", "responses": ["🙂" * 100_000, "\udc00 half"]})
    (group,) = read_responses(file)
    assert group.prompt.text == "日本 ?"
    assert [len(c.text) for c in group.candidates] == [100_000, 6]
    assert group.candidates[1].text == "? half"


def test_a_prompt_is_held_until_its_last_row_only(tmp_path: Path) -> None:
    rows, size = 1000, 5000
    listed = [{"prompt": f"Q{i // 2}", "response": f"{i} " + "x" * size} for i in range(rows)]
    listed.append({"prompt": "Q499", "response": "late"})
    file = write(tmp_path, *listed)
    del listed
    tracemalloc.start()
    sizes = [len(group.candidates) for group in read_responses(file)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sizes == [2] * 499 + [3]
    assert peak < 1_000_000 < rows * size / 4


def test_rows_of_one_prompt_anywhere_keep_the_order_of_first_appearance(tmp_path: Path) -> None:
    order = ["a", "b", "c", "b", "a", "d", "c"]
    file = write(tmp_path, *({"prompt": name, "response": f"{name}{i}"} for i, name in enumerate(order)))
    found = list(read_responses(file))
    assert [[c.text for c in group.candidates] for group in found] == [["a0", "a4"], ["b1", "b3"], ["c2", "c6"], ["d5"]]


RESPONSES = ["one", 'two, "or"\nthree']


def test_simpo_and_other_kinds_of_file(tmp_path: Path) -> None:
    simpo = {"prompt": "a", "all_generated_responses": RESPONSES, "answer": "1"}
    wanted = list(read_responses(write(tmp_path, simpo)))
    assert [c.text for c in wanted[0].candidates] == RESPONSES
    pq.write_table(pa.Table.from_pylist([simpo]), tmp_path / "r.parquet")
    with open(tmp_path / "r.csv", "w", newline="") as out:
        csv.writer(out).writerows([["prompt", "responses", "answer"], ["a", json.dumps(RESPONSES), "1"]])
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.Table.from_pylist([simpo]), tmp_path / "folder" / "train-00000-of-00001.parquet")
    for path in ("r.parquet", "r.csv", "folder"):
        (group,) = read_responses(tmp_path / path)
        assert (group.prompt.messages, group.prompt.answer, group.candidates) == (
            wanted[0].prompt.messages, "1", wanted[0].candidates,
        )  # fmt: skip


def test_responses_with_their_models_in_parquet(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "model": "row", "responses": [{"text": "x", "model": "own"}, {"text": None, "output": "y"}]}
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    (group,) = read_responses(tmp_path / "r.parquet")
    assert [(c.text, c.source) for c in group.candidates] == [("x", "own"), ("y", "row")]


def test_a_broken_row_of_parquet_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "responses": ["x"]}, {"prompt": "b"}]), tmp_path / "r.parquet")
    with pytest.raises(UsageError, match="no responses") as caught:
        list(read_responses(tmp_path / "r.parquet"))
    assert caught.value.where == f"{tmp_path / 'r.parquet'} row 2"


def test_messages_that_end_with_the_response(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "a"}]
    file = write(
        tmp_path,
        {"uid": "q1", "model": "m", "messages": [*asked, {"role": "assistant", "content": {"answer": "x"}}]},
        {"uid": "q1", "messages": [*asked, {"role": "assistant", "content": "y"}]},
        {"uid": "q2", "messages": [*asked, {"role": "assistant", "content": "not this"}], "response": "z"},
    )
    config = GenerateConfig(prompts=str(file), sampler="file", id_column="uid")
    first, second = read_responses(file, config)
    assert (first.prompt.id, first.prompt.messages) == ("q1", tuple(asked))
    assert [(c.text, c.source) for c in first.candidates] == [("x", "m"), ("y", None)]
    assert [c.text for c in second.candidates] == ["z"]


def test_columns_and_the_system_prompt_of_a_config(tmp_path: Path) -> None:
    file = write(tmp_path, {"q": "a", "key": 5, "gold": 3, "responses": ["x"]})
    config = GenerateConfig(
        prompts=str(file), sampler="file", prompt_column="q", id_column="key", answer_column="gold", system="S"
    )
    (group,) = FileSampler(file, config).groups()
    assert (group.prompt.id, group.prompt.answer) == ("5", "3")
    assert [turn["content"] for turn in group.prompt.messages] == ["S", "a"]
    with pytest.raises(UsageError, match="--sort is for prompts that are sampled"):
        list(read_responses(file, GenerateConfig(prompts=str(file), sort=True)))


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    file = write(tmp_path, *({"prompt": f"Q{i}", "response": "x" * 50_000} for i in range(9)))
    found = read_responses(file)
    next(found)
    text = file.read_text()
    file.write_text(text[: text.index("Q8")] + "R8" + text[text.index("Q8") + 2 :])
    with pytest.raises(UsageError, match="changed while it was read"):
        list(found)
