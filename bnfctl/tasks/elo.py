"""WB-Elo within one's own pool of models: votes from scores, an online Elo over shuffled votes, and a fit of the same.

The published ratings used other judges and an Arena snapshot; with a new judge there is no pool to join, so a table
says "WB-Elo (local pool)".  `online` follows the published code: its interval is the noise of the order of votes.
`fitted` is deterministic, and its interval is the noise of the sessions, the one to believe.
Source: allenai/WildBench, leaderboard/wb_elo.py and its published settings.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bnfctl.errors import UsageError
from bnfctl.tasks.bradley_terry import START, elo, ratings, unbounded, wins_of
from bnfctl.tasks.statistics import DRAWS, Array, Bootstrap, Estimate, Statistic, bootstrap
from bnfctl.tasks.wildbench_scores import Scored

MARGIN = 2.0
"""Scores this far apart are a win."""
TIE_MARGIN = 2.0
"""Scores up to this far apart, and no win, are a tie; those between the two margins are no vote."""
LENGTH_MARGIN = 1500
"""Characters: responses that differ by more in length tie."""
STEP = 4.0
"""K: points of a vote that could not be more of a surprise."""
ROUNDS = 128
RETURN = 100
"""A known model goes halfway back to its known rating after this many of its own votes."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One session, two models."""

    session_id: str
    first: str
    second: str
    score: float
    """Of the first: 1, 0.5, 0."""


@dataclass(frozen=True)
class Fitted:
    """Bradley-Terry ratings of a pool."""

    ratings: dict[str, Estimate]
    """n: sessions with a vote."""
    unbounded: bool
    """Some model never lost, or never met the others: its distance from them is not in the data."""


def votes_of(
    scored: Mapping[str, Sequence[Scored]],
    margin: float = MARGIN,
    tie_margin: float = TIE_MARGIN,
    length_margin: int | None = LENGTH_MARGIN,
    known: Mapping[str, float] | None = None,
) -> list[Vote]:
    """Votes of every pair of models on every session where both have a whole response; pairs of two `known` ones have none."""
    by_session = {
        model: {item.session_id: item for item in items if item.whole and item.score is not None}
        for model, items in scored.items()
    }
    votes = []
    for first, second in itertools.combinations(scored, 2):
        if known and first in known and second in known:
            continue
        for session, mine in by_session[first].items():
            theirs = by_session[second].get(session)
            if theirs is None:
                continue
            gap = (mine.score or 0.0) - (theirs.score or 0.0)
            if abs(gap) < margin and abs(gap) > tie_margin:
                continue
            tie = abs(gap) < margin or (length_margin is not None and abs(mine.length - theirs.length) > length_margin)
            votes.append(Vote(session, first, second, 0.5 if tie else float(gap > 0)))
    return votes


def online(
    votes: Sequence[Vote],
    models: Sequence[str],
    known: Mapping[str, float] | None = None,
    step: float = STEP,
    rounds: int = ROUNDS,
    interval: int = RETURN,
    dynamic: bool = True,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Online Elo, base 10, scale 400: the mean over `rounds` shuffles, and the 2.5 and 97.5 % of them.

    known: ratings to start from, others start at 1000.  dynamic: known models move too, and go halfway back every
    `interval` of their own votes; else they stay.  n is a model's votes.
    """
    known = known or {}
    place = {model: m for m, model in enumerate(models)}
    start = np.array([known.get(model, START) for model in models])
    is_known = np.array([model in known for model in models])
    moves = np.where(is_known & (not dynamic), 0.0, step)
    pairs = np.array([(place[vote.first], place[vote.second]) for vote in votes], np.intp).reshape(-1, 2)
    scores = np.array([vote.score for vote in votes])
    source = np.random.default_rng(seed)
    order = np.stack([source.permutation(len(votes)) for _ in range(rounds)], axis=1)
    rating = np.tile(start, (rounds, 1))
    seen = np.zeros((rounds, len(models)), np.int64)
    row = np.arange(rounds)
    for now in order:
        i, j = pairs[now, 0], pairs[now, 1]
        surprise = scores[now] - 1 / (1 + 10 ** ((rating[row, j] - rating[row, i]) / 400))
        rating[row, i] += moves[i] * surprise
        rating[row, j] -= moves[j] * surprise
        if known and dynamic:
            for player in (i, j):
                seen[row, player] += 1
                back = is_known[player] & (seen[row, player] % interval == 0)
                rating[row[back], player[back]] = (rating[row[back], player[back]] + start[player[back]]) / 2
    counts = np.bincount(pairs.ravel(), minlength=len(models))
    found = Bootstrap(rounds, rating.mean(0), rating)
    return {model: dataclasses.replace(found.estimate(m), n=int(counts[m])) for m, model in enumerate(models)}


def fitted_statistic(
    votes: Sequence[Vote], models: Sequence[str], known: Mapping[str, float] | None = None
) -> tuple[Statistic, Array]:
    """Counts of the sessions with a vote [b, C] -> ratings [b, M], in the order of `models`; and the wins [C, M, M].

    UsageError where nobody voted.
    """
    place = {model: m for m, model in enumerate(models)}
    sessions: dict[str, list[tuple[int, int, float]]] = {}
    for vote in votes:
        sessions.setdefault(vote.session_id, []).append((place[vote.first], place[vote.second], vote.score))
    if not sessions:
        raise UsageError("no votes", hint="Elo needs two models or more with scores of the same sessions")
    wins = np.stack([wins_of(found, len(models)) for found in sessions.values()])
    fixed = [place[model] for model in known or {} if model in place]
    target = float(np.mean([(known or {})[models[m]] for m in fixed])) if fixed else START

    def statistic(counts: Array) -> Array:
        rated = elo(ratings(np.tensordot(counts, wins, 1)))
        return rated + target - (rated[:, fixed].mean(1, keepdims=True) if fixed else START)

    return statistic, wins


def fitted(
    votes: Sequence[Vote],
    models: Sequence[str],
    known: Mapping[str, float] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Fitted:
    """Bradley-Terry of the same votes on the Elo scale, sessions resampled; their mean is 1000.

    With `known` ratings the whole scale is moved so that the known models keep their mean.
    """
    statistic, wins = fitted_statistic(votes, models, known)
    found = bootstrap(statistic, len(wins), draws, seed)
    return Fitted({model: found.estimate(m) for m, model in enumerate(models)}, unbounded(wins.sum(0)))
