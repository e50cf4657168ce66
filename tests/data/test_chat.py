from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bnfctl.data import chat
from bnfctl.errors import UsageError
from tests import models

HELLO = [{"role": "user", "content": "hello"}]
BOS, EOS, TURN_END = 256, 257, 259


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    models.make_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return chat.load_tokenizer(folder, False)


def test_the_module_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, bnfctl.data.chat, bnfctl.data.tokens, bnfctl.samplers, bnfctl.scorers\n"
        "found = {'torch', 'transformers', 'vllm'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_without_a_tokenizer_is_a_usage_error(tmp_path: Path) -> None:
    for call in (lambda: chat.load_tokenizer(tmp_path, False), lambda: chat.tokenizer_digest(tmp_path)):
        with pytest.raises(UsageError, match="no tokenizer") as caught:
            call()
        assert caught.value.where == str(tmp_path)
        assert caught.value.hint


def test_a_tokenizer_without_a_chat_template_is_a_usage_error(tmp_path: Path) -> None:
    models.make_tokenizer(tmp_path, template=None)
    with pytest.raises(UsageError, match="no chat template") as caught:
        chat.load_tokenizer(tmp_path, False)
    assert caught.value.where == str(tmp_path)


def test_a_broken_tokenizer_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError):
        chat.load_tokenizer(tmp_path, False)
    with pytest.raises(UsageError, match="broken JSON"):
        chat.tokenizer_digest(tmp_path)


