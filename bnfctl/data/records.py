"""The things that flow between the stages: prompts, candidates, groups, rewards, records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
"""One chat turn: {"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked: chat turns that end with the user's."""

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    """The known right answer, where there is one, for the verifiers."""
    where: str = ""
    """`file:line` or data set row that it came from, for error messages."""

    @property
    def text(self) -> str:
        """The content of the last user turn: what verifiers read."""
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One response to a prompt, as it was sampled (or as it was found in a file: ids and seed are None)."""

    prompt_id: str
    sample: int
    """0..n-1 within its prompt."""
    text: str
    """The decoded response without special tokens."""
    token_ids: list[int] | None = None
    """What was sampled, including the stop id where finish_reason is "stop"."""
    finish_reason: str | None = None
    """ "stop" (the model ended its turn), "length" (cut off), None (unknown: text from a file)."""
    seed: int | None = None
    prompt_ids: list[int] | None = None
    """The rendered prompt's token ids, exactly as the model saw them."""
    source: str | None = None
    """Who wrote it, where a file says so (a model's name)."""


@dataclass(frozen=True, slots=True)
class Group:
    """All candidates of one prompt, in sample order: the unit of scoring."""

    prompt: Prompt
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Reward:
    """A scorer's number for one candidate; None (never 0) where the scorer could not tell."""

    value: float | None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Side:
    """One labelled response of a training record."""

    label: int
    """+1 chosen, -1 rejected."""
    ids: list[int]
    """The trained tokens, with the stop id where the turn really ended; len(ids) is |y|."""


@dataclass(frozen=True, slots=True)
class Record:
    """The unit of batching: a pair (chosen first), or one labelled response, as token ids."""

    id: str
    prompt_ids: list[int]
    sides: tuple[Side, ...]
