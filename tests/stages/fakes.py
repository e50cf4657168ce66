"""A task whose grades can be told from the responses, for the stage tests."""

from __future__ import annotations

from collections.abc import Sequence

from bnfctl.data.records import Prompt, Reward
from bnfctl.tasks import TaskDecoding


class Length:
    """The share of 16 characters that a response has; the first item of all cannot be graded."""

    name, version, binary = "length", "1", False
    decoding = TaskDecoding(temperature=1.0, max_tokens=8)

    def requests(self, limit: int | None) -> Sequence[Prompt]:
        return [Prompt(f"item-{i}", ({"role": "user", "content": f"Item {i}"},)) for i in range(limit or 6)]

    def grade(self, prompt: Prompt, response: str) -> Reward:
        return Reward(None if prompt.id == "item-0" else min(len(response), 16) / 16, {"characters": len(response)})

    def aggregate(self, grades: Sequence[Reward]) -> dict[str, float | None]:
        lengths = [grade.extra["characters"] for grade in grades if grade.extra]
        return {"characters": sum(lengths) / len(lengths)} if lengths else {}


class Always(Length):
    """Every response is right."""

    name, binary = "always", True

    def grade(self, prompt: Prompt, response: str) -> Reward:
        return Reward(1.0)


class Third(Length):
    """Every third response is right."""

    name, binary = "third", True

    def grade(self, prompt: Prompt, response: str) -> Reward:
        return Reward(float(int(prompt.id.removeprefix("item-")) % 3 == 0))


class Never(Length):
    """No response can be graded."""

    name = "never"

    def grade(self, prompt: Prompt, response: str) -> Reward:
        return Reward(None)
