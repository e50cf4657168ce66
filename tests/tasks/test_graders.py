"""The graders of the four tasks, case by case."""

from __future__ import annotations

import sys
import threading
from fractions import Fraction
from typing import Any

import pytest

from bnfctl.data import math_library
from bnfctl.data.records import Prompt
from bnfctl.errors import UsageError
from bnfctl.tasks.crux import GRADERS, Crux
from bnfctl.tasks.gsm8k import GSM8K
from bnfctl.tasks.math_l5 import MathL5
from bnfctl.tasks.mathematics import first_number, mathverify
from bnfctl.tasks.mmlu_redux import MMLURedux
from bnfctl.tasks.zeroeval import Parsed


def parsed(answer: Any) -> Parsed:
    return Parsed(True, answer, "")


def item(answer: str) -> Prompt:
    return Prompt("i", ({"role": "user", "content": "?"},), answer)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("18", 18), ("$1,234.50 per day", Fraction("1234.5")), ("-4, -5", -4), ("1,360 - (64+30+48) = 1,218", 1360),
        ("x = -3", -3), ("10-5", 10), ("no number", None), ("", None), ("3/4", Fraction(3, 4)), ("3/4 cup", 3),
        (" -1.5 / 3 ", Fraction(-1, 2)), ("1/0", 1), ("01/02", 1), ("1 1/2", 1), ("2:10 pm", 2), ("5%", 5),
        ("((300 * 4) + (120 * 6) + (60 * 24)) / 12", 280), ("400 * 0.4 / 4", 40), ("64/4 = 16", 64), ("7//2", 3),
        ("2(3)/1", 2), ("1/2^2", 1), ("2**10/4", 256), ("9**9**9**9/1", 9), ("10/3*3", 10), ("1 + 2", 1), ("N/A", None),
        ("-(1/2)", Fraction(-1, 2)), ("['18']", 18), ("\u0661\u0668", 18), ("0x10/2", 0), ("1e5/2", 1), ("__import__('os')/1", 1),
    ],
)  # fmt: skip
def test_numbers(answer: str, value: Fraction | None) -> None:
    assert first_number(answer) == value


@pytest.mark.parametrize(
    ("answer", "right"),
    [(18, True), ("18", True), (18.0, True), (["18"], True), ("$18", True), ("36/2", True), (True, False), (None, False),
     ("eighteen", False), ({"n": 18}, True), ("18.5", False), (17, False), ("", False)],
)  # fmt: skip
def test_gsm8k_and_math_l5(answer: Any, right: bool) -> None:
    for task in (GSM8K(), MathL5()):
        assert task.grade_answer(item("18"), parsed(answer)) == (right, {})


@pytest.mark.parametrize(
    ("answer", "right"),
    [("B", True), ("B) 20", True), ("(B)", True), ("(B) 20", True), ("C", False), ("b", False), ("B.", False), (1, False),
     (True, False), (["B"], False), (["B)"], True), ({"B)": 1}, True), (2.5, False), ("A) or B)", True)],
)  # fmt: skip
def test_mmlu_redux(answer: Any, right: bool) -> None:
    assert MMLURedux().grade_answer(item("B"), parsed(answer)) == (right, {})


def test_of_equal_choices_the_first_is_the_right_one() -> None:
    row = {"id": "x", "question": "?", "choices": ["a", "b", "b"], "correct_answer": "b"}
    assert MMLURedux().item(row, 0, "here").answer == "B"


