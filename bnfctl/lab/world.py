"""The lab's world: prompts, verifiers and the pretraining corpus of the embedded model, in plain Python.

Three families: `chat` (answered well only sometimes: what alignment should raise), `math` (wrong responses differ
by one token) and `reasoning` (exact tasks outside the preference data: what alignment should leave alone).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from random import Random
from types import ModuleType
from typing import TypedDict

from bnfctl.errors import UsageError, nearest
from bnfctl.lab import chat, reasoning, stories
from bnfctl.lab.dice import pick_weighted

FAMILIES = ("chat", "math", "reasoning")
SPLITS = ("train", "test")

_MODULES: dict[str, ModuleType] = {"chat": chat, "math": stories, "reasoning": reasoning}
_DRAWS = 60_000  # prompts drawn per family before duplicates go: nearly all that exist in chat and math
_MIXTURE = {"chat": 0.34, "math": 0.18, "reasoning": 0.48}  # shares of the corpus's documents


class LabPrompt(TypedDict):
    """A prompt of this world; `answer` is None where a verifier grades instead (chat)."""

    id: str
    prompt: str
    answer: str | None


def prompts(family: str, split: str = "train", limit: int | None = None) -> Iterator[LabPrompt]:
    """Distinct prompts of a family, in an order that never changes; none is in both splits.

    Stops after `limit` or when the family has no more. Raises UsageError for an unknown family or split.
    """
    _known(family, FAMILIES, "family")
    _known(split, SPLITS, "split")
    return _prompts(family, split, limit)


def _prompts(family: str, split: str, limit: int | None) -> Iterator[LabPrompt]:
    module, rng = _MODULES[family], Random(f"lab-{family}")
    seen: set[str] = set()
    index = 0
    for _ in range(_DRAWS):
        if limit is not None and index >= limit:
            return
        prompt = module.draw(rng)
        if prompt in seen or split_of(prompt) != split:
            continue
        seen.add(prompt)
        yield {"id": f"lab-{family}-{split}-{index:06d}", "prompt": prompt, "answer": module.answer(prompt)}
        index += 1


def split_of(prompt: str) -> str:
    """`test` for a quarter of all prompts, by a hash of the text, else `train`."""
    return "test" if hashlib.sha256(prompt.encode()).digest()[0] < 64 else "train"


def verify(prompt: str, response: str) -> float | None:
    """The reward in [0, 1] of a response; None when the prompt is not of this world."""
    rewards = (module.verify(prompt, response) for module in _MODULES.values())
    return next((reward for reward in rewards if reward is not None), None)


def gold(prompt: str, seed: int = 0) -> str:
    """A response of reward 1. Raises UsageError when the prompt is not of this world."""
    for module in _MODULES.values():
        if module.verify(prompt, "") is not None:
            response: str = module.gold(prompt, Random(seed))
            return response
    raise UsageError("not a prompt of the lab", where=repr(prompt[:60]), hint="take one from bnfctl.lab.world.prompts")


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """The pretraining corpus: (prompt, response) for ever, from train prompts only, with the corpus's flaws."""
    rng = Random(f"lab-corpus-{seed}")
    while True:
        module = _MODULES[pick_weighted(rng, _MIXTURE)]
        prompt = module.draw(rng)
        if split_of(prompt) == "train":
            yield prompt, module.corpus_response(prompt, rng)


def _known(name: str, known: tuple[str, ...], kind: str) -> None:
    if name not in known:
        raise UsageError(f"unknown lab {kind} '{name}'{nearest(name, known)}", hint=f"one of: {', '.join(known)}")