def test_digest_is_the_same_after_copies_and_save_pretrained(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    digest = chat.tokenizer_digest(folder)
    shutil.copytree(folder, tmp_path / "copy")
    loaded = AutoTokenizer.from_pretrained(folder, padding_side="left")
    loaded(["a", "abc"], padding=True, truncation=True, max_length=2)  # leaves its mark in tokenizer.json
    loaded.save_pretrained(tmp_path / "saved")
    assert chat.tokenizer_digest(tmp_path / "copy") == digest
    assert chat.tokenizer_digest(tmp_path / "saved") == digest


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast"])
def test_digest_survives_what_transformers_rewrites_by_class(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    models.make_spaced_tokenizer(tmp_path / "made")
    config = tmp_path / "made" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": name}))
    AutoTokenizer.from_pretrained(tmp_path / "made").save_pretrained(tmp_path / "saved")
    assert chat.tokenizer_digest(tmp_path / "saved") == chat.tokenizer_digest(tmp_path / "made")


def test_digest_reads_merges_in_both_spellings(tmp_path: Path) -> None:
    models.make_spaced_tokenizer(tmp_path)
    digest = chat.tokenizer_digest(tmp_path)
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    file.write_text(json.dumps(spec), encoding="utf-8")
    assert chat.tokenizer_digest(tmp_path) == digest


def test_digest_changes_with_vocabulary_merges_and_added_tokens(tmp_path: Path) -> None:
    models.make_spaced_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    original = file.read_text(encoding="utf-8")
    digests = {chat.tokenizer_digest(tmp_path)}
    for edit in (
        lambda spec: spec["model"]["merges"].pop(),
        lambda spec: spec["model"]["vocab"].update({"new": 99}),
        lambda spec: spec["added_tokens"].append({**spec["added_tokens"][0], "content": "<new>", "id": 99}),
    ):
        spec = json.loads(original)
        edit(spec)
        file.write_text(json.dumps(spec), encoding="utf-8")
        digests.add(chat.tokenizer_digest(tmp_path))
    assert len(digests) == 4


def test_digest_of_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    first = chat.tokenizer_digest(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"others")
    assert chat.tokenizer_digest(tmp_path) != first


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", [models.TEMPLATE, models.TEMPLATE_WITHOUT_BOS])
def test_exactly_one_bos(adds_bos: bool, template: str, tmp_path: Path) -> None:
    made = models.make_tokenizer(tmp_path, adds_bos=adds_bos, template=template)
    expected = 0 if template == models.TEMPLATE_WITHOUT_BOS and not adds_bos else 1
    for ids in (chat.render_prompt(made, HELLO), chat.render_conversation(made, HELLO)):
        assert ids.count(BOS) == expected
        assert ids.index(260 + 1) == expected  # <|user|> comes right behind
    # what would go wrong: the tokenizer adds its own BOS to that of the template
    text = made.apply_chat_template(HELLO, tokenize=False)
    assert made.encode(text).count(BOS) == (template == models.TEMPLATE) + adds_bos


def test_a_template_that_writes_two_bos_gets_one(tmp_path: Path) -> None:
    made = models.make_tokenizer(tmp_path, template="{{ bos_token }}" + models.TEMPLATE)
    assert chat.render_prompt(made, HELLO).count(BOS) == 1


def test_no_bos_token_at_all(tmp_path: Path) -> None:
    made = models.make_tokenizer(tmp_path, bos=False, adds_bos=False, template=models.TEMPLATE_WITHOUT_BOS)
    assert BOS not in chat.render_prompt(made, HELLO)


def test_prompt_ends_where_the_response_begins(tokenizer: Any) -> None:
    assert tokenizer.decode(chat.render_prompt(tokenizer, HELLO)[-1:]) == "<|assistant|>"
    assert tokenizer.decode(chat.render_conversation(tokenizer, HELLO)[-1:]) == "<|turn_end|>"


def test_template_arguments_reach_the_template(tmp_path: Path) -> None:
    made = models.make_tokenizer(tmp_path, template=models.TEMPLATE + "{{ mood }}")
    assert made.decode(chat.render_prompt(made, HELLO, mood="glad")).endswith("glad")


def test_template_arguments_from_texts() -> None:
    pairs = (
        "enable_thinking=false",
        "a=True",
        "b=None",
        "n=3",
        "x=0.5",
        'l=[1, "b"]',
        "t=Be brief = good",
        "e=",
        "s = NaN",
    )
    assert chat.template_kwargs(pairs) == {
        "enable_thinking": False, "a": True, "b": None, "n": 3, "x": 0.5, "l": [1, "b"], "t": "Be brief = good", "e": "",
        "s": "NaN",
    }  # fmt: skip
    assert chat.template_kwargs(()) == {}


@pytest.mark.parametrize(
    ("pairs", "what"),
    [
        (("enable_thinking",), "'enable_thinking' is not name=value"),
        (("x=[1", "2]"), r"'2\]' is not name=value"),
        (("=3",), "is not name=value"),
        (("a-b=3",), "is not name=value"),
        (("a=1", "a=2"), "'a' is there twice"),
        (("tokenize=true",), "'tokenize' is set by bnfctl"),
        (("messages=[]",), "'messages' is set by bnfctl"),
    ],
)
def test_bad_template_arguments(pairs: tuple[str, ...], what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        chat.template_kwargs(pairs)
    assert caught.value.where == "--chat-template-kwargs"
    assert caught.value.hint


def test_no_argument_of_a_template_can_collide_with_ours(tmp_path: Path) -> None:
    made = models.make_tokenizer(tmp_path, template="{{ prompt }}{{ text }}{{ stops }}{{ self }}" + models.TEMPLATE)
    given = chat.template_kwargs(["prompt=a", "text=b", "stops=c", "tokenizer=d", "turns=e"])
    assert made.decode(chat.render_prompt(made, HELLO, **given)).startswith(f"{made.bos_token}abc")
    assert chat.response_ids(made, HELLO, "hi", [TURN_END], **given)[1]


def test_response_ids_follow_the_template_arguments(tmp_path: Path) -> None:
    """As Qwen3 does: without thinking an empty block is part of the prompt, and of the finished turn."""
    empty = "{% if thinking is false %}<think></think>{% endif %}"
    turn = "{{ '<|assistant|>' }}" + empty
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|turn_end|>{% else %}"
        + turn + "{{ m.content }}<|turn_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}" + turn + "{% endif %}"
    )  # fmt: skip
    made = models.make_tokenizer(tmp_path, template=template)
    for given in ({}, {"thinking": False}):
        ids, ended = chat.response_ids(made, HELLO, "hi", [TURN_END], **given)
        assert (made.decode(ids), ended) == ("hi<|turn_end|>", True)
    assert made.decode(chat.render_prompt(made, HELLO, thinking=False)).endswith("<|assistant|><think></think>")
    assert made.decode(chat.render_prompt(made, HELLO)).endswith("<|assistant|>")


def test_a_template_that_refuses_a_role_is_a_usage_error(tmp_path: Path) -> None:
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    made = models.make_tokenizer(tmp_path, template=refuse + models.TEMPLATE)
    with pytest.raises(UsageError, match="no system turn"):
        chat.render_prompt(made, [{"role": "system", "content": "be brief"}, *HELLO])


def test_stop_ids(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    assert chat.stop_ids(tmp_path, tokenizer) == [EOS]
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert chat.stop_ids(tmp_path, tokenizer) == [7, EOS]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257, 259]}')
    assert chat.stop_ids(tmp_path, tokenizer) == [EOS, TURN_END]  # config.json is out of play
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 259}')
    assert chat.stop_ids(tmp_path, tokenizer) == [EOS, TURN_END]
    (tmp_path / "generation_config.json").write_text('{"top_k": 3}')
    assert chat.stop_ids(tmp_path, tokenizer) == [EOS]
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(UsageError):
        chat.stop_ids(tmp_path, tokenizer)


