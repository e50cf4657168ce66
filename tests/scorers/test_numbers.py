from __future__ import annotations

from fractions import Fraction

import pytest

from bnfctl.scorers.numbers import answer_number, gold_number, numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18", [18]),
        ("-18 and +3", [-18, 3]),
        ("\u221218", [-18]),  # minus sign
        ("16-3=13", [16, 3, 13]),
        ("x-3", [3]),
        ("(2)-3", [2, 3]),
        ("= -4", [-4]),
        ("- 5 apples", [5]),  # the dash of a list
        ("$1,234.50.", [Fraction("1234.5")]),
        ("-$5 or $-5 or \\$5", [-5, -5, 5]),
        ("1,2,3", [1, 2, 3]),
        ("12,3456", [12, 3456]),
        ("1{,}000", [1000]),
        ("50%", [50]),
        ("2/3", [Fraction(2, 3)]),
        ("-2/3", [Fraction(-2, 3)]),
        ("2 1/2 and 2½ and ½", [Fraction(5, 2), Fraction(5, 2), Fraction(1, 2)]),
        ("\\frac{1}{2} \\dfrac{-3}{4}", [Fraction(1, 2), Fraction(-3, 4)]),
        ("5/0", []),
        (".5", [Fraction(1, 2)]),
        ("1e3 2.5E-1", [1000, Fraction(1, 4)]),
        ("3 eggs", [3]),
        ("\uff11\uff18", [18]),
        ("1e999999999", [1, 999999999]),
        ("9" * 5000, []),
        ("none", []),
        ("", []),
    ],
)
def test_numbers(text: str, expected: list[Fraction]) -> None:
    assert list(numbers(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"reasoning": "2 * 9", "answer": "18"}', 18),
        ('Here: ```json\n{"reasoning": "a\nb", "answer": "$18"}\n``` and 99', 18),
        ('{"answer": 18}', 18),
        ('{"answer": 18.0, "confidence": 7}', 18),
        ('{"answer": "4 * 15 * 12 = 720"}', 720),
        ('{"answer": "18 eggs in 2 days"}', 18),
        ('{"answer": "x = 18 (see step 3)"}', 18),
        ('{"answer": "1"} no: {"answer": "2"}', 2),
        ('{"reasoning": "{1, 2} braces }", "answer": "3"}', 3),
        ('{"Answer": "3"}', 3),
        ('{"reasoning": "bad \\( escape", "answer": "18"}', 18),  # not JSON
        ('{"reasoning": "cut", "answer": "18', 18),
        ('{"reasoning": "cut", "answer": 18', 18),
        ("{'reasoning': 'single quotes 4', 'answer': '18'}", 18),
        ('{"reasoning": "18 + 3", "answer": ""}', None),
        ('{"reasoning": "18 + 3", "answer": null}', None),
        ('{"reasoning": "18", "answer": "unknown"}', None),
        ('{"reasoning": "2 + 3 = 5", "answer": {"total": 5}}', 5),
        ("so 3 + 4 = 7.\n#### 7\nthat took 2 steps", 7),
        ("\\boxed{12} of 30", 12),
        ("\\boxed{\\frac{1}{2}}", Fraction(1, 2)),
        ("She has 3 + 4 = 7 eggs.", 7),
        ("no number", None),
        ("", None),
        ("{" * 10_000, None),
        ("[" * 100_000, None),
        ('{"a":' * 50_000, None),
        ("\ud800 is 5", 5),
        ('{"answer": "\\ud800 5"}', 5),
    ],
)
def test_answer_number(text: str, expected: Fraction | None) -> None:
    assert answer_number(text) == expected


@pytest.mark.parametrize("answer", ["18", "# 18", "#### 18", "$18", "18.00", "2 * 9 = 18 days\n#### 18", " 18 "])
def test_gold_number(answer: str) -> None:
    assert gold_number(answer) == 18


def test_gold_without_a_number() -> None:
    assert gold_number("yes") is None


def test_long_texts_take_linear_time() -> None:
    for text in (
        "1 " * 200_000,
        "-" * 300_000,
        "1," * 200_000,
        "\\boxed{" * 50_000,
        '"answer":' * 50_000,
        " " * 500_000,
    ):
        answer_number(text)
