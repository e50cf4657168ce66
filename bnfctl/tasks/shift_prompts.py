"""The prompts of the shift analysis: what the policy (or the reference) answers before the two are compared.

Paper, section 5.3: 1,000 questions of WildBench, greedy responses.  Which 1,000 of the 1,024 it does not say; here they
are the first ones.  There is nothing to grade: `evaluation.shifting` measures the responses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bnfctl import console
from bnfctl.artifact import Pinned, Store
from bnfctl.config import GenerateConfig
from bnfctl.data.records import Prompt, Reward
from bnfctl.data.sources import pin_data, read_prompts
from bnfctl.tables import PROMPTS
from bnfctl.tasks import TaskDecoding
from bnfctl.tasks.wildbench import WildBench

COUNT = 1000
"""Prompts that are taken, of WildBench or of a file, unless --limit names another number."""


def split_of(ref: str) -> str:
    """The split that --shift-prompts reads: of the lab the one that it never trains on, else as `generate` does."""
    return "test" if ref.partition(":")[0] in PROMPTS else "train"


def pin_prompts(ref: str, store: Store) -> Pinned:
    """What --shift-prompts names, pinned by its content; UsageError where there is nothing."""
    return pin_data(ref, store, "--shift-prompts", split_of(ref))


class ShiftPrompts:
    """Greedy responses to COUNT prompts."""

    name, version = "shifts", "shifts-1"
    source = WildBench.source
    decoding = TaskDecoding()
    binary = False

    def __init__(
        self, data_dir: Path | None = None, *, pinned: Pinned | None = None, shift_prompts: Pinned | None = None
    ) -> None:
        """data_dir, pinned: WildBench, as its own tasks take it.  shift_prompts: of `pin_prompts`, in its place."""
        self.data_dir, self.pinned, self.shift_prompts = data_dir, pinned, shift_prompts

    def requests(self, limit: int | None) -> Sequence[Prompt]:
        """The first `limit` prompts, or COUNT, in their order; a repeated one counts once."""
        first = COUNT if limit is None else limit
        if self.shift_prompts is None:
            return WildBench(self.data_dir, pinned=self.pinned).requests(first)
        counts: Counter[str] = Counter()
        ref = self.shift_prompts.ref
        asked = GenerateConfig(prompts=ref, split=split_of(ref), limit=first)
        found = list(read_prompts(self.shift_prompts, asked, counts))
        if counts["repeated"]:
            console.say(f"{ref}: prompts that are there already, left out: {counts['repeated']}")
        return found

    def grade(self, prompt: Prompt, response: str) -> Reward:
        """Nothing: a shift is no grade."""
        return Reward(None)

    def aggregate(self, grades: Sequence[Reward]) -> dict[str, float | None]:
        return {}
