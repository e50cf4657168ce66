"""How far a judge can be trusted: agreement with itself or another one, position bias, share without a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bnfctl.errors import UsageError
from bnfctl.tasks.battles import VERDICTS, Battle, outcome


def cohen_kappa(
    first: Sequence[str],
    second: Sequence[str],
    labels: Sequence[str] = VERDICTS,
    weights: Literal["none", "linear"] = "none",
) -> float:
    """Agreement beyond chance of two sets of labels of the same things (Cohen 1960; weighted: Cohen 1968).

    labels: all of them, in their order; with "linear" weights a miss counts by how many places it is off.
    1 is full agreement, 0 what chance gives; NaN where both always say one and the same label.
    UsageError for a label that is not in `labels`.
    """
    place = {label: i for i, label in enumerate(labels)}
    table = np.zeros((len(labels), len(labels)))
    for one, other in zip(first, second, strict=True):
        for label in (one, other):
            if label not in place:
                raise UsageError(f"no label: '{label}'", hint=f"labels: {', '.join(labels)}")
        table[place[one], place[other]] += 1
    distance = np.abs(np.subtract.outer(np.arange(len(labels)), np.arange(len(labels)))).astype(np.float64)
    if weights == "none":
        distance = np.minimum(distance, 1)
    chance = np.outer(table.sum(1), table.sum(0)) / max(1, len(first))
    expected = float((distance * chance).sum())
    return 1 - float((distance * table).sum()) / expected if expected else math.nan


@dataclass(frozen=True)
class PositionBias:
    """What swapping the sides changes, over n prompts (of each model) whose two games both have a verdict."""

    n: int
    flipped: float
    """Share of prompts in which each response won once: the side decided."""
    changed: float
    """Share in which win, tie or loss changed at all."""
    first: float
    """Of the games that were no tie, the share won by the response shown first; 0.5 is no bias, NaN without such."""


def position_bias(battles: Sequence[Battle]) -> PositionBias:
    """Compare the two games of each (model, prompt); all shares are NaN where no prompt has both."""
    games: dict[tuple[str, str], dict[int, float]] = {}
    for battle in battles:
        if battle.verdict is not None:
            games.setdefault((battle.model, battle.prompt_id), {})[battle.game] = outcome(battle.verdict, battle.game)[
                0
            ]
    both = [(found[1], found[2]) for found in games.values() if len(found) == 2]
    if not both:
        return PositionBias(0, math.nan, math.nan, math.nan)
    # In game 1 the model is shown second, in game 2 first.
    first = [1 - one for one, _ in both if one != 0.5] + [two for _, two in both if two != 0.5]
    return PositionBias(
        len(both),
        sum(abs(one - two) == 1 for one, two in both) / len(both),
        sum(one != two for one, two in both) / len(both),
        sum(first) / len(first) if first else math.nan,
    )


def null_share(battles: Sequence[Battle]) -> float:
    """Share of games without a verdict."""
    return sum(battle.verdict is None for battle in battles) / len(battles)
