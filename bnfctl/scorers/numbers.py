"""Numbers in texts that models wrote, as exact fractions; nothing is ever evaluated as code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fractions import Fraction

LONGEST = 400
"""Characters of a number; Python itself refuses integers of more than 4,300 digits."""
_OBJECTS = 64
"""Opening braces that are tried as the start of a JSON object, from the end of the response."""

_SPELLINGS = str.maketrans(
    {
        **dict.fromkeys("−‐‑‒–﹣－", "-"),
        **{half: f" {text}" for half, text in zip("½⅓⅔¼¾⅛", ("1/2", "1/3", "2/3", "1/4", "3/4", "1/8"), strict=True)},
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        "\u2044": "/",
        "\u00a0": " ",
        "\u202f": " ",
    }
)
_LATEX = re.compile(r"\\[dt]?frac\s?\{(-?[0-9.,]{1,99})\}\s?\{(-?[0-9.,]{1,99})\}")
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    # a dash is a sign only where nothing precedes that it could be subtracted from, or a word it could hyphenate
    r"(?P<sign>(?<![\w)\]])-)?(?:\\?[$€£] ?(?P<sign2>-)?)?"
    rf"(?:(?P<whole>[0-9]+) (?=[0-9]+/))?(?P<top>{_UNSIGNED})(?P<exponent>[eE][+-]?[0-9]{{1,3}}(?![0-9\w]))?"
    rf"(?: ?/ ?(?P<bottom>-?(?:{_UNSIGNED})))?"
)
_FIELD = re.compile(r"[\"'“”]?\banswer[\"'“”]?\s{0,9}:\s{0,9}(?:\"((?:[^\"\\]|\\.){0,400})|([^\n}]{1,400}))", re.I)
_BOXED = re.compile(r"\\boxed\s?\{((?:[^{}]|\{[^{}]*\}){1,400})\}")


def answer_number(response: str) -> Fraction | None:
    """The number that a response gives as its answer; None where it gives none.

    In this order: the "answer" of a JSON object (whole or broken), what follows "####", what is \\boxed; the last
    one where there are several.  Where one of these is there, only it is read.  Else the last number of the response.
    """
    response = response.strip()
    stated = _stated(response)
    if stated is not None:
        # "64 + 30 = 94": the result, not the first operand; "18 eggs in 2 days": the first
        found = list(numbers(stated.rsplit("=", 1)[-1])) or list(numbers(stated))
        return found[0] if found else None
    return _last(response)


def gold_number(answer: str) -> Fraction | None:
    """The number of a known answer: "18", "# 18", "#### 18", also behind a worked solution."""
    return _last(answer.rsplit("#", 1)[-1])


def numbers(text: str) -> Iterator[Fraction]:
    """Every number of a text, in order: signs, thousands, decimals, fractions (also mixed and LaTeX), $ and %.

    A per cent sign is a unit: 50% is 50.
    """
    for match in _matches(text):
        if (value := _value(match)) is not None:
            yield value


def _last(text: str) -> Fraction | None:
    values = (_value(match) for match in reversed(list(_matches(text))))
    return next((value for value in values if value is not None), None)


def _matches(text: str) -> Iterator[re.Match[str]]:
    text = text.translate(_SPELLINGS).replace("{,}", ",").replace("\\!", "").replace("\\,", "")
    return _NUMBER.finditer(_LATEX.sub(r"\1/\2", text))


def _value(match: re.Match[str]) -> Fraction | None:
    if match.end() - match.start() > LONGEST:
        return None
    value = Fraction(match["top"].replace(",", "") + (match["exponent"] or ""))
    if match["bottom"]:
        bottom = Fraction(match["bottom"].replace(",", ""))
        if not bottom:
            return None
        value /= bottom
    if match["whole"]:
        value += int(match["whole"])
    return -value if match["sign"] or match["sign2"] else value


def _stated(response: str) -> str | None:
    marked = marked_answer(response)
    if marked is not None:
        return marked
    boxed = _BOXED.findall(response)
    return boxed[-1] if boxed else None


def marked_answer(response: str) -> str | None:
    """What stands in the "answer" of a JSON object (whole or broken), or behind "####".

    The last one where there are several; "" where it is empty, None where there is none.
    """
    value = _json_answer(response)
    if value is not None:
        return value
    fields = _FIELD.findall(response) if '"' in response or "{" in response else []
    if fields:
        return fields[-1][0] or fields[-1][1]
    if "####" in response:
        return response.rsplit("####", 1)[1].strip().split("\n", 1)[0]
    return None


def _json_answer(response: str) -> str | None:
    """The "answer" of the last JSON object that has one, as text."""
    decoder = json.JSONDecoder(strict=False)
    end = len(response)
    for _ in range(_OBJECTS):
        end = response.rfind("{", 0, end)
        if end < 0:
            return None
        try:
            value, _ = decoder.raw_decode(response, end)
        except (ValueError, RecursionError):
            continue
        found = next((value[key] for key in value if key.strip().lower() == "answer"), None)
        if found is not None or any(key.strip().lower() == "answer" for key in value):
            return "" if found is None or isinstance(found, bool) else found if isinstance(found, str) else str(found)
    return None
