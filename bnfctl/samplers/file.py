"""Responses that were made elsewhere, from a JSONL file, as candidates without token ids.

One row per prompt: {"prompt" or "messages", "responses": [text or {"text" | "output" | "content", "model"?}]}, or
one row per response: {"prompt" or "messages", "response"}.  Optional: "prompt_id" or "id", "answer", "model".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bnfctl.data.jsonl import read_jsonl
from bnfctl.data.records import Candidate, Group, Prompt
from bnfctl.data.sources import as_messages, prompt_id
from bnfctl.errors import UsageError

_TEXTS = ("text", "output", "content")


class FileSampler:
    """A file of responses in the place of a model."""

    version = "file"

    def __init__(self, path: Path) -> None:
        self.path = path

    def groups(self) -> Iterator[Group]:
        """As `read_responses`."""
        return read_responses(self.path)


def read_responses(path: Path) -> Iterator[Group]:
    """Every prompt of the file with all its responses, in the order of first appearance.

    Rows with the same prompt id are one prompt; a prompt without an id gets one from its content.  Raises UsageError
    with file:line for a row without prompt or response, and for two different prompts with one id.
    """
    found: dict[str, tuple[Prompt, list[Candidate]]] = {}
    for where, row in read_jsonl(path):
        prompt = _prompt(row, where)
        earlier, candidates = found.setdefault(prompt.id, (prompt, []))
        if earlier.messages != prompt.messages:
            raise UsageError(
                f"two prompts with the id {prompt.id}", where=f"{earlier.where} and {where}",
                hint="give each prompt its own id, or none",
            )  # fmt: skip
        for text, source in _responses(row, where):
            candidates.append(Candidate(prompt.id, len(candidates), text, source=source))
    if not found:
        raise UsageError("no responses", where=str(path), hint="the file is empty")
    for prompt, candidates in found.values():
        yield Group(prompt, tuple(candidates))


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    asked = row["prompt"] if row.get("prompt") is not None else row.get("messages")
    if asked is None:
        raise UsageError("the row has no prompt", where=where, hint='add "prompt" (text) or "messages"')
    messages = as_messages(asked, where)
    given = row["prompt_id"] if row.get("prompt_id") is not None else row.get("id")
    if isinstance(given, (dict, list)):
        raise UsageError("the prompt's id is not a text or a number", where=where, hint='"id": "..."')
    answer = row.get("answer")
    identity = prompt_id(messages) if given is None else str(given)
    return Prompt(identity, messages, None if answer is None else str(answer), where)


def _responses(row: Mapping[str, Any], where: str) -> Iterator[tuple[str, str | None]]:
    """(text, who wrote it) of every response in a row."""
    if row.get("responses") is None:
        if row.get("response") is None:
            raise UsageError("the row has no responses", where=where, hint='add "responses": [text, ...] or "response"')
        yield _response(row["response"], row, where)
        return
    if not isinstance(row["responses"], list) or not row["responses"]:
        raise UsageError("responses is not a list with texts in it", where=where, hint='"responses": [text, ...]')
    for position, response in enumerate(row["responses"]):
        yield _response(response, row, f"{where} responses[{position}]")


def _response(value: Any, row: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    part = value if isinstance(value, dict) else {}
    text = next((part[name] for name in _TEXTS if part.get(name) is not None), None) if part else value
    if not isinstance(text, str):
        raise UsageError("the response has no text", where=where, hint='a text, or {"text": ..., "model": ...}')
    source = part.get("model", row.get("model"))
    return text, None if source is None else str(source)
