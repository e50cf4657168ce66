"""The rule math-verify: symbolic and LaTeX answers, compared by the library of that name (extra `math`)."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from bnfctl.config import ScoreConfig
from bnfctl.data import math_library
from bnfctl.data.records import Prompt, Reward
from bnfctl.scorers.numbers import marked_answer

VERSION = "1"
"""Of this file: another one may give other rewards."""
_FLAG = "--rule"

_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed")
_UNIT = re.compile(
    r"(?<=\d) +(?!hundred|thousand|million|billion|trillion|dozen)[^\W\d_]{3,}(?: +[^\W\d_]+)*\.?$", re.IGNORECASE
)
"""What is counted, in words behind a number."""
_SENTENCE = re.compile(r"[^\W\d_]{3,} [^\W\d_]{2,}")
"""Words in which the library looks for an expression itself."""
_WORD = re.compile(r"[^\W\d_]{3,}")
_MATHEMATICAL = re.compile(r"[\d\\]")


def version() -> str:
    """Of this file and of the library, for the key.  UsageError where the library is missing."""
    return f"{VERSION}, {math_library.version(_FLAG)}"


def math_verify(prompt: Prompt, response: str, config: ScoreConfig) -> Reward:
    """1 if the expression that the response gives as its answer equals the known one, as mathematics.

    Where a response marks its answer, as JSON or behind "####", only that is read; else the library looks for it.
    Null where there is no known answer, or none that is mathematics, and, with {"timeout": seconds}, where the library
    found no end.  It can be stopped in a process's main thread only; in another thread it runs as long as it likes.
    Raises UsageError where the library is missing.
    """
    library, seconds = math_library.library(_FLAG), math_library.seconds()
    try:
        gold = _gold(prompt.answer, seconds) if prompt.answer is not None else None
        if gold is None:
            return Reward(None)
        marked = marked_answer(response.strip())
        found = _read(response if marked is None else _delimited(marked), seconds)
        right = bool(found) and library.verify(gold, found, timeout_seconds=seconds, raise_on_error=True)
    except library.errors.TimeoutException:
        return Reward(None, {"timeout": seconds})
    except Exception:  # what sympy cannot compare is not equal; it raises nearly every kind
        right = False
    parsed = next((part for part in found if isinstance(part, str)), None)
    return Reward(float(right), {"parsed": parsed and parsed[:200]})


@lru_cache(maxsize=256)
def _gold(answer: str, seconds: int | None) -> list[Any] | None:
    """A known answer as the library has it; None where it is no mathematics."""
    answer = answer.rsplit("####", 1)[-1].strip().removeprefix("#").strip()
    if _WORD.search(answer) and not _MATHEMATICAL.search(answer):
        return None  # as mathematics it would be a product of letters, equal to its anagrams
    found = _read(_delimited(answer), seconds)
    return found if any(not isinstance(part, str) for part in found) else None


def _delimited(answer: str) -> str:
    """An answer as the library finds it in a text."""
    answer = _UNIT.sub("", answer)
    return answer if _DELIMITED.search(answer) or _SENTENCE.search(answer) else f"\\boxed{{{answer}}}"


def _read(text: str, seconds: int | None) -> list[Any]:
    library = math_library.library(_FLAG)
    try:
        found: list[Any] = library.parse(text, parsing_timeout=seconds, raise_on_error=True)
    except Exception:
        return []
    return found
