"""Ready preference sets: prompt, chosen, rejected; text, or message lists as in the princeton-nlp sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from bnfctl.data.records import Candidate, Group, Prompt
from bnfctl.data.sources import as_messages, pick, prompt_id
from bnfctl.errors import UsageError

CHOSEN, REJECTED = 0, 1
"""The index of each side in a group that this module makes."""


def read_preferences(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, Group]]:
    """(record id, group of two candidates: the chosen one, then the rejected one) per row.

    Rows that repeat a prompt share its prompt id, so that they fall into the same split.

    UsageError names the row and what is wrong with it: a missing column, turns that do not agree, two prompts
    with one id.
    """
    seen: dict[str, tuple[str, Any]] = {}
    for where, row in rows:
        sides = [pick(row, name, where) for name in ("chosen", "rejected")]
        messages = _prompt(row, sides, where)
        texts = [_response(side, messages, where) for side in sides]
        given = row["prompt_id"] if row.get("prompt_id") is not None else row.get("id")
        identity = str(given) if given is not None else prompt_id(messages)
        earlier, first = seen.get(identity, (where, messages))
        if first != messages:
            hint = "give each prompt its own id, or none"
            raise UsageError(f"two prompts with the id {identity}", where=f"{earlier} and {where}", hint=hint)
        record_id = identity
        while record_id in seen:
            record_id += "+"
        seen[record_id] = (where, messages)
        candidates = tuple(Candidate(identity, index, text) for index, text in enumerate(texts))
        yield record_id, Group(Prompt(identity, messages, None, where), candidates)


def _prompt(row: dict[str, Any], sides: list[Any], where: str) -> tuple[dict[str, str], ...]:
    conversation = next((side for side in sides if isinstance(side, list) and len(side) > 1), None)
    if conversation is not None:
        return as_messages(conversation[:-1], where)
    return as_messages(pick(row, "prompt", where), where)


def _response(side: Any, messages: tuple[dict[str, str], ...], where: str) -> str:
    if isinstance(side, str):
        return side
    last = side[-1] if isinstance(side, list) and side else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise UsageError(
            "chosen and rejected are texts, or message lists that end with the assistant's", where=where,
            hint='"chosen": "...", or "chosen": [{"role": "user", ...}, {"role": "assistant", "content": "..."}]',
        )  # fmt: skip
    if len(side) > 1 and [turn.get("content") for turn in side[:-1]] != [turn["content"] for turn in messages]:
        raise UsageError(
            "chosen and rejected answer different prompts", where=where, hint="all turns but the last must be the same"
        )
    return str(last["content"])
