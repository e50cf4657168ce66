"""The lab's tasks, and its verifier as a rule of `score`."""

from __future__ import annotations

from collections.abc import Sequence

from bnfctl.config import ScoreConfig
from bnfctl.data.records import Prompt, Reward
from bnfctl.lab.world import prompts, verify
from bnfctl.tasks import TaskDecoding

VERSION = "1"
"""Of prompts, verifier and decoding: another one gives other grades and rewards."""
ITEMS = 1000
"""Held-out items per task."""


def reward(prompt: Prompt, response: str, config: ScoreConfig) -> Reward:
    """The world's own verifier: a reward in [0, 1], null for a prompt that is not of this world."""
    return Reward(verify(prompt.text, response))


class _LabTask:
    """Held-out prompts of one family, graded by the verifier."""

    version = VERSION
    family: str

    def requests(self, limit: int | None) -> Sequence[Prompt]:
        rows = prompts(self.family, "test", min(limit or ITEMS, ITEMS))
        return [Prompt(str(r["id"]), ({"role": "user", "content": str(r["prompt"])},), r["answer"]) for r in rows]

    def grade(self, prompt: Prompt, response: str) -> Reward:
        return Reward(verify(prompt.text, response))

    def aggregate(self, grades: Sequence[Reward]) -> dict[str, float | None]:
        return {}


class ChatTask(_LabTask):
    """Chat prompts, sampled as the quickstart samples them: the mean reward."""

    name, family, binary = "lab-chat", "chat", False
    decoding = TaskDecoding(temperature=0.8, top_p=0.95, max_tokens=100)


class ReasoningTask(_LabTask):
    """Sums, reversals, sorting and the like, greedy: the share of right answers."""

    name, family, binary = "lab-reasoning", "reasoning", True
    decoding = TaskDecoding(max_tokens=64)


class MathTask(_LabTask):
    """Sentences whose wrong versions differ by one token, greedy: the share of right ones."""

    name, family, binary = "lab-math", "math", True
    decoding = TaskDecoding(max_tokens=96)
