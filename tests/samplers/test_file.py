from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
