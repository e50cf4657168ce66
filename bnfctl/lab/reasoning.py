"""The reasoning families: short exact tasks (sum, reverse, sort, count) that never stand in preference data.

The base is good at them but not perfect, so an alignment that harms what the model could do before shows here.
"""

from __future__ import annotations

import re
from random import Random

from bnfctl.lab.dice import between, pick

KINDS = ("sum", "reverse", "sort", "count")

_SUM = re.compile(r"Add (\d+) and (\d+)\.")
_REVERSE = re.compile(r"Reverse ([a-z]+)\.")
_SORT = re.compile(r"Sort (\d+)\.")
_COUNT = re.compile(r"Count ([a-z]) in ([a-z]+)\.")


def draw(rng: Random) -> str:
    """A random prompt of one of the four kinds."""
    kind = pick(rng, KINDS)
    if kind == "sum":
        return f"Add {between(rng, 1, 99)} and {between(rng, 1, 9)}."
    if kind == "reverse":
        return f"Reverse {_text(rng, 'abcdefghijklmnopqrstuvwxyz', 2, 5)}."
    if kind == "sort":
        return f"Sort {_text(rng, '0123456789', 2, 5)}."
    return f"Count {pick(rng, 'abc')} in {_text(rng, 'abc', 2, 5)}."


def _text(rng: Random, letters: str, low: int, high: int) -> str:
    return "".join(pick(rng, letters) for _ in range(between(rng, low, high)))


def kind_of(prompt: str) -> str | None:
    """Which of `KINDS` a prompt is; None when it is not of this family."""
    patterns = (_SUM, _REVERSE, _SORT, _COUNT)
    return next((kind for kind, form in zip(KINDS, patterns, strict=True) if form.fullmatch(prompt.strip())), None)


def answer(prompt: str) -> str | None:
    """The exact answer; None when the prompt is not of this family."""
    text = prompt.strip()
    if match := _SUM.fullmatch(text):
        return str(int(match[1]) + int(match[2]))
    if match := _REVERSE.fullmatch(text):
        return match[1][::-1]
    if match := _SORT.fullmatch(text):
        return "".join(sorted(match[1]))
    if match := _COUNT.fullmatch(text):
        return str(match[2].count(match[1]))
    return None


def gold(prompt: str, rng: Random) -> str:
    """The right response: the answer and nothing else."""
    return str(answer(prompt))


corpus_response = gold  # the base's mistakes are its own: the corpus has none


def verify(prompt: str, response: str) -> float | None:
    """1 when the response is the answer, else 0; None when the prompt is not of this family."""
    expected = answer(prompt)
    return None if expected is None else float(response.strip() == expected)
