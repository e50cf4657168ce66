"""Length-controlled win rates (Arena-Hard): what would the judge say if length did not differ?

P(model m wins) = sigmoid(ln 10 (c_m - c_baseline) + g f), with f the surplus of `battles.Pool` on a scale:

* `lc_official`: the code of 2024.  One g for all models, f centred on the mean of *all battles of the pool*, L2 with
  C = 1 on the doubled rows.  So it is the win rate at the pool's average length, and a model's number moves when
  another one joins: name the pool beside it.  For a pool of one model it corrects nothing, so it is refused.
* `lc_equal_length`: f not centred, no penalty, each model fitted alone: the win rate at equal lengths.

Both intervals resample prompts and fit again in each resample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bnfctl.errors import UsageError
from bnfctl.tasks.battles import Pool, resampled_rows
from bnfctl.tasks.bradley_terry import BOUND
from bnfctl.tasks.newton import minimise
from bnfctl.tasks.statistics import DRAWS, Array, Bootstrap, Estimate, Statistic, bootstrap

LN10 = math.log(10)
OFFICIAL = 1.0
"""1 / C of the original's penalty."""
NONE = 1e-6
"""Only keeps separated data finite: it moves a coefficient by about a millionth of its standard error."""


@dataclass(frozen=True)
class Controlled:
    """A length-controlled win rate."""

    estimate: Estimate
    """n: prompts with a verdict."""
    coefficient: float
    """g: log-odds that one standard deviation of surplus is worth to the judge."""
    separated: bool
    """Lengths or models tell wins from losses without a miss: no maximum exists, the figure is stopped at BOUND."""
    pool: tuple[str, ...]
    """The models of the fit."""


@dataclass(frozen=True)
class Fit:
    """Parameters of each of b data sets, before anything is stopped."""

    log_odds: Array
    """[b, M] of a win over the baseline at f = 0; NaN for a model without a vote."""
    coefficient: Array
    """[b] g."""


def fit(weight: Array, won: Array, surplus: Array, center: Array, spread: Array, penalty: float) -> Fit:
    """Penalised maximum likelihood by Newton for votes [b, M, C], of which `won` [b, M, C] for the model.

    surplus [M, C]; f = (surplus - center [b]) / spread [b].  Every vote stands twice in the likelihood, as in the
    original, where a tie is one row won and one lost; the penalty is on c of every model, the baseline's too, and g.
    """
    models = weight.shape[1]
    # log-odds at f = 0 and g, from (c_baseline, c_1 .. c_M, g)
    change = np.zeros((models + 1, models + 2))
    change[:models, 0] = -LN10
    change[range(models), range(1, models + 1)] = LN10
    change[models, models + 1] = 1.0
    shift, scale = (center / spread)[:, None], 1 / spread[:, None]

    def problem(place: Array) -> tuple[Array, Array, Array]:
        inner = place @ change.T
        level, slope = inner[:, :models], inner[:, models:]
        eta = (level - slope * shift)[:, :, None] + (slope * scale)[:, :, None] * surplus
        small = np.exp(-np.abs(eta))
        value = (weight * (np.maximum(eta, 0) + np.log1p(small)) - won * eta).sum((1, 2))
        chance = np.where(eta >= 0, 1, small) / (1 + small)
        missed = weight * chance - won
        curve = weight * chance * (1 - chance)
        first = _moments(missed, surplus, shift, scale, 1)
        second = _moments(curve, surplus, shift, scale, 2)
        gradient = np.concatenate([first[0], first[1].sum(1, keepdims=True)], 1)
        hessian = np.zeros((len(place), models + 1, models + 1))
        hessian[:, range(models), range(models)] = second[0]
        hessian[:, :models, models] = hessian[:, models, :models] = second[1]
        hessian[:, models, models] = second[2].sum(1)
        return (
            2 * value + penalty / 2 * (place**2).sum(1),
            2 * gradient @ change + penalty * place,
            2 * change.T @ hessian @ change + penalty * np.eye(models + 2),
        )

    inner = minimise(problem, np.zeros((len(weight), models + 2))) @ change.T
    return Fit(np.where(weight.sum(2) > 0, inner[:, :models], np.nan), inner[:, models])


def _moments(values: Array, surplus: Array, shift: Array, scale: Array, order: int) -> list[Array]:
    """Sums over prompts of values * f^k, k = 0 .. order, each [b, M]: from those of the surplus, so f is never made."""
    raw = [np.einsum("bmc,mc->bm", values, surplus**k) for k in range(order + 1)]
    found = [raw[0], raw[1] * scale - raw[0] * shift]
    if order == 2:
        found.append(raw[2] * scale**2 - 2 * raw[1] * scale * shift + raw[0] * shift**2)
    return found


def _center_and_spread(weight: Array, surplus: Array) -> tuple[Array, Array]:
    """Mean and population standard deviation [b] of the surplus over all votes [b, M, C]; a spread of 0 is 1."""
    total = np.maximum(weight.sum((1, 2)), 1e-9)
    mean = (weight * surplus).sum((1, 2)) / total
    spread = np.sqrt(np.maximum((weight * surplus**2).sum((1, 2)) / total - mean**2, 0))
    return mean, np.where(spread > 1e-9, spread, 1.0)


