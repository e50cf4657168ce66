"""Bradley-Terry ratings by maximum likelihood: P(i beats j) = sigmoid(r_i - r_j), a tie is half a win each.

Deterministic, unlike an online Elo, which depends on the order of the votes.  Against one common opponent the fitted
win rate is exactly the weighted mean of the scores.  Source: Bradley and Terry 1952; Ford 1957 for when it exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bnfctl.tasks.newton import minimise
from bnfctl.tasks.statistics import Array

SCALE = 400 / math.log(10)
"""Elo points per unit of log-odds."""
START = 1000.0
BOUND = 10.0
"""Ratings further apart than this (odds of 22,000 to 1, 1,737 points) are no finding of a benchmark's size."""
RIDGE = 1e-9


def ratings(wins: Array) -> Array:
    """Log-odds ratings [b, K], of mean 0, from wins [b, K, K]: votes that i won over j, ties half each.

    Where no maximum exists (see `unbounded`) the ratings are stopped at BOUND from the mean.
    """
    players = wins.shape[-1]
    games = wins + wins.transpose(0, 2, 1)
    won = wins.sum(2)

    def problem(place: Array) -> tuple[Array, Array, Array]:
        gap = place[:, :, None] - place[:, None, :]
        lost = np.logaddexp(0.0, -gap)
        chance = np.exp(-lost)
        value = (wins * lost).sum((1, 2)) + RIDGE / 2 * (place**2).sum(1)
        gradient = (games * chance).sum(2) - won + RIDGE * place
        weight = games * chance * chance.transpose(0, 2, 1)
        # The likelihood knows differences only; the matrix of ones keeps their mean at the start, 0.
        hessian = 1.0 + RIDGE * np.eye(players) - weight
        hessian[:, range(players), range(players)] += weight.sum(2)
        return value, gradient, hessian

    return np.clip(minimise(problem, np.zeros(wins.shape[:2])), -BOUND, BOUND)


def unbounded(wins: Array) -> bool:
    """Whether wins [K, K] have no maximum: some group never lost to the others, or never met them (Ford 1957)."""
    players = len(wins)
    reach = ((wins > 0) | np.eye(players, dtype=bool)).astype(np.int64)
    for _ in range(max(1, math.ceil(math.log2(players)))):
        reach = ((reach @ reach) > 0).astype(np.int64)
    return not reach.all()


def elo(log_odds: Array, anchor: int | None = None, start: float = START) -> Array:
    """Ratings [..., K] on the Elo scale: player `anchor`, or the mean of all where it is None, gets `start`."""
    zero = log_odds.mean(-1, keepdims=True) if anchor is None else log_odds[..., anchor : anchor + 1]
    return start + SCALE * (log_odds - zero)


def wins_of(votes: Sequence[tuple[int, int, float]], players: int) -> Array:
    """[K, K] from votes (i, j, score of i: 1, 0.5, 0)."""
    wins = np.zeros((players, players))
    for i, j, score in votes:
        wins[i, j] += score
        wins[j, i] += 1 - score
    return wins
