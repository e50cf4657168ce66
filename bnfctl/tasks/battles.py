"""Battles of models against one baseline (Arena-Hard v0.1): verdicts to weights, win rates, their intervals.

A task file fills `Battle`s and calls

    pool = make_pool(battles, nulls="game")
    win_rates(pool)                 # {model: Estimate}, prompts resampled: the default
    ci_official(pool, "2024")       # the interval of the original code, for comparison with published tables

Shares are in [0, 1]; tables print them times 100.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bnfctl.errors import UsageError
from bnfctl.tasks.statistics import DRAWS, Array, Bootstrap, Estimate, Statistic, bootstrap, ratio

VERDICTS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")
"""From the baseline's view in game 1, where the baseline is A.  Games are two: sides swapped in the second."""
STRONG = 3
"""A `>>` counts as this many equal votes."""
GAMES = 2
Nulls = Literal["game", "prompt"]
Generation = Literal["2024", "2025"]


@dataclass(frozen=True, slots=True)
class Battle:
    """One game of one model against the baseline, as a judge saw it."""

    prompt_id: str
    model: str
    game: int
    """1: the baseline is A.  2: the model is A."""
    verdict: str | None
    """One of VERDICTS; None where none could be read."""
    length: int = 0
    """Tokens of the model's response, for length control."""
    baseline_length: int = 0


def outcome(verdict: str, game: int) -> tuple[float, int]:
    """(1 the model won, 0.5 tie, 0 lost; how many votes that is)."""
    if verdict not in VERDICTS:
        raise UsageError(f"no verdict: '{verdict}'", hint=f"verdicts: {', '.join(VERDICTS)}; None where there is none")
    place = VERDICTS.index(verdict) - 2
    signed = place if game == 1 else -place
    return (signed > 0) + 0.5 * (signed == 0), STRONG if abs(place) == 2 else 1


@dataclass(frozen=True)
class Pool:
    """All battles of a table: M models, C prompts, 2 games; a missing battle has weight 0."""

    models: tuple[str, ...]
    prompts: tuple[str, ...]
    weight: Array
    """[M, C, 2] votes."""
    score: Array
    """[M, C, 2] the model's share of them: 1, 0.5, 0."""
    surplus: Array
    """[M, C] (tokens of the model - of the baseline) / (their sum + 1): how much longer the model's response is."""

    @property
    def counted(self) -> NDArray[np.intp]:
        """[M] prompts with a verdict."""
        return (self.weight.sum(2) > 0).sum(1)

    def only(self, model: str) -> Pool:
        """The pool of one model, with all prompts."""
        m = slice(self.models.index(model), self.models.index(model) + 1)
        return Pool((model,), self.prompts, self.weight[m], self.score[m], self.surplus[m])


def make_pool(battles: Sequence[Battle], nulls: Nulls = "game") -> Pool:
    """The battles as arrays; models and prompts in order of first appearance.

    nulls: what a battle without a verdict takes with it: that `game` (the code of 2024) or the `prompt` (of 2025).
    UsageError for no battles, a game played twice, a game other than 1 and 2, or lengths that differ between the games.
    """
    if not battles:
        raise UsageError("no battles", hint="judge responses of a model against the baseline's first")
    models = {model: m for m, model in enumerate(dict.fromkeys(battle.model for battle in battles))}
    prompts = {prompt: c for c, prompt in enumerate(dict.fromkeys(battle.prompt_id for battle in battles))}
    weight, score = np.zeros((2, len(models), len(prompts), GAMES))
    surplus = np.full((len(models), len(prompts)), np.nan)
    seen: set[tuple[str, str, int]] = set()
    null = []
    for battle in battles:
        key = (battle.model, battle.prompt_id, battle.game)
        where = f"prompt {battle.prompt_id}, model {battle.model}, game {battle.game}"
        if battle.game not in (1, 2) or key in seen:
            raise UsageError("a battle is game 1 or game 2, each once", where=where, hint="judge the prompt again")
        seen.add(key)
        m, c = models[battle.model], prompts[battle.prompt_id]
        longer = (battle.length - battle.baseline_length) / (battle.length + battle.baseline_length + 1)
        if not np.isnan(surplus[m, c]) and surplus[m, c] != longer:
            what = "the two games of a prompt are about responses of the same length"
            raise UsageError(what, where=where, hint="judge the prompt again: the response has changed")
        surplus[m, c] = longer
        if battle.verdict is None:
            null.append((m, c))
        else:
            score[m, c, battle.game - 1], weight[m, c, battle.game - 1] = outcome(battle.verdict, battle.game)
    if nulls == "prompt":
        for m, c in null:
            weight[m, c] = 0
    return Pool(tuple(models), tuple(prompts), weight, score, np.nan_to_num(surplus))


def win_rate_statistic(pool: Pool) -> Statistic:
    """Counts of prompts [b, C] -> win rates [b, M]: the weighted mean of the scores.

    Against one baseline that is the Bradley-Terry maximum likelihood too (see bradley_terry.py), so none is fitted.
    """
    return ratio((pool.weight * pool.score).sum(2).T, pool.weight.sum(2).T)


def win_rates(pool: Pool, draws: int = DRAWS, seed: int = 0) -> dict[str, Estimate]:
    """Each model's win rate; the interval resamples prompts, with both their games.  n: prompts with a verdict."""
    found = bootstrap(win_rate_statistic(pool), len(pool.prompts), draws, seed)
    counted = pool.counted
    return {model: dataclasses.replace(found.estimate(m), n=int(counted[m])) for m, model in enumerate(pool.models)}


def resampled_rows(pool: Pool, draws: int, seed: int) -> Array:
    """Votes [draws, M, C, 2] when single votes are resampled, as if each of them were independent.

    A `>>` is three rows by then; the total number of rows of the pool is kept.
    """
    total = pool.weight.sum()
    if total == 0:
        return np.zeros((draws, *pool.weight.shape))
    chance = (pool.weight / total).ravel()
    counts = np.random.default_rng(seed).multinomial(int(total), chance, size=draws)
    return counts.reshape(draws, *pool.weight.shape).astype(np.float64)


def ci_official(pool: Pool, generation: Generation = "2024", draws: int = 100, seed: int = 0) -> dict[str, Estimate]:
    """The interval of Arena-Hard's own code, far too narrow: it resamples votes after `>>` became three of them.

    "2024" (v0.1): rows of the whole pool, the point from the data, 2.5 and 97.5 %.
    "2025" (v2): rows of each model, the point is the mean of the resamples, 5 and 95 %, so a 90 % interval.
    n is the number of votes, as that code counts.
    """
    if generation == "2024":
        rows, bounds = resampled_rows(pool, draws, seed), (2.5, 97.5)
    else:
        alone = [resampled_rows(pool.only(model), draws, seed + m) for m, model in enumerate(pool.models)]
        rows, bounds = np.concatenate(alone, axis=1), (5.0, 95.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = (rows * pool.score).sum((2, 3)) / rows.sum((2, 3))
    point = win_rate_statistic(pool)(np.ones((1, len(pool.prompts))))[0]
    if generation == "2025":
        point = rates.mean(0)
    found = Bootstrap(len(pool.prompts), point, rates)
    return {
        model: dataclasses.replace(found.estimate(m, bounds), n=int(pool.weight[m].sum()))
        for m, model in enumerate(pool.models)
    }