def controlled(pool: Pool, centred: bool, penalty: float) -> Callable[[Array], Fit]:
    """Counts of prompts [b, C] -> the joint fit over the whole pool, its scale taken anew from each resample."""
    votes, score = pool.weight.sum(2), (pool.weight * pool.score).sum(2)

    def of(counts: Array) -> Fit:
        weight, won = counts[:, None, :] * votes, counts[:, None, :] * score
        center, spread = _center_and_spread(weight, pool.surplus)
        return fit(weight, won, pool.surplus, center * centred, spread, penalty)

    return of


def win_rate(log_odds: Array) -> Array:
    """The share at f = 0, for log-odds stopped at BOUND."""
    return 1 / (1 + np.exp(-np.clip(log_odds, -BOUND, BOUND)))


def lc_official_statistic(pool: Pool) -> Statistic:
    """Counts of prompts [b, C] -> [b, M].  UsageError for a pool of one model."""
    if len(pool.models) < 2:
        raise UsageError(
            f"lc_official needs two models or more; this pool has only {pool.models[0]}",
            hint="judge another model against the same baseline, or use lc_equal_length",
        )
    joint = controlled(pool, centred=True, penalty=OFFICIAL)
    return lambda counts: win_rate(joint(counts).log_odds)


def lc_equal_length_statistic(pool: Pool) -> Statistic:
    """Counts of prompts [b, C] -> [b, M], each model fitted alone.

    UsageError for a model whose surplus is the same everywhere but not 0: then nothing tells length from quality.
    """
    for m, model in enumerate(pool.models):
        seen = pool.surplus[m][pool.weight[m].sum(1) > 0]
        if len(seen) and np.ptp(seen) < 1e-9 and abs(seen[0]) > 1e-9:
            raise UsageError(
                f"lc_equal_length: every response of {model} is longer or shorter than the baseline's by one ratio",
                hint="the win rate without length control is all that these battles can tell",
            )
    alone = [controlled(pool.only(model), centred=False, penalty=NONE) for model in pool.models]
    return lambda counts: win_rate(np.concatenate([one(counts).log_odds for one in alone], axis=1))


def lc_official(pool: Pool, draws: int = DRAWS, seed: int = 0) -> dict[str, Controlled]:
    """{model: length-controlled win rate at the pool's average length}.  UsageError for a pool of one model."""
    found = bootstrap(lc_official_statistic(pool), len(pool.prompts), draws, seed)
    # Whether a maximum exists is a question about the data, which the penalty of the original hides.
    free = controlled(pool, centred=True, penalty=NONE)(np.ones((1, len(pool.prompts))))
    held = controlled(pool, centred=True, penalty=OFFICIAL)(np.ones((1, len(pool.prompts))))
    return {
        model: Controlled(
            _counted(pool, m, found.estimate(m)), float(held.coefficient[0]), _separated(free, m), pool.models
        )
        for m, model in enumerate(pool.models)
    }


def lc_equal_length(pool: Pool, draws: int = DRAWS, seed: int = 0) -> dict[str, Controlled]:
    """{model: win rate at equal lengths}; no model's number depends on another's."""
    found = bootstrap(lc_equal_length_statistic(pool), len(pool.prompts), draws, seed)
    result = {}
    for m, model in enumerate(pool.models):
        own = controlled(pool.only(model), centred=False, penalty=NONE)(np.ones((1, len(pool.prompts))))
        estimate = _counted(pool, m, found.estimate(m))
        result[model] = Controlled(estimate, float(own.coefficient[0]), _separated(own, 0), (model,))
    return result


def lc_ci_official(pool: Pool, draws: int = 100, seed: int = 0) -> dict[str, Estimate]:
    """`lc_official` with the interval of the original code: votes resampled, the scale of f kept from the data."""
    point = lc_official_statistic(pool)(np.ones((1, len(pool.prompts))))[0]
    votes = pool.weight.sum(2)[None]
    center, spread = _center_and_spread(votes, pool.surplus)
    rows = resampled_rows(pool, draws, seed)
    found = fit(
        rows.sum(3), (rows * pool.score).sum(3), pool.surplus, center.repeat(draws), spread.repeat(draws), OFFICIAL
    )
    resampled = Bootstrap(len(pool.prompts), point, win_rate(found.log_odds))
    return {
        model: dataclasses.replace(resampled.estimate(m), n=int(pool.weight[m].sum()))
        for m, model in enumerate(pool.models)
    }


def _counted(pool: Pool, m: int, estimate: Estimate) -> Estimate:
    return dataclasses.replace(estimate, n=int(pool.counted[m]))


def _separated(found: Fit, m: int) -> bool:
    return bool(max(abs(found.log_odds[0, m]), abs(found.coefficient[0])) > BOUND)
