"""Scorers: a reward for every candidate.  This file imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from bnfctl.config import ScoreConfig
from bnfctl.data.records import Group, Reward
from bnfctl.errors import UsageError
from bnfctl.scorers.thinking import WithoutThinking
from bnfctl.tables import SCORERS, load

MODEL_HINTS = {
    "reward-model": "--model ID or FOLDER of a one-label classifier",
    "pairrm": "--model llm-blender/PairRM",
    "armorm": "--model RLHFlow/ArmoRM-Llama3-8B-v0.1",
}
"""What to type where a scorer lacks its model."""


class Scorer(Protocol):
    """Gives rewards to groups, one group at a time or many together."""

    version: str
    """The engine and its version, for provenance."""

    def score(self, groups: Iterable[Group]) -> Iterator[list[Reward]]:
        """For every group, in order, one reward per candidate, in order.  May read ahead."""
        ...


def make(config: ScoreConfig, model_dir: Path | None = None, answers: Path | None = None) -> Scorer:
    """The scorer that `config` names, with its model (from `model_dir`) loaded where it has one.

    answers: file in which a judge keeps what it was answered, so that nothing is asked twice.
    Raises UsageError for a scorer that lacks its model, an invalid pattern, a model that is no reward model.
    """
    kind = load(SCORERS, config.scorer, "scorer")
    if config.scorer == "rules":
        scorer: Scorer = kind(config)
    elif config.scorer == "judge":
        scorer = kind(config, answers)
    elif model_dir is None:
        raise UsageError(f"{config.scorer} needs a model", where="--model", hint=MODEL_HINTS[config.scorer])
    else:
        scorer = kind(config, model_dir)
    return WithoutThinking(scorer) if config.thinking == "strip" else scorer
