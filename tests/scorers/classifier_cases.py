"""Prompts and responses for the tests of the reward models, whatever runs them."""

from __future__ import annotations

from typing import Any

import torch

from bnfctl.config import ScoreConfig
from bnfctl.data.records import Candidate, Group, Prompt
from bnfctl.scorers.classifier import ClassifierScorer


def config(**changes: Any) -> ScoreConfig:
    return ScoreConfig(**{"input": "x", "scorer": "reward-model", "dtype": "float32", "max_length": 200, **changes})


def group(number: int, *texts: str) -> Group:
    asked = Prompt(f"p{number}", ({"role": "user", "content": "why" * (number + 1)},))
    return Group(asked, tuple(Candidate(asked.id, i, text) for i, text in enumerate(texts)))


GROUPS = [group(i, "a" * (1 + 7 * i % 31), "yes", "no, " * (i % 9), "") for i in range(11)]


def values(scorer: ClassifierScorer, groups: list[Group]) -> list[list[float | None]]:
    return [[reward.value for reward in rewards] for rewards in scorer.score(groups)]


def near(found: list[list[float | None]], expected: list[list[float | None]], tolerance: float = 1e-5) -> bool:
    return torch.allclose(torch.tensor(found), torch.tensor(expected), atol=tolerance, rtol=0)