@pytest.mark.parametrize(
    ("answer", "gold", "first", "second", "literal"),
    [
        ("[1, 2]", "[1, 2]", True, True, True),
        ("[1,2]", "[1, 2]", False, False, True),
        ([1, 2], "[1, 2]", True, True, True),
        ("abc", "'abc'", True, True, True),
        ('"abc"', "'abc'", True, True, True),
        ("", "''", False, True, True),
        ("''", "''", False, True, True),
        ("a\nb", "'a\\nb'", False, True, True),
        ("1", "'1'", True, True, True),
        ("1", "True", False, False, False),
        ("1.0", "1", False, False, False),
        ("[1.0]", "[1]", False, False, False),
        ("{'b': 2, 'a': 1}", "{'a': 1, 'b': 2}", False, False, True),
        ("{'a': True}", "{'a': 1}", False, False, False),
        ("{2, 1}", "{1, 2}", False, False, True),
        ("{True}", "{1}", False, False, False),
        ("(1)", "(1,)", False, False, False),
        ("f(1)", "1", False, False, False),
        ("8.50", "8.5", False, False, True),
        (True, "True", True, True, True),
        ("None", "None", True, True, True),
        ("{[1]}", "{1}", False, False, False),
        ("abc", "abc", True, True, True),
    ],
)
def test_crux_graders(answer: Any, gold: str, first: bool, second: bool, literal: bool) -> None:
    expected = {"zeroeval-20240801": first, "zeroeval-20240922": second, "literal": literal}
    for name in GRADERS:
        right, others = Crux(crux_grader=name).grade_answer(item(gold), parsed(answer))
        assert {name: right, **others} == expected


def test_an_unparsed_response_is_wrong_even_where_nothing_is_the_known_answer() -> None:
    assert Crux().grade_answer(item("''"), Parsed(False, None, ""))[0] is False


def test_the_grader_is_named_and_part_of_the_version() -> None:
    assert len({Crux(crux_grader=name).version for name in GRADERS}) == len(GRADERS)
    with pytest.raises(UsageError, match="no grader 'literals' \\(did you mean 'literal'") as caught:
        Crux(crux_grader="literals")
    assert "zeroeval-20240801" in str(caught.value.hint)


def test_cruxevals_own_rows() -> None:
    row = {"code": "def f(n):\n    return n + 1", "input": "16", "output": "17", "id": "sample_3"}
    found = Crux().item(row, 3, "here")
    assert (found.id, found.answer) == ("crux-test-#3", "17")
    assert found.question.endswith("[PYTHON]\ndef f(n):\n    return n + 1\nassert f(16) == ??\n[/PYTHON]")


def test_gsm8ks_own_rows() -> None:
    found = GSM8K().item({"question": "?", "answer": "It is 9 * 2 = <<9*2=18>>18.\n#### 18"}, 7, "here")
    assert (found.id, found.answer) == ("gsm8k-main-test-#7", "18")


@pytest.mark.parametrize(
    ("answer", "gold", "grade"),
    [
        ("70,000", "70000", 1.0), ("$18", "18", 1.0), (18, "18", 1.0), ("17", "18", 0.0), ("\\frac{36}{2}", "18", 1.0),
        ("2k+2", "2", 0.0), ("\\sqrt{324}", "18", 1.0), ("\\boxed{18}", "18", 1.0), ("She has 18 dollars", "18", 1.0),
        ("-4, -5", "-4", 0.0), ("", "18", 0.0), ("x" * 401, "18", None), ("$9^{9^{9^9}}$", "1", None),
    ],
)  # fmt: skip
def test_math_verify(monkeypatch: pytest.MonkeyPatch, answer: Any, gold: str, grade: float | None) -> None:
    monkeypatch.setattr(math_library, "SECONDS", 1)
    assert mathverify(gold, parsed(answer)) == grade


def test_math_verify_beside_the_grade() -> None:
    task = GSM8K(mathverify=True)
    right = task.grade(item("18"), '{"answer": "\\\\frac{36}{2}"}')
    assert (right.value, right.extra["also"]) == (0.0, {"mathverify": 1.0})
    none = task.grade(item("18"), "who knows")
    assert task.aggregate([right, none])["acc_mathverify"] == 0.5
    assert task.version != GSM8K().version and "math-verify" in task.version


def test_math_verify_in_a_thread_is_asked_only_what_ends() -> None:
    found: list[float | None] = []
    answers = ["$\\frac{36}{2}$", "9^{9^{9^9}}", "99999!", "18"]
    thread = threading.Thread(target=lambda: found.extend(mathverify("18", parsed(one)) for one in answers))
    thread.start()
    thread.join()
    assert found == [1.0, None, None, 1.0]


def test_without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    math_library._imported.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    GSM8K()
    with pytest.raises(UsageError, match="math-verify cannot be imported") as caught:
        GSM8K(mathverify=True)
    assert (caught.value.where, caught.value.hint) == ("--mathverify", "pip install 'bnfctl[math]'")
    math_library._imported.cache_clear()
