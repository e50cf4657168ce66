"""The task protocol: what is asked, how it is decoded, how a response is graded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bnfctl.data.records import Prompt, Reward
from bnfctl.tables import TASKS, load


@dataclass(frozen=True)
class TaskDecoding:
    """How a task's responses are decoded; a part of its protocol, so nobody sets it from outside."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    max_tokens: int = 4096


class Task(Protocol):
    """One benchmark.  `version` changes whenever the same responses could get other numbers."""

    name: str
    version: str
    decoding: TaskDecoding
    binary: bool
    """Grades are 0 or 1, so the interval is Wilson's; else the normal interval of a mean."""

    def requests(self, limit: int | None) -> Sequence[Prompt]:
        """The items, always in the same order; `limit` takes the first ones."""

    def grade(self, prompt: Prompt, response: str) -> Reward:
        """A grade in [0, 1]; None where the item cannot be graded."""


def make(name: str) -> Task:
    """The task of that name, from the table."""
    task: Task = load(TASKS, name, "task")()
    return task
