"""Verifiers: rewards of 1 and 0 from the known answer, without a model.

A rule is `rule(prompt, response, config) -> Reward`.  Where there is nothing to compare with, the reward is None,
never 0; where the response holds no answer it is 0, and `extra` says {"parsed": None}.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

from bnfctl.config import ScoreConfig
from bnfctl.data.records import Group, Prompt, Reward
from bnfctl.errors import UsageError
from bnfctl.scorers import functions
from bnfctl.scorers.numbers import answer_number, gold_number
from bnfctl.tables import RULES, load

Rule = Callable[[Prompt, str, ScoreConfig], Reward]

VERSION = "1"
"""Another one may give other rewards; in the key."""


class RulesScorer:
    """Applies the rule of the config to every candidate."""

    version = "rules"

    def __init__(self, config: ScoreConfig) -> None:
        """UsageError for a rule that can't run: no such function, a missing library, an invalid pattern."""
        self.config = config
        version_of(config.rule)
        own = config.rule.startswith(functions.PREFIX)
        self.rule: Rule = functions.own_rule(config.rule) if own else load(RULES, config.rule, "rule")
        if config.rule == "regex":
            compiled(config.pattern)

    def score(self, groups: Iterable[Group]) -> Iterator[list[Reward]]:
        for group in groups:
            yield [self.rule(group.prompt, candidate.text, self.config) for candidate in group.candidates]


def version_of(name: str) -> str:
    """What of a rule's code is in the key: another version may give other rewards.

    The VERSION of the file that it is in, with that of its library where it has one; of the user's own, a digest.
    UsageError for a rule that can't be imported.
    """
    if name.startswith(functions.PREFIX):
        return functions.version_of(name)
    module = sys.modules[load(RULES, name, "rule").__module__]
    return str(module.version() if hasattr(module, "version") else module.VERSION)


def exact(prompt: Prompt, response: str, config: ScoreConfig) -> Reward:
    """1 if the whole response is the answer, up to case, Unicode form, white space and a final full stop."""
    if prompt.answer is None:
        return Reward(None)
    parsed = _normalised(response)
    return Reward(float(parsed == _normalised(prompt.answer)), {"parsed": parsed[:200] or None})


def numeric(prompt: Prompt, response: str, config: ScoreConfig) -> Reward:
    """1 if the number that the response gives as its answer equals the known one, exactly (18 = 18.00 = 36/2)."""
    gold = gold_number(prompt.answer) if prompt.answer is not None else None
    if gold is None:
        return Reward(None)
    parsed = answer_number(response)
    return Reward(float(parsed == gold), {"parsed": None if parsed is None else str(parsed)[:200]})


def regex(prompt: Prompt, response: str, config: ScoreConfig) -> Reward:
    """By the last match of `config.pattern`: its group 1 against the answer, or, without a group, whether there is one.

    Raises UsageError for a missing or invalid pattern.
    """
    pattern = compiled(config.pattern)
    if pattern.groups and prompt.answer is None:
        return Reward(None)
    matches = deque(pattern.finditer(response), maxlen=1)
    if not matches:
        return Reward(0.0, {"parsed": None})
    last = matches[0]
    if not pattern.groups:
        return Reward(1.0, {"parsed": last[0][:200]})
    parsed = last[1]
    if parsed is None:
        return Reward(0.0, {"parsed": None})
    return Reward(float(_normalised(parsed) == _normalised(prompt.answer or "")), {"parsed": parsed[:200]})


@lru_cache(maxsize=8)
def compiled(pattern: str | None) -> re.Pattern[str]:
    """The pattern of `--rule regex`; UsageError for none, or one that is no regular expression."""
    if not pattern:
        raise UsageError("the rule regex needs a pattern", where="--pattern", hint=r"--pattern 'Answer: *(\S+)'")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"not a regular expression: {error}", where="--pattern", hint="Python's syntax; put it in single quotes"
        ) from None


def _normalised(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).rstrip(".").rstrip()
