"""The lab's prompts, verifiers and corpus: fixed for ever, disjoint, and right on good, bad and odd responses."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from itertools import islice
from random import Random

import pytest

from bnfctl.errors import UsageError
from bnfctl.lab import MODEL_PATH, chat, reasoning, world

DIGEST_OF_WORLD = "a180057ef30636e1d0115c5ee281e425d46dffa24d7293c78d6e6a4a8b230813"
LEMON = "What colour is the lemon?"


def texts(family: str, split: str, limit: int | None = None) -> list[str]:
    return [item["prompt"] for item in world.prompts(family, split, limit)]


@pytest.mark.parametrize("family", world.FAMILIES)
def test_splits_are_distinct_and_disjoint(family: str) -> None:
    train, test = texts(family, "train"), texts(family, "test")
    assert len(set(train)) == len(train) and len(set(test)) == len(test)
    assert not set(train) & set(test)
    assert len(train) > 5000 and len(test) > 1500


@pytest.mark.parametrize("family", world.FAMILIES)
def test_a_limit_takes_the_first_ones(family: str) -> None:
    items = list(world.prompts(family, "test", 20))
    assert items == list(islice(world.prompts(family, "test"), 20))
    assert [item["id"] for item in items[:2]] == [f"lab-{family}-test-000000", f"lab-{family}-test-000001"]
    assert list(world.prompts(family, "test", 0)) == []


def test_prompts_and_corpus_never_change() -> None:
    lines = [f"{family}\t{text}" for family in world.FAMILIES for text in texts(family, "train", 500)]
    lines += [f"{prompt}\t{response}" for prompt, response in islice(world.documents(0), 500)]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == DIGEST_OF_WORLD


@pytest.mark.parametrize(("family", "split"), [("chta", "train"), ("chat", "tset")])
def test_unknown_names_are_usage_errors_with_the_nearest_name(family: str, split: str) -> None:
    with pytest.raises(UsageError) as error:
        world.prompts(family, split)
    assert "did you mean" in error.value.what and error.value.hint


@pytest.mark.parametrize("family", world.FAMILIES)
def test_every_gold_response_earns_one_and_its_answer_agrees(family: str) -> None:
    for item in world.prompts(family, "test", 1500):
        response = world.gold(item["prompt"])
        assert world.verify(item["prompt"], response) == 1.0
        assert (item["answer"] is None) == (family == "chat")
        assert str(item["answer"] or "") in response


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("Sure! The lemon is yellow. Anything else?", 1.0),
        ("Sure! The lemon is yellow.", 0.8),
        ("The lemon is yellow.", 0.6),
        ("The lemon is good for cooking.", 0.3),
        ("Sure! The brick is red. Anything else?", 0.4),
        ("Sure! The lemon is yellow. The brick is red. Anything else?", 0.4),
        ("The lemon" + ", well, the lemon" * 8 + ".", 0.2),
        ("Sure! The lemon is yellow." + " The lemon is yellow." * 8 + " Anything else?", 0.9),
        ("No idea.", 0.0),
        ("", 0.0),
        ("  \n", 0.0),
        ("Žluťoučký 🍋 \x00", 0.0),
    ],
)
def test_chat_rewards(response: str, reward: float) -> None:
    assert world.verify(LEMON, response) == pytest.approx(reward)


@pytest.mark.parametrize(
    ("prompt", "response", "reward"),
    [
        ("Add 19 and 7.", "26", 1.0),
        ("Add 19 and 7.", " 26\n", 1.0),
        ("Add 19 and 7.", "27", 0.0),
        ("Add 19 and 7.", "", 0.0),
        ("Reverse plum.", "mulp", 1.0),
        ("Sort 3140.", "0134", 1.0),
        ("Count a in banaa.", "3", 1.0),
        ("Tom has 19 pens and gets 7. How many now?", "Tom has 26 pens now.", 1.0),
        ("Tom has 19 pens and gets 7. How many now?", "Tom has 27 pens now.", 0.0),
        ("Tom has 19 pens and loses 7. How many now?", "Tom has 12 pens now.", 1.0),
        ("Tom has 19 pens and loses 7. How many now?", "Tom has ²⁶ pens.", 0.0),
    ],
)
def test_exact_rewards(prompt: str, response: str, reward: float) -> None:
    assert world.verify(prompt, response) == reward


@pytest.mark.parametrize(
    "prompt", ["", "What is the capital of Peru?", "What colour is the cow?", "Add 1 and x.", "🍋"]
)
def test_other_prompts_have_no_reward(prompt: str) -> None:
    assert world.verify(prompt, "Sure! The lemon is yellow. Anything else?") is None
    with pytest.raises(UsageError):
        world.gold(prompt)


def test_the_corpus_holds_train_prompts_only_and_both_good_and_bad_responses() -> None:
    corpus = list(islice(world.documents(3), 4000))
    assert all(world.split_of(prompt) == "train" for prompt, _ in corpus)
    rewards = [world.verify(prompt, response) for prompt, response in corpus if chat.parse(prompt)]
    assert {0.0, 0.2, 0.3, 0.6, 1.0} == set(rewards)
    assert all(world.verify(prompt, text) == 1.0 for prompt, text in corpus if reasoning.answer(prompt))


def test_how_often_the_corpus_is_good_depends_on_the_prompt() -> None:
    def mean(tone: str) -> float:
        rng = Random(0)
        return sum(world.verify(tone + LEMON, chat.corpus_response(tone + LEMON, rng)) or 0 for _ in range(1000)) / 1000

    assert mean("Please help me. ") > mean("") + 0.15 > mean("Answer now. ") + 0.3


def test_math_responses_right_and_wrong_differ_by_one_character() -> None:
    corpus = [pair for pair in islice(world.documents(4), 4000) if "How many now?" in pair[0]]
    wrong = [(prompt, response) for prompt, response in corpus if world.verify(prompt, response) == 0]
    assert 0.25 < len(wrong) / len(corpus) < 0.5
    for prompt, response in wrong:
        right = world.gold(prompt)
        assert len(right) == len(response) and sum(a != b for a, b in zip(right, response, strict=True)) == 1


def test_the_world_loads_no_torch() -> None:
    code = "import sys, bnfctl.lab.world; sys.exit(bool({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert MODEL_PATH.is_dir()
