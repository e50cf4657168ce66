"""The task protocol: what is asked, how it is decoded, how a response is graded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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

    def aggregate(self, grades: Sequence[Reward]) -> dict[str, float | None]:
        """Figures beyond the mean of the grades, by name."""


def takes(name: str) -> set[str]:
    """The options that a task knows, by the names of its constructor's parameters."""
    return set(inspect.signature(load(TASKS, name, "task")).parameters)


def make(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of that name, from the table, with those of the options that it knows."""
    known = {option: value for option, value in (options or {}).items() if option in takes(name)}
    task: Task = load(TASKS, name, "task")(**known)
    return task
