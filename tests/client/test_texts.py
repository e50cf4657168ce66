"""Places in prompts, and what a response says after its thinking."""

from __future__ import annotations

import time

import pytest

from bnfctl.client.texts import fill, said, visible


def test_places_are_filled_in_one_pass() -> None:
    assert fill("{a}{b}{c} {", {"a": "{b}\\1", "b": "{mark}"}) == "{b}\\1{mark}{c} {"
    first, second = fill("{mark}{a}", {"a": "x"}), fill("{mark}{a}", {"a": "y"})
    assert len(first) == 11 and first[:10] != second[:10]
    assert fill("{a}", {"a": "half \ud83d an emoji"}) == "half ? an emoji"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a</think>b</think>c", "c"),
        ("<think>a</think>the tag </think> ends it", "ends it"),
        ("a <think> b </think> c </think> d", "d"),
        ("a</think>4 <think>b</think> and 5", "4  and 5"),
        ("4 <think>b", "4 "),
        ("a</think>", ""),
        ("a</think> <think>b", None),
        ("<think>a", None),
        (" as it is", " as it is"),
    ],
)
def test_thinking_ends_with_its_last_tag(text: str, shown: str | None) -> None:
    assert visible(text) == shown
    assert said(text) == (shown or "")


def test_many_tags_take_linear_time() -> None:
    started = time.process_time()
    assert visible("4" + "<think>" * 200_000) == "4"
    assert visible("<think></think>" * 100_000) == ""
    assert time.process_time() - started < 1
