"""Responses that were made elsewhere, as candidates without token ids: JSON Lines, Parquet, CSV or a folder of them.

One row per prompt: {"prompt" or "messages", "responses": [text or {"text" | "output" | "content", "model"?}]}, with
`all_generated_responses` as SimPO's scripts call it; or one row per response: {"prompt" or "messages", "response"},
or {"messages"} that end with the assistant's turn (Arena-Hard's answers are such).  Optional: "prompt_id" or "id", "answer", "model".
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bnfctl.config import GenerateConfig
from bnfctl.data.files import read_path
from bnfctl.data.jsonl import without_surrogates
from bnfctl.data.records import Candidate, Group, Prompt
from bnfctl.data.rows import Seen, column_of, is_missing
from bnfctl.data.sources import is_answered, prompt_of
from bnfctl.errors import UsageError

_TEXTS = ("text", "output", "content", "answer")
_LISTS = ("responses", "all_generated_responses")


class FileSampler:
    """A file of responses in the place of a model."""

    version = "file"

    def __init__(self, path: Path, config: GenerateConfig | None = None) -> None:
        """config: its columns, split and system prompt are used."""
        self.path, self.config = path, config

    def groups(self) -> Iterator[Group]:
        """As `read_responses`."""
        return read_responses(self.path, self.config)


def read_responses(path: Path, config: GenerateConfig | None = None) -> Iterator[Group]:
    """Every prompt of the file with all its responses, in the order of first appearance.

    Rows with the same prompt id are one prompt; a prompt without an id gets one from its content.  The file is read
    twice: to count the rows of each prompt, then to hold no prompt for longer than its rows, and those of the prompts
    before it, take.  Raises UsageError with file:line for a row without prompt or response, and for two different
    prompts with one id.
    """
    config = config or GenerateConfig(prompts=str(path), sampler="file")
    if config.sort or config.shuffle_seed is not None:
        flag = "--sort" if config.sort else "--shuffle-seed"
        raise UsageError(f"{flag} is for prompts that are sampled", where=flag, hint=f"leave {flag} out")
    rows_left = _rows_per_prompt(path, config)
    order = deque(rows_left)
    held: dict[str, tuple[Prompt, list[Candidate]]] = {}
    for where, row in read_path(path, config.split, config.subset, again=True):
        prompt = _prompt(row, where, config)
        if not rows_left.get(prompt.id):
            raise UsageError("the file changed while it was read", where=where, hint="the same command reads it again")
        _, candidates = held.setdefault(prompt.id, (prompt, []))
        for text, source in _responses(row, where):
            candidates.append(Candidate(prompt.id, len(candidates), text, source=source))
        rows_left[prompt.id] -= 1
        while order and not rows_left[order[0]]:
            whole, found = held.pop(order.popleft())
            yield Group(whole, tuple(found))


def _rows_per_prompt(path: Path, config: GenerateConfig) -> dict[str, int]:
    rows: dict[str, int] = {}
    seen = Seen()
    for where, row in read_path(path, config.split, config.subset):
        prompt = _prompt(row, where, config)
        seen.add(prompt)
        rows[prompt.id] = rows.get(prompt.id, 0) + 1
    if not rows:
        raise UsageError("no responses", where=str(path), hint="the file is empty")
    return rows


def _prompt(row: dict[str, Any], where: str, config: GenerateConfig) -> Prompt:
    if column_of(row, (config.prompt_column, "messages")) is None:
        hint = f'add "{config.prompt_column}" (text) or "messages"; columns here: {", ".join(row)}'
        raise UsageError("the row has no prompt", where=where, hint=hint)
    return prompt_of(row, where, config, Counter())


def _responses(row: Mapping[str, Any], where: str) -> Iterator[tuple[str, str | None]]:
    """(text, who wrote it) of every response in a row."""
    column = next((name for name in _LISTS if not is_missing(row.get(name))), None)
    if column is None:
        response = row["response"] if row.get("response") is not None else _last_turn(row)
        if response is None:
            raise UsageError("the row has no responses", where=where, hint='add "responses": [text, ...] or "response"')
        yield _response(response, row, where)
        return
    listed = _listed(row[column])
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"{column} is not a list with texts in it", where=where, hint=f'"{column}": [text, ...]')
    for position, response in enumerate(listed):
        yield _response(response, row, f"{where} {column}[{position}]")


def _last_turn(row: Mapping[str, Any]) -> Any:
    """What the assistant says at the end of `messages`, else None."""
    turns: Any = row.get("messages")
    return turns[-1].get("content") if is_answered(turns) else None


def _listed(value: Any) -> Any:
    """A list that a CSV cell holds as JSON, as a list."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return without_surrogates(json.loads(value))
        except (ValueError, RecursionError):
            return value
    return value


def _response(value: Any, row: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    part = value if isinstance(value, dict) else {}
    text = next((part[name] for name in _TEXTS if part.get(name) is not None), None) if part else value
    if not isinstance(text, str):
        raise UsageError("the response has no text", where=where, hint='a text, or {"text": ..., "model": ...}')
    source = next((each["model"] for each in (part, row) if each.get("model") is not None), None)
    return text, None if source is None else str(source)
