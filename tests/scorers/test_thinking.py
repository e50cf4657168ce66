"""Thinking that scorers do not see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from bnfctl.config import ScoreConfig
from bnfctl.data.records import Candidate, Group, Prompt, Reward
from bnfctl.scorers import make
from bnfctl.scorers.thinking import UNCLOSED, WithoutThinking, visible_texts


def candidates(*texts: str) -> tuple[Candidate, ...]:
    return tuple(Candidate("p", i, text, token_ids=[1, 2]) for i, text in enumerate(texts))


def group(name: str, *texts: str) -> Group:
    return Group(Prompt(name, ({"role": "user", "content": "?"},), "4"), candidates(*texts))


class Lengths:
    """Gives the number of characters; `ahead` reads all groups before it answers."""

    version = "1"

    def __init__(self, ahead: bool) -> None:
        self.ahead = ahead
        self.seen: list[Group] = []

    def score(self, groups: Iterable[Group]) -> Iterator[list[Reward]]:
        for one in list(groups) if self.ahead else groups:
            self.seen.append(one)
            yield [Reward(float(len(candidate.text))) for candidate in one.candidates]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<think>2 + 2</think>\n\nIt is 4.", "It is 4."),
        ("<think>\n</think>4", "4"),
        ("  <think>a</think> b <think>c\nd</think> e", "b  e"),
        ("no thinking at all ", "no thinking at all "),
        ("\nkept as it is", "\nkept as it is"),
        ("<think>the tag <think> opens it</think>4", "4"),
        ("2 + 2 is\n</think>\n4", "4"),
        ("first </think>4, see <think>more</think> above", "4, see  above"),
        ("<think>a</think>the tag </think> ends it", "ends it"),
        ("a</think>b</think>c", "c"),
        ("It is 4. <think>or not", "It is 4. "),
        ("<think>a</think>", ""),
        ("", ""),
        ("<THINK>a</THINK>", "<THINK>a</THINK>"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert visible_texts(candidates(text)) == [shown]


@pytest.mark.parametrize("text", ["<think>", "<think>2 + 2", "\n<think>a <b> c", "<think>a</think>\n<think>b"])
def test_a_response_cut_in_its_thinking_shows_nothing(text: str) -> None:
    assert visible_texts(candidates(text)) == [None]


def test_a_block_that_the_prompt_opens_is_known_by_the_other_responses() -> None:
    assert visible_texts(candidates("so\n</think>4", "well, let me see, 2 +")) == ["4", None]
    assert visible_texts(candidates("<think>so</think>4", "4, at once")) == ["4", "4, at once"]


@pytest.mark.parametrize("ahead", [False, True])
def test_rewards_stay_with_their_candidates(ahead: bool) -> None:
    inner = Lengths(ahead)
    groups = [
        group("a", "<think>.."),
        group("b", "<think>1</think>12", "<think>", "123"),
        group("c", "<think>", "<think>x"),
        group("d"),
        group("e", "1234"),
        group("f", "<think>"),
    ]
    unclosed = Reward(None, UNCLOSED)
    assert list(WithoutThinking(inner).score(groups)) == [
        [unclosed], [Reward(2.0), unclosed, Reward(3.0)], [unclosed, unclosed], [], [Reward(4.0)], [unclosed],
    ]  # fmt: skip
    assert [one.prompt.id for one in inner.seen] == ["b", "e"]
    assert groups[1].candidates[0].text == "<think>1</think>12"
    assert [candidate.token_ids for candidate in inner.seen[0].candidates] == [None, [1, 2]]


def test_nothing_is_read_before_it_is_needed() -> None:
    def endless() -> Iterator[Group]:
        number = 0
        while True:
            yield group(str(number), "<think>a</think>" + "b" * number)
            number += 1

    found = WithoutThinking(Lengths(ahead=False)).score(endless())
    assert [next(found)[0].value for _ in range(4)] == [0.0, 1.0, 2.0, 3.0]


def scored(text: str, **changes: Any) -> Reward:
    ((reward,),) = make(ScoreConfig(input="x", **changes)).score([group("p", text)])
    return reward


def test_the_flag_reaches_every_scorer() -> None:
    text = "<think>maybe 5</think>4"
    assert scored(text, rule="exact").value == 0.0
    assert scored(text, rule="exact", thinking="strip").value == 1.0
    assert scored("<think>4", thinking="strip") == Reward(None, UNCLOSED)
    assert scored("<think>4", thinking="keep").value == 1.0
