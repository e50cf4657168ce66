from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bnfctl.config import ScoreConfig
from bnfctl.data.chat import render_conversation
from bnfctl.data.records import Candidate, Group, Prompt
from bnfctl.errors import UsageError
from bnfctl.scorers.classifier import ClassifierScorer
from tests import models


def config(**changes: Any) -> ScoreConfig:
    return ScoreConfig(**{"input": "x", "scorer": "reward-model", "dtype": "float32", "max_length": 200, **changes})


def group(number: int, *texts: str) -> Group:
    asked = Prompt(f"p{number}", ({"role": "user", "content": "why" * (number + 1)},))
    return Group(asked, tuple(Candidate(asked.id, i, text) for i, text in enumerate(texts)))


GROUPS = [group(i, "a" * (1 + 7 * i % 31), "yes", "no, " * (i % 9), "") for i in range(11)]


def values(scorer: ClassifierScorer, groups: list[Group]) -> list[list[float | None]]:
    return [[reward.value for reward in rewards] for rewards in scorer.score(groups)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> ClassifierScorer:
    return ClassifierScorer(config(), folder)


def test_the_reward_is_the_logit_of_the_rendered_conversation(scorer: ClassifierScorer, folder: Path) -> None:
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    for one, rewards in zip(GROUPS, values(scorer, GROUPS), strict=True):
        for candidate, reward in zip(one.candidates, rewards, strict=True):
            turns = [*one.prompt.messages, {"role": "assistant", "content": candidate.text}]
            ids = scorer.tokenizer(
                scorer.tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False
            )["input_ids"]
            assert ids.count(256) == 1
            with torch.no_grad():
                logit = model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1])
            assert reward == pytest.approx(float(logit), abs=1e-5)


def test_batch_size_and_order_change_nothing(scorer: ClassifierScorer, folder: Path) -> None:
    expected = values(scorer, GROUPS)
    assert len({value for rewards in expected for value in rewards}) > 30
    for batch_tokens in (1, 300, 100_000):
        other = values(ClassifierScorer(config(batch_tokens=batch_tokens), folder), GROUPS)
        assert torch.allclose(torch.tensor(other), torch.tensor(expected), atol=1e-5, rtol=0)
    backwards = values(scorer, GROUPS[::-1])[::-1]
    assert torch.allclose(torch.tensor(backwards), torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pad_in_tokenizer", [True, False])
def test_a_model_without_a_pad_id(pad_in_tokenizer: bool, tmp_path: Path, scorer: ClassifierScorer) -> None:
    """No pad id is safe to borrow: the end-of-turn id is the one that the reward is read at."""
    path = models.make_reward_model(tmp_path, pad_token_id=None, pad=pad_in_tokenizer)
    found = values(ClassifierScorer(config(), path), GROUPS)
    assert torch.allclose(torch.tensor(found), torch.tensor(values(scorer, GROUPS)), atol=1e-5, rtol=0)


def test_too_long_gets_no_reward(scorer: ClassifierScorer, folder: Path) -> None:
    mixed = group(1, "short", "x" * 300)
    (rewards,) = scorer.score([mixed])
    assert rewards[0].value is not None
    assert rewards[1].value is None
    turns = [*mixed.prompt.messages, {"role": "assistant", "content": "x" * 300}]
    assert rewards[1].extra == {"too_long": len(render_conversation(scorer.tokenizer, turns))}
    beyond = ClassifierScorer(config(max_length=100_000), folder)  # the model has 256 positions
    assert next(beyond.score([mixed]))[1].extra == rewards[1].extra


def test_only_one_label(tmp_path: Path) -> None:
    path = models.make_reward_model(tmp_path, labels=3)
    with pytest.raises(UsageError, match="one label") as caught:
        ClassifierScorer(config(), path)
    assert caught.value.where == str(path)


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    path = models.make_llama(tmp_path)
    with pytest.raises(UsageError, match="one label"):
        ClassifierScorer(config(), path)
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": {"0": "x"}, "label2id": {"x": 0}}))
    with pytest.raises(UsageError, match=r"the checkpoint lacks score"):
        ClassifierScorer(config(), path)


def test_a_folder_without_parameters_is_a_usage_error(tmp_path: Path) -> None:
    path = models.make_reward_model(tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(UsageError):
        ClassifierScorer(config(), path)


def test_nothing_to_score(scorer: ClassifierScorer) -> None:
    assert list(scorer.score([])) == []
    assert list(scorer.score([group(0)])) == [[]]


def test_strange_texts_do_not_crash(scorer: ClassifierScorer) -> None:
    (rewards,) = scorer.score([group(0, "\ud83d", "日本語 🙂", "<|begin|><|pad|>", "\x00")])
    assert all(reward.value is not None for reward in rewards)
