"""Ready preference and feedback sets as records: TRL, SimPO, Snorkel, UltraFeedback binarized, KTO files, logs.

Preference rows have a chosen and a rejected response, unpaired rows one response and a label.  A response is a text,
or a list of chat turns that ends with the assistant's; the turns before it are the prompt, else the prompt has a
column of its own.  Two texts without a prompt column begin with the prompt, as in TRL's implicit form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any

from bnfctl import console
from bnfctl.config import BuildConfig
from bnfctl.data import flags
from bnfctl.data.records import Candidate, Group, Message, Prompt
from bnfctl.data.rows import Seen, as_messages, column_of, given_id, identity, is_missing, pick
from bnfctl.errors import UsageError

CHOSEN, REJECTED = 0, 1
"""The index of each side in the group of a preference row."""

GOOD = ("true", "1", "+1", "up", "thumbs_up", "good", "chosen", "desirable")
BAD = ("false", "0", "-1", "down", "thumbs_down", "bad", "rejected", "undesirable")
"""What a label may be, as text; JSON's true, false, 1, 0 and -1 too."""

_PROMPT = "prompt"
_RESPONSES = ("completion", "response")
_REWARDS = {side: (f"{side}_reward", f"score_{side}", f"{side}_score") for side in ("chosen", "rejected")}
"""Where a side's reward may be: ours, UltraFeedback's, others'."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Found:
    """One record of a set: a prompt with its two responses, or with one."""

    record_id: str
    group: Group
    sides: dict[str, tuple[int, float | None]]
    """ "chosen" and / or "rejected" -> (index in the group, reward or None)."""


def read_records(rows: Iterable[tuple[str, Row]], config: BuildConfig) -> Iterator[Found]:
    """One record per row (two unpaired rows with one `record_id`, as `bnfctl export` writes them, are one again).

    Rows that repeat a prompt share its prompt id, so that they fall into the same split; record ids are unique.  In
    memory are ids and short hashes.  `config.format` auto is decided by the first row's columns.

    UsageError names the row and what is wrong with it: a missing column, turns that do not agree, two prompts with
    one id, a label that is none.
    """
    names, seen = _Names(), Seen()
    kind: str | None = None
    last: tuple[str | None, Found] | None = None
    for where, row in rows:
        kind = kind or _kind(row, config, where)
        found = _paired(row, config, where) if kind == "preference" else _labelled(row, config, where)
        seen.add(found.group.prompt)
        given = given_id(row, ("record_id",), where)
        if last is not None:
            exported = kind == "unpaired" and given is not None and given == last[0]
            pair = _joined(last[1], found) if exported else None
            yield names.unique(pair or last[1])
            last = None if pair else (given, found)
        else:
            last = given, found
    if last is not None:
        yield names.unique(last[1])


class _Names:
    """Record ids that were given out, and how often each was asked for again."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._again: dict[str, int] = {}

    def unique(self, found: Found) -> Found:
        """The record under its own id: the second `a` is `a+`, the third `a++`, from the sixth on `a+5`."""
        asked = name = found.record_id
        while name in self._taken:
            count = self._again[asked] = self._again.get(asked, 0) + 1
            name = asked + ("+" * count if count < 5 else f"+{count}")
        self._taken.add(name)
        return found if name == asked else Found(name, found.group, found.sides)


def _kind(row: Row, config: BuildConfig, where: str) -> str:
    """What the set is, from its first row; UsageError for flags that would change nothing of such a set."""
    if config.format != "unpaired" and _begins_with_its_prompt(row, config):
        console.say(
            f"{where}: no column '{_PROMPT}', so it is what chosen and rejected have in common at the beginning"
        )
    if config.format != "auto":
        return config.format
    if column_of(row, (config.chosen_column, config.rejected_column)) is not None:
        flags.check_columns(config, "preference")
        return "preference"
    if config.label_column in row or column_of(row, _response_columns(config)) is not None:
        flags.check_columns(config, "unpaired")
        if given_id(row, ("record_id",), where) is None:  # with one, two rows may be a pair
            flags.check_no_pairs(config)
        return "unpaired"
    pick(row, config.chosen_column, where)  # raises, and says which columns there are
    raise AssertionError(where)


def _paired(row: Row, config: BuildConfig, where: str) -> Found:
    columns = {"chosen": config.chosen_column, "rejected": config.rejected_column}
    sides = [pick(row, column, where) for column in columns.values()]
    if _begins_with_its_prompt(row, config):
        messages, texts = _split_texts(sides[0], sides[1], config, where)
    else:
        messages = _prompt(row, sides, config, where)
        texts = [_response(side, messages, " and ".join(columns.values()), where) for side in sides]
    scores = _scores(row, where)
    rewards = [_reward(row, _REWARDS[side], where) for side in columns]
    if scores and rewards == [None, None]:
        rewards = [max(scores), min(scores)]
    return _found(row, messages, texts, {"chosen": (CHOSEN, rewards[0]), "rejected": (REJECTED, rewards[1])}, where)


def _begins_with_its_prompt(row: Row, config: BuildConfig) -> bool:
    """Whether this is TRL's implicit form: two texts and no prompt column, nor one that the user named."""
    sides = (row.get(config.chosen_column), row.get(config.rejected_column))
    return config.prompt_column == _PROMPT and _PROMPT not in row and all(isinstance(side, str) for side in sides)


