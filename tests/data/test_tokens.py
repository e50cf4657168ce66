from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bnfctl.config import TrainConfig
from bnfctl.data import chat, tokens
from bnfctl.data.records import Record
from bnfctl.errors import UsageError
from tests import models

PROMPT = [{"role": "user", "content": "hello"}]
TURN_END = 259


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    models.make_tokenizer(path)
    (path / "config.json").write_text(json.dumps({"max_position_embeddings": 128}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, TURN_END]}))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return chat.load_tokenizer(folder, False)


@pytest.fixture(scope="module")
def prompt_ids(tokenizer: Any) -> list[int]:
    return chat.render_prompt(tokenizer, PROMPT)


def config(**changes: Any) -> TrainConfig:
    return dataclasses.replace(TrainConfig(model="m", max_length=128), **changes)


def row(**changes: Any) -> dict[str, Any]:
    empty = {f"{side}_{what}": None for side in ("chosen", "rejected") for what in ("text", "ids", "finish")}
    return (
        {"record_id": "r0", "prompt_id": "p0", "split": "train", "prompt": PROMPT, "prompt_ids": None} | empty | changes
    )


def sampled(prompt_ids: list[int], **changes: Any) -> dict[str, Any]:
    chosen = {"chosen_text": "ab", "chosen_ids": [1, 2, TURN_END], "chosen_finish": "stop"}
    rejected = {"rejected_text": "c", "rejected_ids": [3, 4], "rejected_finish": "length"}
    return row(prompt_ids=prompt_ids, **{**chosen, **rejected, **changes})


def one(
    rows: list[dict[str, Any]], folder: Path, digest: str | None = None, **changes: Any
) -> tuple[Record, dict[str, int]]:
    train, test, counts = tokens.records(rows, config(**changes), folder, digest)
    assert len(train) == 1
    assert not test
    return train[0], counts


def test_sampled_ids_are_taken_as_they_are(folder: Path, prompt_ids: list[int]) -> None:
    record, counts = one([sampled(prompt_ids)], folder, chat.tokenizer_digest(folder))
    assert record.id == "r0"
    assert record.prompt_ids == prompt_ids
    assert [(side.label, side.ids) for side in record.sides] == [(1, [1, 2, TURN_END]), (-1, [3, 4])]
    assert not any(counts.values())


def test_texts_are_rendered_by_the_policy(folder: Path, tokenizer: Any, prompt_ids: list[int]) -> None:
    record, _ = one([row(chosen_text="good", rejected_text="bad")], folder)
    assert record.prompt_ids == prompt_ids
    assert [tokenizer.decode(side.ids) for side in record.sides] == ["good<|turn_end|>", "bad<|turn_end|>"]


def test_template_arguments_reach_prompt_and_response(tmp_path: Path) -> None:
    shout = "{% if loud %}{% set mark = '!' %}{% else %}{% set mark = '.' %}{% endif %}"
    models.make_tokenizer(
        tmp_path, template=shout + models.TEMPLATE.replace("+ '<|turn_end|>'", "+ mark + '<|turn_end|>'")
    )
    (tmp_path / "config.json").write_text("{}")
    made = chat.load_tokenizer(tmp_path, False)
    for given, mark in (((), "."), (("loud=True",), "!"), (("loud=false",), ".")):
        record, _ = one([row(chosen_text="good")], tmp_path, chat_template_kwargs=given)
        assert made.decode(record.prompt_ids).endswith(f"hello{mark}<|turn_end|><|assistant|>")
        assert made.decode(record.sides[0].ids) == f"good{mark}<|turn_end|>"


def test_a_masked_side_is_absent(folder: Path) -> None:
    record, _ = one([row(rejected_text="bad")], folder)
    assert [side.label for side in record.sides] == [-1]


def test_splits_and_order(folder: Path) -> None:
    rows = [row(record_id=f"r{i}", split="test" if i % 3 == 0 else "train", chosen_text="x") for i in range(6)]
    train, test, _ = tokens.records(rows, config(), folder, None)
    assert [record.id for record in train] == ["r1", "r2", "r4", "r5"]
    assert [record.id for record in test] == ["r0", "r3"]


