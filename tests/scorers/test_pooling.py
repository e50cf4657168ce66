"""vLLM's pooling against transformers on a tiny classifier; the real engine, on a CPU too."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from bnfctl.data.chat import render_conversation
from bnfctl.errors import UsageError
from bnfctl.scorers.classifier import ClassifierScorer
from tests import models
from tests.scorers.classifier_cases import GROUPS, config, group, near, values

installed = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not installed, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> ClassifierScorer:
    return ClassifierScorer(config(engine="vllm"), folder)


@pytest.mark.vllm
@needs_vllm
def test_pooling_equals_transformers(scorer: ClassifierScorer, folder: Path) -> None:
    """Raw logits: a sigmoid would leave them all inside (0, 1)."""
    expected = values(ClassifierScorer(config(), folder), GROUPS)
    flat = [value for rewards in expected for value in rewards if value is not None]
    assert min(flat) < 0 and max(flat) > 1
    assert near(values(scorer, GROUPS), expected, 1e-4)
    assert near(values(scorer, GROUPS[::-1])[::-1], expected, 1e-4)
    assert scorer.version.startswith("vllm ")


@pytest.mark.vllm
@needs_vllm
def test_the_longest_sequence_fits(scorer: ClassifierScorer, folder: Path) -> None:
    turns = [*group(1).prompt.messages, {"role": "assistant", "content": ""}]
    room = 200 - len(render_conversation(scorer.tokenizer, turns))
    at_the_limit = group(1, "x" * room, "x" * (room + 1))
    (rewards,) = scorer.score([at_the_limit])
    assert rewards[1].extra == {"too_long": 201}
    (expected,) = ClassifierScorer(config(), folder).score([at_the_limit])
    assert rewards[0].value == pytest.approx(expected[0].value, abs=1e-4)
    assert next(scorer.score([group(1, "x" * 300)]))[0].value is None


@pytest.mark.vllm
@needs_vllm
def test_equal_responses_are_tied_exactly(scorer: ClassifierScorer) -> None:
    ((first, _, second),) = scorer.score([group(3, "the same", "another", "the same")])
    assert first.value is not None and first == second


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    """vLLM itself would make up the missing head."""
    path = models.make_llama(tmp_path)
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": {"0": "x"}, "label2id": {"x": 0}}))
    with pytest.raises(UsageError, match="lacks the head"):
        ClassifierScorer(config(engine="vllm"), path)


@pytest.mark.skipif(installed, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_a_usage_error(folder: Path) -> None:
    with pytest.raises(UsageError, match="cannot be imported") as caught:
        ClassifierScorer(config(engine="vllm"), folder)
    assert caught.value.where == "--engine"
    assert "--engine transformers" in (caught.value.hint or "")
