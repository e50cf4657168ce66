"""The math family: one-step word problems whose right and wrong responses differ by one digit, hence by one token.

The corpus gets the last digit wrong a sizeable share of the time, so the base samples both. It is the case that
pairwise losses handle badly: chosen and rejected share nearly all their tokens (paper, section 2.3).
"""

from __future__ import annotations

import re
from random import Random

from bnfctl.lab.dice import between, pick

NAMES = ("Ann", "Ben", "Eva", "Ian", "Kim", "Leo", "Mia", "Tom")
ITEMS = ("pens", "cups", "eggs", "nuts", "hats", "keys", "maps", "toys")
WRONG_SHARE = {"gets": 0.3, "loses": 0.4}

_PROMPT = re.compile(
    r"(?P<name>[A-Z][a-z]+) has (?P<a>\d+) (?P<item>[a-z]+) and (?P<verb>gets|loses) (?P<b>\d+)\. How many now\?"
)


def draw(rng: Random) -> str:
    """A random prompt of the family."""
    possession = f"{pick(rng, NAMES)} has {between(rng, 12, 29)} {pick(rng, ITEMS)}"
    return f"{possession} and {pick(rng, tuple(WRONG_SHARE))} {between(rng, 2, 9)}. How many now?"


def answer(prompt: str) -> str | None:
    """The number asked for; None when the prompt is not of this family."""
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        return None
    change = int(match["b"]) if match["verb"] == "gets" else -int(match["b"])
    return str(int(match["a"]) + change)


def gold(prompt: str, rng: Random) -> str:
    """The right response."""
    return _sentence(prompt, str(answer(prompt)))


def corpus_response(prompt: str, rng: Random) -> str:
    """What the pretraining corpus answers: right, or with another last digit."""
    number = str(answer(prompt))
    if rng.random() < WRONG_SHARE["gets" if " gets " in prompt else "loses"]:
        number = number[:-1] + pick(rng, [digit for digit in "0123456789" if digit != number[-1]])
    return _sentence(prompt, number)


def verify(prompt: str, response: str) -> float | None:
    """1 when the last number of the response is right, else 0; None when the prompt is not of this family."""
    expected = answer(prompt)
    if expected is None:
        return None
    numbers = re.findall(r"\d+", response, re.ASCII)
    return float(bool(numbers) and numbers[-1] == expected)


def _sentence(prompt: str, number: str) -> str:
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(f"not a math prompt: {prompt!r}")
    return f"{match['name']} has {number} {match['item']} now."
