"""Prompt files and preference files: what is read, and how bad rows are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bnfctl.artifact import Pinned, Store
from bnfctl.data.preferences import read_preferences
from bnfctl.data.records import Prompt
from bnfctl.data.sources import as_messages, pin_data, prompt_id, read_prompts, read_rows
from bnfctl.errors import UsageError


def file_of(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def prompts_of(path: Path, store: Store, **changes: Any) -> tuple[list[Prompt], int]:
    asked: dict[str, Any] = {"split": "train", "subset": None, "prompt_column": "prompt", "answer_column": "answer"}
    return read_prompts(pin_data(str(path), store, "--prompts"), **{**asked, "limit": None, **changes})


def test_texts_and_messages_with_and_without_ids(tmp_path: Path, store: Store) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = file_of(
        tmp_path / "p.jsonl", {"prompt": "One?", "answer": 1}, {"id": 7, "messages": turns}, "", {"prompt": "One?"}
    )
    prompts, repeated = prompts_of(path, store)
    assert [p.id for p in prompts] == [prompt_id(as_messages("One?", "")), "7"]
    assert prompts[0].answer == "1"
    assert prompts[1].messages == tuple(turns)
    assert prompts[1].where == f"{path}:2"
    assert repeated == 1


def test_ids_do_not_depend_on_order_or_limit(tmp_path: Path, store: Store) -> None:
    rows = [{"prompt": f"Question {i}"} for i in range(5)]
    first, _ = prompts_of(file_of(tmp_path / "a.jsonl", *rows), store)
    second, _ = prompts_of(file_of(tmp_path / "b.jsonl", *reversed(rows)), store)
    assert {p.id: p.text for p in first} == {p.id: p.text for p in second}
    limited, _ = prompts_of(tmp_path / "a.jsonl", store, limit=2)
    assert limited == first[:2]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ('{"prompt": "x"', "broken JSON"),
        ("[1]", "expected a JSON object"),
        ({"question": "x"}, "no column 'prompt'"),
        ({"prompt": "   "}, "empty prompt"),
        ({"prompt": []}, "a prompt is a text or a list"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "ends with the turn of assistant"),
        ({"id": "a", "prompt": "another"}, "two prompts with the id a"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, store: Store, row: Any, what: str) -> None:
    path = file_of(tmp_path / "p.jsonl", {"id": "a", "prompt": "fine"}, row)
    with pytest.raises(UsageError, match=what) as caught:
        prompts_of(path, store)
    assert f"{path}:2" in str(caught.value.where)


def test_missing_empty_and_not_utf8_files(tmp_path: Path, store: Store) -> None:
    with pytest.raises(UsageError, match="no such file"):
        prompts_of(tmp_path / "none.jsonl", store)
    with pytest.raises(UsageError, match="no prompts"):
        prompts_of(file_of(tmp_path / "e.jsonl"), store)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(UsageError, match="not UTF-8"):
        prompts_of(tmp_path / "latin.jsonl", store)


def test_a_column_is_suggested(tmp_path: Path, store: Store) -> None:
    path = file_of(tmp_path / "p.jsonl", {"promt": "x"})
    with pytest.raises(UsageError, match="did you mean 'promt'"):
        prompts_of(path, store)


def test_the_lab_by_name(store: Store) -> None:
    pinned = pin_data("lab:chat", store, "--prompts", "train")
    assert pinned.digest and pinned.digest != pin_data("lab:chat", store, "--prompts", "test").digest
    prompts, _ = read_prompts(
        pinned, split="train", subset=None, prompt_column="prompt", answer_column="answer", limit=3
    )
    assert [p.id for p in prompts] == [f"lab-chat-train-00000{i}" for i in range(3)]


def test_a_hub_set_that_cannot_be_reached_is_pinned_as_unresolved(store: Store) -> None:
    pinned = pin_data("princeton-nlp/llama3-ultrafeedback-armorm", store, "INPUT")
    assert (pinned.kind, pinned.digest) == ("hub-data", None)
    assert "local cache has no copy" in str(pinned.why)


USER = {"role": "user", "content": "Hi?"}


def said(text: str) -> list[dict[str, str]]:
    return [USER, {"role": "assistant", "content": text}]


def test_preferences_as_text_and_as_messages(tmp_path: Path, store: Store) -> None:
    path = file_of(
        tmp_path / "prefs.jsonl",
        {"prompt": "Hi?", "chosen": "Hello", "rejected": "No"},
        {"prompt": "Hi?", "prompt_id": "s1", "chosen": said("Hello"), "rejected": said("No"), "all_rm_scores": [1, 0]},
        {"prompt": "Hi?", "chosen": "Hey", "rejected": "No"},
    )
    read = list(read_preferences(read_rows(pin_data(str(path), store, "INPUT"), "train", None)))
    groups = [group for _, group in read]
    assert [[c.text for c in g.candidates] for g in groups] == [["Hello", "No"], ["Hello", "No"], ["Hey", "No"]]
    assert groups[0].prompt.messages == groups[1].prompt.messages == (USER,)
    assert len({record_id for record_id, _ in read}) == 3
    assert groups[0].prompt.id == groups[2].prompt.id, "the same prompt, so the same split"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "x", "chosen": "a"}, "no column 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "no column 'prompt'"),
        ({"prompt": "x", "chosen": said("a"), "rejected": [USER]}, "end with the assistant's"),
        (
            {"prompt": "x", "chosen": said("a"), "rejected": [{"role": "user", "content": "?"}, said("b")[1]]},
            "different prompts",
        ),
    ],
)
def test_bad_preferences(row: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        list(read_preferences([("prefs.jsonl:1", row)]))
    assert caught.value.where == "prefs.jsonl:1"


def test_rows_with_one_id() -> None:
    row = {"id": 1, "prompt": "x", "chosen": "a", "rejected": "b"}
    again = [record_id for record_id, _ in read_preferences([("f:1", row), ("f:2", {**row, "chosen": "c"})])]
    assert again == ["1", "1+"], "published sets repeat prompts: each row is a record"
    with pytest.raises(UsageError, match="two prompts with the id 1") as caught:
        list(read_preferences([("f:1", row), ("f:2", {**row, "prompt": "y"})]))
    assert caught.value.where == "f:1 and f:2"


def test_pinned_files_are_by_content(tmp_path: Path, store: Store) -> None:
    a, b = file_of(tmp_path / "a.jsonl", {"prompt": "x"}), file_of(tmp_path / "b.jsonl", {"prompt": "x"})
    assert pin_data(str(a), store, "").digest == pin_data(str(b), store, "").digest
    before = pin_data(str(a), store, "").digest
    file_of(a, {"prompt": "y"})
    assert pin_data(str(a), store, "").digest != before
    assert isinstance(pin_data(str(a), store, ""), Pinned)