def _labelled(row: Row, config: BuildConfig, where: str) -> Found:
    names = _response_columns(config)
    response = pick(row, names[0], where, also=names[1:])
    messages = _prompt(row, [response], config, where)
    text = _response(response, messages, str(column_of(row, names)), where)
    side = "chosen" if _is_good(row, config.label_column, where) else "rejected"
    return _found(row, messages, [text], {side: (0, _reward(row, ("reward", "score"), where))}, where)


def _response_columns(config: BuildConfig) -> tuple[str, ...]:
    return _RESPONSES if config.response_column is None else (config.response_column,)


def _found(
    row: Row, messages: tuple[Message, ...], texts: list[str], sides: dict[str, tuple[int, float | None]], where: str
) -> Found:
    name = identity(row, messages, where)
    candidates = tuple(Candidate(name, index, text) for index, text in enumerate(texts))
    record_id = given_id(row, ("record_id",), where) or name
    return Found(record_id, Group(Prompt(name, messages, None, where), candidates), sides)


def _joined(first: Found, second: Found) -> Found | None:
    """Two labelled rows as the pair that they were exported from; None where they are two records."""
    if {*first.sides, *second.sides} != {"chosen", "rejected"} or first.group.prompt.id != second.group.prompt.id:
        return None
    parts = sorted((first, second), key=lambda part: "rejected" in part.sides)
    prompt, sides, candidates = first.group.prompt, {}, []
    for index, part in enumerate(parts):
        ((side, (_, reward)),) = part.sides.items()
        sides[side] = index, reward
        candidates.append(Candidate(prompt.id, index, part.group.candidates[0].text))
    return Found(first.record_id, Group(prompt, tuple(candidates)), sides)


def _prompt(row: Row, sides: list[Any], config: BuildConfig, where: str) -> tuple[Message, ...]:
    """The turns before the response where a side has them, else the prompt column."""
    conversation = next((side for side in sides if isinstance(side, list) and len(side) > 1), None)
    return as_messages(pick(row, config.prompt_column, where) if conversation is None else conversation[:-1], where)


def _response(side: Any, messages: tuple[Message, ...], columns: str, where: str) -> str:
    if isinstance(side, str):
        return side
    last = side[-1] if isinstance(side, list) and side else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise UsageError(
            f"{columns} are texts, or message lists that end with the assistant's", where=where,
            hint='a text, or [{"role": "user", ...}, {"role": "assistant", "content": "..."}]',
        )  # fmt: skip
    before = [turn.get("content") if isinstance(turn, dict) else None for turn in side[:-1]]
    if before and before != [turn["content"] for turn in messages]:
        raise UsageError(
            f"{columns} answer different prompts", where=where, hint="all turns but the last must be the same"
        )
    return str(last["content"])


def _split_texts(chosen: str, rejected: str, config: BuildConfig, where: str) -> tuple[tuple[Message, ...], list[str]]:
    """Prompt and responses of two texts that begin alike: their longest common beginning, as TRL's extract_prompt.

    A space before the responses is theirs.  Where one text is the beginning of the other, its response is empty (TRL
    gives it one last character there).
    """
    shorter = min(len(chosen), len(rejected))
    cut = next((index for index in range(shorter) if chosen[index] != rejected[index]), shorter)
    if 0 < cut < shorter and chosen[cut - 1] == " ":
        cut -= 1
    if not chosen[:cut].strip():
        what = f"no column '{config.prompt_column}', and the two texts have no beginning in common"
        raise UsageError(what, where=where, hint="--prompt-column names the column with the prompt")
    return as_messages(chosen[:cut], where), [chosen[cut:], rejected[cut:]]


def _is_good(row: Row, column: str, where: str) -> bool:
    if column not in row or is_missing(row[column]):
        what = f"no label in column '{column}'" if column in row else f"no column '{column}'"
        raise UsageError(what, where=where, hint=f"--label-column; columns here: {', '.join(row)}")
    value = row[column]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = re.sub(r"[\s-]+(?!\d)", "_", str(value).strip().lower()) if isinstance(value, (str, int)) else None
    if word not in GOOD + BAD:
        hint = f"good: {', '.join(GOOD)}; bad: {', '.join(BAD)}"
        raise UsageError(f"{str(value)[:60]!r} in column '{column}' is not a label", where=where, hint=hint)
    return word in GOOD


def _reward(row: Row, columns: tuple[str, ...], where: str) -> float | None:
    """The first reward that is there; None where none is."""
    column = next((name for name in columns if not is_missing(row.get(name))), None)
    return None if column is None else _number(row[column], column, where)


def _number(value: Any, column: str, where: str) -> float:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        number = None
    if number is None or not isfinite(number):
        raise UsageError(f"{column} is {str(value)[:60]!r}, not a number", where=where, hint="a number, or null")
    return number


def _scores(row: Row, where: str) -> list[float]:
    """`all_rm_scores` of the SimPO and Snorkel sets: chosen has the largest, rejected the least."""
    values = row.get("all_rm_scores")
    if is_missing(values):
        return []
    if not isinstance(values, list):
        raise UsageError("all_rm_scores is not a list", where=where, hint="a list of numbers, or leave the column out")
    return [_number(value, "all_rm_scores", where) for value in values]
