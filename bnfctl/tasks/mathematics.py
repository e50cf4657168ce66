"""Answers that are numbers: ZeroEval's grader, with exact fractions, and math-verify beside it (extra `math`)."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from bnfctl.artifact import Pinned
from bnfctl.data import math_library
from bnfctl.data.records import Prompt
from bnfctl.errors import UsageError
from bnfctl.tasks.items import text_column
from bnfctl.tasks.zeroeval import Item, Parsed, ZeroEvalTask

LONGEST = 4000
"""Digits of a number; Python itself refuses more than 4,300."""
_FLAG = "--mathverify"
LONGEST_EXPRESSION = 400
"""Characters of an answer that math-verify is shown."""

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_ARITHMETIC = re.compile(r"[0-9.+\-*/() ]+")
_DECIMAL = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
_LONGEST_ARITHMETIC = 400
_MOST_BITS = 10_000
"""Of a power: a few characters can make a number that fills the memory."""
_PROSE = re.compile(r"(?<!\\)\b[^\W\d_]{3,}")
"""A word, and no command of LaTeX."""
_UNBOUNDED = re.compile(r"[\^!]|\*\*")
"""Powers and factorials: a few characters can take for ever."""


def cleaned(answer: str) -> str:
    """Without $ and thousands separators."""
    return answer.replace("$", "").strip().replace(",", "")


def first_number(answer: str) -> Fraction | None:
    """The value of a text that is arithmetic with a "/", else its first number; None where it has none.

    "3/4" is 0.75, "(300 * 4 + 160) / 4" is 340; "64 + 30 = 94" is 64, "-4, -5" is -4, "3/4 cup" is 3, as in ZeroEval.
    """
    text = cleaned(answer)
    if "/" in text and len(text) <= _LONGEST_ARITHMETIC and _ARITHMETIC.fullmatch(text):
        try:
            return _value(ast.parse(text, mode="eval").body, text)
        except (ValueError, SyntaxError, ZeroDivisionError, MemoryError, RecursionError):
            pass  # ZeroEval too takes the text's first number where Python finds no value
    match = _NUMBER.search(text)
    return None if match is None or match.end() - match.start() > LONGEST else Fraction(match[0])


def _value(node: ast.expr, text: str) -> Fraction:
    """Of a tree of numbers, signs and operators, exactly; ValueError for anything else."""
    if isinstance(node, ast.Constant):
        decimal = ast.get_source_segment(text, node) or ""
        if _DECIMAL.fullmatch(decimal):
            return Fraction(decimal)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, text), _value(node.right, text)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _OPERATORS:
            return Fraction(_OPERATORS[type(node.op)](left, right))
    raise ValueError("no arithmetic")


_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent)
    if exponent.denominator != 1 or bits > _MOST_BITS:
        raise ValueError("no power to compute")
    return Fraction(base**exponent.numerator)


class NumberTask(ZeroEvalTask):
    """A question whose answer is a number; right if the first number of the answer is the known one."""

    id_prefix: ClassVar[str]
    """Of the id of a row that has none; its index follows."""

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        pinned: Pinned | None = None,
        template: Path | None = None,
        model: str = "",
        mathverify: bool = False,
    ) -> None:
        """mathverify: grade by math-verify too, as `acc_mathverify`; UsageError where the library is missing."""
        super().__init__(data_dir, pinned=pinned, template=template, model=model)
        self.mathverify = mathverify
        if mathverify:
            self.version += f", {math_library.version(_FLAG)}"

    def item(self, row: dict[str, Any], index: int, where: str) -> Item:
        gold = (
            text_column(row, ("answer",), where).rsplit("#", 1)[-1].strip()
        )  # "# 18", and a solution before "#### 18"
        if first_number(gold) is None:
            raise UsageError(f"the known answer is no number: '{gold[:80]}'", where=where, hint='"answer": "18"')
        item_id = str(row.get("id", f"{self.id_prefix}{index}"))
        return Item(item_id, text_column(row, self.columns[0], where), gold, where)

    def grade_answer(self, prompt: Prompt, parsed: Parsed) -> tuple[bool, dict[str, float | None]]:
        gold = first_number(prompt.answer or "")
        right = parsed.found and gold is not None and first_number(parsed.text) == gold
        return right, {"mathverify": mathverify(prompt.answer or "", parsed)} if self.mathverify else {}


def mathverify(gold: str, parsed: Parsed) -> float | None:
    """1 or 0 by math-verify; None where it did not come to an end or must not be asked.

    Numbers are compared exactly, without the library.  It can be stopped in a process's main thread only, so in any
    other it is not asked about powers and factorials.
    """
    if not parsed.found:
        return 0.0
    text = parsed.text.strip()
    plain, known = cleaned(text), cleaned(gold)
    if _NUMBER.fullmatch(plain) and _NUMBER.fullmatch(known):
        return float(first_number(plain) == first_number(known))
    if len(text) > LONGEST_EXPRESSION:
        return None
    seconds = math_library.seconds()
    if seconds is None and _UNBOUNDED.search(text):
        return None
    library = math_library.library(_FLAG)
    try:
        found = library.parse(_delimited(text), parsing_timeout=seconds, raise_on_error=True)
        wanted = library.parse(f"${gold}$", parsing_timeout=seconds, raise_on_error=True)
        return float(library.verify(wanted, found, timeout_seconds=seconds, raise_on_error=True))
    except library.errors.TimeoutException:
        return None
    except Exception:  # what sympy cannot compare is not equal; it raises nearly every kind
        return 0.0


def _delimited(text: str) -> str:
    """An expression in $...$: outside of them the library keeps no more than a number of "2k+2".

    Prose ("18 dollars a day") stays as it is, since the library finds the number in it.
    """
    return text if "\\boxed" in text or _PROSE.search(text) else f"${text.replace('$', '')}$"
