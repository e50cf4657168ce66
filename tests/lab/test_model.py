"""The embedded model: loads as any Llama, small enough to ship, and as good and as bad as the lab needs it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from bnfctl.lab import MODEL_PATH, pretrain, world  # noqa: E402
from bnfctl.lab.tokenizer import SPECIAL_TOKENS, build_tokenizer  # noqa: E402

TEXTS = [
    "",
    " ",
    "plain text",
    "Žluťoučký kůň 🍋\n\t\r\n",
    "\x00\x7f",
    "日本語 — «ok»",
    "  two  spaces , and a comma .",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small are slower on two threads than on one whenever anything else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32).eval()


def mean_reward(model, tokenizer, family: str, count: int, **sampling) -> float:
    """The mean reward of one response to each of the first `count` test prompts."""
    prompts = [item["prompt"] for item in world.prompts(family, "test", count)]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(0)
    tokens = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=80, **sampling)
    responses = tokenizer.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(world.verify(*pair) or 0.0 for pair in zip(prompts, responses, strict=True)) / count


def test_the_folder_holds_the_model_and_nothing_else() -> None:
    names = {path.name for path in MODEL_PATH.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert sum(path.stat().st_size for path in MODEL_PATH.iterdir()) < 4 << 20


def test_the_architecture_is_one_that_every_engine_takes(model) -> None:
    config = model.config
    assert type(model).__name__ == "LlamaForCausalLM"
    assert config.head_dim == 32 and config.max_position_embeddings == 4096
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_generation_config_stops_at_both_ends_and_changes_no_sampling_default(tokenizer) -> None:
    fields = json.loads((MODEL_PATH / "generation_config.json").read_text())
    fields.pop("transformers_version")
    ends = tokenizer.convert_tokens_to_ids(["<|turn_end|>", "<|end|>"])
    assert fields == {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.pad_token_id,
    }


def test_the_shipped_tokenizer_is_the_one_the_code_builds(tokenizer) -> None:
    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built.chat_template == tokenizer.chat_template
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
    assert len(tokenizer) == 256 + len(SPECIAL_TOKENS)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_encodes_to_its_bytes_and_back(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_plain_encoding_adds_bos_and_the_template_writes_its_own(tokenizer) -> None:
    bos = tokenizer.bos_token_id
    assert tokenizer.encode("hi")[0] == bos
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|user|>hi<|turn_end|><|assistant|>"
    assert tokenizer.encode(text, add_special_tokens=False).count(bos) == 1
    assert tokenizer.encode(text).count(bos) == 2


def test_the_template_takes_system_and_several_turns(tokenizer) -> None:
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    turn = "<|{}|>{}<|turn_end|>"
    assert text == "<|begin|>" + "".join(turn.format(t["role"], t["content"]) for t in turns)


def test_documents_start_with_the_prompt_as_the_template_gives_it(tokenizer) -> None:
    for prompt, response in islice(world.documents(0), 50):
        ids, prompt_length = pretrain.encode_document(tokenizer, prompt, response)
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ids[:prompt_length] == tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids[prompt_length:]) == response + "<|turn_end|>"


def test_targets_are_the_response_tokens_shifted_by_one(tokenizer) -> None:
    ids, prompt_length = pretrain.encode_document(tokenizer, "Add 1 and 2.", "3")
    tokens, targets = pretrain.collate([(ids, prompt_length), ([*ids, 7], prompt_length)], tokenizer.pad_token_id)
    assert tokens.shape == targets.shape == (2, len(ids) + 1)
    assert targets[0][targets[0] != pretrain.IGNORED].tolist() == ids[prompt_length:]
    assert targets[0, prompt_length - 1] == tokens[0, prompt_length] and tokens[0, -1] == tokenizer.pad_token_id


def test_pretraining_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "BATCH_DOCUMENTS", 8)
    losses = [pretrain.train(seed=0, steps=2)[2] for _ in range(2)]
    assert losses[0] == losses[1]


def test_reasoning_is_good_but_not_perfect(model, tokenizer) -> None:
    assert 0.7 < mean_reward(model, tokenizer, "reasoning", 200, do_sample=False) < 0.99


def test_chat_is_good_only_sometimes(model, tokenizer) -> None:
    assert 0.25 < mean_reward(model, tokenizer, "chat", 150, do_sample=True, temperature=0.8, top_k=0) < 0.65
    assert 0.25 < mean_reward(model, tokenizer, "chat", 80, do_sample=False) < 0.75


def test_math_is_wrong_a_sizeable_share_of_the_time(model, tokenizer) -> None:
    # the lower bound is loose: this base has hardly learnt the arithmetic under the corpus's noise (NOTES.md)
    assert 0.05 < mean_reward(model, tokenizer, "math", 150, do_sample=True, temperature=0.8, top_k=0) < 0.85