def test_context_length(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json"):
        chat.context_length(tmp_path)
    for config, expected in (
        ({"max_position_embeddings": 64}, 64),
        ({"text_config": {"max_position_embeddings": 32}}, 32),
        ({"n_positions": 16}, 16),
        ({}, None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert chat.context_length(tmp_path) == expected


def test_response_ends_at_its_first_stop_id(tokenizer: Any) -> None:
    ids, ended = chat.response_ids(tokenizer, HELLO, "hi you", [EOS, TURN_END])
    assert ended
    assert ids[-1] == TURN_END
    assert tokenizer.decode(ids[:-1]) == "hi you"


def test_response_without_a_stop_id(tokenizer: Any) -> None:
    ids, ended = chat.response_ids(tokenizer, HELLO, "hi", [EOS])
    assert not ended
    assert tokenizer.decode(ids) == "hi<|turn_end|>"


def test_nothing_after_the_stop_is_kept(tmp_path: Path) -> None:
    made = models.make_tokenizer(tmp_path, template=models.TEMPLATE.replace("<|turn_end|>'", "<|turn_end|>\\n'"))
    ids, _ = chat.response_ids(made, HELLO, "hi", [TURN_END])
    assert made.decode(ids) == "hi<|turn_end|>"


@pytest.mark.parametrize("text", ["", " ", "\n\nindented", "trailing  ", "日本語 🙂", "x" * 100_000])
def test_response_ids_equal_what_sampling_would_give(text: str, tokenizer: Any) -> None:
    ids, ended = chat.response_ids(tokenizer, HELLO, text, [TURN_END])
    assert ended
    assert ids[:-1] == tokenizer.encode(text, add_special_tokens=False)


def test_lone_surrogates_do_not_crash(tokenizer: Any) -> None:
    ids, ended = chat.response_ids(tokenizer, [{"role": "user", "content": "\ud83d"}], "half \ud83d", [TURN_END])
    assert ended
    assert tokenizer.decode(ids[:-1]) == "half ?"


def test_a_stop_token_written_in_the_text_ends_the_turn(tokenizer: Any) -> None:
    ids, ended = chat.response_ids(tokenizer, HELLO, "hi<|turn_end|> and more", [EOS, TURN_END])
    assert ended
    assert tokenizer.decode(ids) == "hi<|turn_end|>"


def test_other_special_tokens_written_in_the_text_stay_characters(tokenizer: Any) -> None:
    text = "you: <|user|>why<|assistant|><|begin|>"
    ids, ended = chat.response_ids(tokenizer, HELLO, text, [TURN_END])
    assert ended
    assert all(number < 256 for number in ids[:-1])
    assert tokenizer.decode(ids[:-1]) == text
    # and the option does not stick to the tokenizer
    assert tokenizer.encode("<|user|>", add_special_tokens=False) == [261]


def test_forged_turns_end_at_the_first_stop(tokenizer: Any) -> None:
    ids, _ = chat.response_ids(tokenizer, HELLO, "<|user|>a<|end|><|turn_end|>", [EOS, TURN_END])
    assert tokenizer.decode(ids) == "<|user|>a<|end|>"
    assert [number for number in ids if number >= 256] == [EOS]


def test_a_template_that_trims_the_response(tmp_path: Path) -> None:
    made = models.make_tokenizer(tmp_path, template=models.TEMPLATE.replace("['content']", "['content'] | trim"))
    ids, _ = chat.response_ids(made, HELLO, "  hi <|user|> ", [TURN_END])
    assert made.decode(ids) == "hi <|user|><|turn_end|>"
    assert [number for number in ids if number >= 256] == [TURN_END]


def test_a_template_that_changes_the_prompt_is_a_usage_error(tmp_path: Path) -> None:
    made = models.make_tokenizer(tmp_path, template="{{ messages | length }}" + models.TEMPLATE)
    with pytest.raises(UsageError, match="renders the prompt differently") as caught:
        chat.response_ids(made, HELLO, "hi", [TURN_END])
    assert caught.value.hint


def test_no_second_space_from_a_tokenizer_that_adds_one(tmp_path: Path) -> None:
    made = models.make_spaced_tokenizer(tmp_path)
    ids, ended = chat.response_ids(made, HELLO, "hi", [2])
    assert ended
    assert made.convert_ids_to_tokens(ids) == ["▁hi", "</s>"]
    whole = made.apply_chat_template([*HELLO, {"role": "assistant", "content": "hi"}], tokenize=False)
    assert chat.render_prompt(made, HELLO) + ids == made.encode(whole, add_special_tokens=False)
