from __future__ import annotations

from typing import Any

import pytest

from bnfctl.config import ScoreConfig
from bnfctl.data.records import Candidate, Group, Prompt, Reward
from bnfctl.errors import UsageError
from bnfctl.scorers import make, rules


def prompt(answer: str | None) -> Prompt:
    return Prompt("p", ({"role": "user", "content": "how many?"},), answer)


def config(**changes: Any) -> ScoreConfig:
    return ScoreConfig(input="x", **changes)


def test_numeric() -> None:
    assert rules.numeric(prompt("# 18"), "it is 18.00", config()) == Reward(1.0, {"parsed": "18"})
    assert rules.numeric(prompt("18"), "17", config()) == Reward(0.0, {"parsed": "17"})
    assert rules.numeric(prompt("0.5"), "1/2", config()).value == 1.0


def test_a_response_without_an_answer_is_zero_and_says_so() -> None:
    assert rules.numeric(prompt("18"), "who knows", config()) == Reward(0.0, {"parsed": None})
    assert rules.regex(prompt("18"), "who knows", config(pattern="#(.)")) == Reward(0.0, {"parsed": None})


def test_no_known_answer_is_a_null_reward() -> None:
    assert rules.numeric(prompt(None), "18", config()).value is None
    assert rules.numeric(prompt("yes"), "18", config()).value is None
    assert rules.exact(prompt(None), "18", config()).value is None
    assert rules.regex(prompt(None), "18", config(pattern="(.*)")).value is None


@pytest.mark.parametrize("response", ["Paris", " paris. ", "PARIS\n", "\uff30aris"])
def test_exact_up_to_form(response: str) -> None:
    assert rules.exact(prompt("Paris"), response, config()).value == 1.0


def test_exact_is_the_whole_response() -> None:
    assert rules.exact(prompt("Paris"), "It is Paris", config()).value == 0.0
    assert rules.exact(prompt("a  b"), "a b", config()).value == 1.0
    assert rules.exact(prompt("x"), "", config()) == Reward(0.0, {"parsed": None})


def test_regex_with_a_group_reads_the_last_match() -> None:
    pattern = config(pattern=r"Answer: (\w+)")
    assert rules.regex(prompt("b"), "Answer: a. No. Answer: B", pattern) == Reward(1.0, {"parsed": "B"})
    assert rules.regex(prompt("a"), "Answer: a. No. Answer: B", pattern).value == 0.0


def test_regex_without_a_group_is_a_match() -> None:
    assert rules.regex(prompt(None), "well done", config(pattern="done$")).value == 1.0
    assert rules.regex(prompt("x"), "not yet", config(pattern="done$")).value == 0.0


def test_regex_with_a_group_that_took_no_part() -> None:
    assert rules.regex(prompt("x"), "yes", config(pattern="no(.)|yes")) == Reward(0.0, {"parsed": None})


@pytest.mark.parametrize("pattern", [None, "", "(", "[a"])
def test_an_invalid_pattern_is_a_usage_error_before_anything_is_scored(pattern: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        make(config(rule="regex", pattern=pattern))
    assert caught.value.where == "--pattern"


def test_the_scorer_keeps_groups_and_order() -> None:
    groups = [
        Group(prompt("1"), tuple(Candidate("p", i, text) for i, text in enumerate(["1", "2", "one"]))),
        Group(prompt(None), (Candidate("p", 0, "1"),)),
    ]
    found = list(make(config(rule="numeric")).score(groups))
    assert [[reward.value for reward in rewards] for rewards in found] == [[1.0, 0.0, 0.0], [None]]


@pytest.mark.parametrize("text", ["\ud800", "x" * 1_000_000, '{"answer": ' * 1000, "🙂" * 1000, ""])
def test_strange_texts_do_not_crash(text: str) -> None:
    for rule in (rules.exact, rules.numeric, rules.regex):
        assert rule(prompt("18"), text, config(pattern="(zzz)")).value == 0.0


def test_a_reward_model_without_a_model_is_a_usage_error() -> None:
    with pytest.raises(UsageError) as caught:
        make(config(scorer="reward-model"))
    assert caught.value.where == "--model"
