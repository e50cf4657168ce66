"""The rule math-verify, with the library itself."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from bnfctl.config import ScoreConfig
from bnfctl.data import math_library
from bnfctl.data.records import Candidate, Group, Prompt, Reward
from bnfctl.errors import UsageError
from bnfctl.scorers import make, mathematics, rules

CONFIG = ScoreConfig(input="x", rule="math-verify")


def reward(answer: str | None, response: str) -> Reward:
    return mathematics.math_verify(Prompt("p", ({"role": "user", "content": "?"},), answer), response, CONFIG)


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("18", "so it is \\boxed{18}"),
        ("#### 70,000", "The answer is 70000."),
        ("\\frac{1}{2}", "it is $0.5$"),
        ("$\\frac12$", "1/2"),
        ("x^2+2x+1", "$(x+1)^2$"),
        ("(1,2]", "The interval is $(1, 2]$."),
        ("\\{1,2\\}", "$\\{2,1\\}$"),
        ("\\sqrt{12}", "\\[ 2\\sqrt{3} \\]"),
        ("5 apples", "$5$"),
        ("18 dollars.", "18"),
        ("18", '{"reasoning": "2 * 9", "answer": "She has 18 dollars left"}'),
        ("\\frac{1}{2}", '{"reasoning": "$3$ of $6$", "answer": "\\\\frac{3}{6}"}'),
        ("66", "It is 3 books * $16 = $48, so I pay $48 + $18.\n#### 66"),
        ("xy", "$y x$"),
    ],
)
def test_equal_as_mathematics(answer: str, response: str) -> None:
    assert reward(answer, response).value == 1.0


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("18", "\\boxed{17}"),
        ("x^2", "$x^3$"),
        ("\\sqrt{2}", "1.4142"),
        ("1/3", "0.33"),
        ("3 million", "3"),
        ("18", 'It is $18$. {"answer": "17"}'),
        ("18", '{"reasoning": "18", "answer": ""}'),
    ],
)
def test_not_equal(answer: str, response: str) -> None:
    assert reward(answer, response).value == 0.0


def test_a_response_without_an_answer_is_zero_and_says_so() -> None:
    assert reward("18", "who knows") == Reward(0.0, {"parsed": None})
    assert reward("18", "\\boxed{17}") == Reward(0.0, {"parsed": "17"})


@pytest.mark.parametrize("answer", [None, "", "#", "yes", "Paris, France", "日本語です"])
def test_no_known_answer_that_is_mathematics_is_a_null_reward(answer: str | None) -> None:
    """In letters, "parts" would equal "strap"."""
    assert reward(answer, "\\boxed{18}") == Reward(None)


def test_what_has_no_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_library, "SECONDS", 1)
    assert reward("1", "$9^{9^{9^9}}$") == Reward(None, {"timeout": 1})


def test_in_a_thread_it_works_without_its_timeout() -> None:
    """Signals, which stop it, exist in the main thread only."""
    found: list[Reward] = []
    thread = threading.Thread(target=lambda: found.extend([reward("1/2", "$0.5$"), reward("1/2", "$0.6$")]))
    thread.start()
    thread.join()
    assert [one.value for one in found] == [1.0, 0.0]


@pytest.mark.parametrize("text", ["\ud800", "x" * 100_000, "\\boxed{" * 1000, "$" * 10_000, "\x00", "\\frac{1}{0}"])
def test_strange_texts_do_not_crash(text: str) -> None:
    assert reward("18", text).value == 0.0


@pytest.mark.parametrize(
    "text", ["5 " + "a" * 5000 + "1", "5 " + "ab " * 2000 + "1", "a" * 5000 + "1", "5" + " " * 5000]
)
def test_marked_answers_are_prepared_in_linear_time(text: str) -> None:
    started = time.process_time()
    mathematics._delimited(text)
    assert time.process_time() - started < 1


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    math_library._imported.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    for ask in (lambda: make(CONFIG), lambda: rules.version_of("math-verify")):
        with pytest.raises(UsageError, match="math-verify cannot be imported") as caught:
            ask()
        assert (caught.value.where, caught.value.hint) == ("--rule", "pip install 'bnfctl[math]'")


def test_the_key_names_the_library() -> None:
    from importlib.metadata import version

    assert rules.version_of("math-verify") == f"{mathematics.VERSION}, math-verify {version('math-verify')}"
    group = Group(Prompt("p", ({"role": "user", "content": "?"},), "2"), (Candidate("p", 0, "$1+1$"),))
    assert [[one.value for one in rewards] for rewards in make(CONFIG).score([group])] == [[1.0]]