def test_ids_of_another_tokenizer_are_refused(folder: Path, prompt_ids: list[int]) -> None:
    with pytest.raises(UsageError) as caught:
        tokens.records([sampled(prompt_ids)], config(), folder, "another")
    assert caught.value.exit_code == 2
    assert "--retokenize" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="does not say whose"):
        tokens.records([sampled(prompt_ids)], config(), folder, None)


def test_the_digest_matters_only_where_there_are_ids(folder: Path) -> None:
    one([row(chosen_text="x")], folder, "another")


def test_check_digest(folder: Path) -> None:
    tokens.check_digest(folder, config(), chat.tokenizer_digest(folder))
    tokens.check_digest(folder, config(), None)
    tokens.check_digest(folder, config(retokenize=True), "another")
    with pytest.raises(UsageError):
        tokens.check_digest(folder, config(), "another")


def test_retokenize_uses_the_texts(folder: Path, tokenizer: Any, prompt_ids: list[int]) -> None:
    foreign = sampled([9, 9], chosen_text="good", rejected_text="cut off")
    record, _ = one([foreign], folder, "another", retokenize=True)
    assert record.prompt_ids == prompt_ids
    # the rejected one was cut off when it was sampled: its turn never ended
    assert [tokenizer.decode(side.ids) for side in record.sides] == ["good<|turn_end|>", "cut off"]


def test_a_long_response_is_cut_on_the_right_without_its_stop(
    folder: Path, tokenizer: Any, prompt_ids: list[int]
) -> None:
    text = "abcdefghij"
    record, counts = one([row(chosen_text=text, rejected_text="ab")], folder, max_length=len(prompt_ids) + 4)
    assert [tokenizer.decode(side.ids) for side in record.sides] == ["abcd", "ab<|turn_end|>"]
    assert counts["cut"] == 1
    _, counts = one([row(chosen_text="abc")], folder, max_length=len(prompt_ids) + 4)  # fits with its stop
    assert counts["cut"] == 0


def test_a_prompt_without_room_is_dropped_whole(folder: Path, prompt_ids: list[int]) -> None:
    train, _, counts = tokens.records([row(chosen_text="x")], config(max_length=len(prompt_ids)), folder, None)
    assert not train
    assert counts["no_room"] == 1


def test_empty_responses(folder: Path, prompt_ids: list[int]) -> None:
    digest = chat.tokenizer_digest(folder)
    record, counts = one([sampled(prompt_ids, rejected_ids=[])], folder, digest)
    assert [side.label for side in record.sides] == [1]
    assert (counts["empty"], counts["no_side"]) == (1, 0)
    train, _, counts = tokens.records([sampled(prompt_ids, rejected_ids=[], chosen_ids=[])], config(), folder, digest)
    assert not train
    assert (counts["empty"], counts["no_side"]) == (2, 1)
    record, counts = one([row(chosen_text="")], folder)  # an empty turn still ends: one token
    assert record.sides[0].ids == [TURN_END]


def test_the_context_of_the_model_bounds_max_length(
    folder: Path, prompt_ids: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    record, counts = one([row(chosen_text="x" * 500)], folder, max_length=4096)
    assert len(record.prompt_ids) + len(record.sides[0].ids) == 128
    assert counts["cut"] == 1
    assert "128" in capsys.readouterr().err


def test_errors_name_the_record(folder: Path) -> None:
    bad = row(chosen_text="x", prompt=[{"role": "user", "content": "x"}], record_id="r7")
    broken = Path(str(folder) + "-broken")
    models.make_tokenizer(broken, template="{{ messages | length }}" + models.TEMPLATE)
    (broken / "config.json").write_text("{}")
    with pytest.raises(UsageError) as caught:
        tokens.records([bad], config(), broken, None)
    assert caught.value.where == "chat template; record r7"
