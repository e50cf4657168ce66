"""What a row says: its columns, its chat turns, its id; and which prompts were there before."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from bnfctl.data.records import Message, Prompt
from bnfctl.errors import UsageError, nearest
from bnfctl.options import canonical, fingerprint

_ROLES = ("system", "user", "assistant", "tool")


def is_missing(value: Any) -> bool:
    """Null, and how CSV (an empty cell) and pandas (NaN) write it."""
    return value is None or value == "" or value != value


def pick(row: Mapping[str, Any], column: str, where: str, also: tuple[str, ...] = ()) -> Any:
    """row[column] (or the first of `also` that is there); UsageError names the columns that exist."""
    name = column_of(row, (column, *also))
    if name is not None:
        return row[name]
    what = f"column '{column}' is null" if column in row else f"no column '{column}'{nearest(column, row)}"
    raise UsageError(what, where=where, hint=f"columns here: {', '.join(row) or 'none'}")


def column_of(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of `names` that the row has a value for; an empty text only where the others have none either."""
    there = [name for name in names if row.get(name) is not None]
    return next((name for name in there if not is_missing(row[name])), there[0] if there else None)


def as_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Chat turns that end with the user's, from a text or a list of {role, content}; other keys of a turn are left."""
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns or not all(_is_turn(turn) for turn in turns):
        raise UsageError(
            "a prompt is a text or a list of {role, content}", where=where,
            hint=f'"prompt": "...", or a list of {{"role": {" | ".join(_ROLES)}, "content": "..."}}',
        )  # fmt: skip
    if turns[-1]["role"] != "user":
        raise UsageError(
            f"the prompt ends with the turn of {turns[-1]['role']}", where=where, hint="end with the user's"
        )
    if not turns[-1]["content"].strip():
        raise UsageError("empty prompt", where=where, hint="remove the row, or give it a text")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") in _ROLES and isinstance(turn.get("content"), str)


def prompt_id(messages: tuple[Message, ...]) -> str:
    """An id from the content: the same prompt has the same id in every file."""
    return f"p-{fingerprint([[turn['role'], turn['content']] for turn in messages])[:16]}"


def given_id(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> str | None:
    """The first id that the row has in these columns, as text; UsageError for one that is no text and no number."""
    value = next((row[name] for name in columns if not is_missing(row.get(name))), None)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # pandas makes floats of numbers once one of them is missing
    if not isinstance(value, (str, int, float)):
        raise UsageError("the prompt's id is not a text or a number", where=where, hint='"id": "..."')
    return str(value)


PROMPT_ID = ("prompt_id", "id")
"""Where a prompt's id may be."""


def identity(row: Mapping[str, Any], messages: tuple[Message, ...], where: str) -> str:
    """The prompt's id: the one that the row gives, else one from the content."""
    return given_id(row, PROMPT_ID, where) or prompt_id(messages)


class Seen:
    """The prompts that were there: ids, a hash of what each asks, and its place; no texts.

    Content hashes are 64 bits of BLAKE2: that one of 10^6 repeated ids hides other content by chance is a matter of
    5e-14.
    """

    def __init__(self) -> None:
        self._notes: dict[str, bytes] = {}
        self._places: dict[tuple[str, str], int] = {}

    def add(self, prompt: Prompt) -> bool:
        """Whether the prompt is new; UsageError with both places where its id belongs to another one."""
        content = blake2b(canonical([list(turn.items()) for turn in prompt.messages]), digest_size=8).digest()
        known = self._notes.get(prompt.id)
        if known is None:
            self._notes[prompt.id] = content + self._packed(prompt.where)
            return True
        if known[:8] != content:
            raise UsageError(
                f"two prompts with the id {prompt.id}", where=f"{self._place(known[8:])} and {prompt.where}",
                hint="give each prompt its own id, or none",
            )  # fmt: skip
        return False

    def _packed(self, where: str) -> bytes:
        """The last number of a place, and which of the few texts around it: "file:12" in 6 bytes instead of 60."""
        before, number, after = re.fullmatch(r"(.*?)(\d{0,15})(\D*)", where, re.S).groups()  # type: ignore[union-attr]
        around = self._places.setdefault((before, after), len(self._places))
        return around.to_bytes(4, "big") + number.encode()

    def _place(self, packed: bytes) -> str:
        before, after = list(self._places)[int.from_bytes(packed[:4], "big")]
        return f"{before}{packed[4:].decode()}{after}"
