"""Length control: the original's regression row by row, recovery of a known effect, refusals, separation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bnfctl.errors import UsageError
from bnfctl.tasks.battles import VERDICTS, Battle, Pool, ci_official, make_pool, win_rate_statistic, win_rates
from bnfctl.tasks.bradley_terry import BOUND
from bnfctl.tasks.length_control import (
    NONE,
    OFFICIAL,
    controlled,
    lc_ci_official,
    lc_equal_length,
    lc_equal_length_statistic,
    lc_official,
    lc_official_statistic,
    win_rate,
)
from bnfctl.tasks.paired import bootstrap_difference
from bnfctl.tasks.statistics import Array


def simulated(prompts: int, longer: list[float], quality: list[float], slope: float, seed: int) -> Pool:
    """Models of known quality (log-odds at equal lengths) whose surplus is N(longer, 0.2); a judge who likes length."""
    source = np.random.default_rng(seed)
    shape = (len(longer), prompts)
    surplus = np.clip(source.normal(np.array(longer)[:, None], 0.2, shape), -0.95, 0.95)
    chance = 1 / (1 + np.exp(-(np.array(quality)[:, None] + slope * surplus)))
    score = (source.random((*shape, 2)) < chance[:, :, None]) * 1.0
    names = tuple(f"m{m}" for m in range(len(longer)))
    return Pool(names, tuple(map(str, range(prompts))), np.ones((*shape, 2)), score, surplus)


def whole(pool: Pool) -> Array:
    return np.ones((1, len(pool.prompts)))


def row_by_row(battles: list[Battle], penalty: float) -> dict[str, float]:
    """The regression of 2024 as it was written down: one row per vote, all rows twice, ties won once and lost once."""
    names = ["baseline", *dict.fromkeys(b.model for b in battles)]
    model_wins = {"A>>B": (0, 3), "A>B": (0, 1), "A=B": (None, 1), "B>A": (1, 1), "B>>A": (1, 3)}
    rows, ratios, winners = [], [], []
    for b in battles:
        won, votes = model_wins[str(b.verdict)]
        if b.game == 2 and won is not None:
            won = 1 - won
        x = np.zeros(len(names))
        x[0], x[names.index(b.model)] = math.log(10), -math.log(10)
        rows += [x] * votes
        ratios += [(b.baseline_length - b.length) / (b.baseline_length + b.length + 1)] * votes
        winners += [None if won is None else 1 - won] * votes
    d = np.array(ratios + ratios)
    X = np.concatenate([np.array(rows + rows), ((d - d.mean()) / d.std())[:, None]], axis=1)
    Y = np.array([1 if w is None else w for w in winners] + [0 if w is None else w for w in winners], float)
    beta = np.zeros(X.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-X @ beta))
        gradient = X.T @ (p - Y) + penalty * beta
        beta = beta - np.linalg.solve((X.T * (p * (1 - p))) @ X + penalty * np.eye(len(beta)), gradient)
    assert np.abs(gradient).max() < 1e-7
    rating = 400 * beta[:-1] + 1000
    return {name: 1 / (1 + 10 ** ((rating[0] - rating[m]) / 400)) for m, name in enumerate(names) if m}


def test_official_fit_equals_the_regression_row_by_row() -> None:
    source = np.random.default_rng(4)
    battles = []
    for m, (model, longer) in enumerate((("a", 1.6), ("b", 1.0), ("c", 0.7))):
        for p in range(60):
            base = int(source.integers(50, 600))
            length = int(base * longer * source.uniform(0.5, 1.8))
            for game in (1, 2):
                liking = source.normal(0.4 * m + (length - base) / 300) * (1 if game == 1 else -1)
                verdict = VERDICTS[int(np.digitize(liking, [-1.2, -0.2, 0.2, 1.2]))]
                battles.append(Battle(str(p), model, game, verdict, length, base))
    pool = make_pool(battles)
    found = lc_official(pool, draws=100)
    expected = row_by_row(battles, 1.0)
    assert {model: each.estimate.mean for model, each in found.items()} == pytest.approx(expected, abs=1e-9)
    # It does correct something here: the long-winded model falls, the terse one rises.
    raw = win_rates(pool, draws=100)
    assert expected["a"] < raw["a"].mean - 0.01 and expected["c"] > raw["c"].mean + 0.01


def test_without_a_length_effect_the_fit_is_the_mean() -> None:
    """All responses as long as the baseline's: nothing to control, so all three are one."""
    pool = simulated(200, [0, 0], [0.5, -0.5], 0, 1)
    pool = Pool(pool.models, pool.prompts, pool.weight, pool.score, np.zeros_like(pool.surplus))
    raw = win_rate_statistic(pool)(whole(pool))
    np.testing.assert_allclose(lc_equal_length_statistic(pool)(whole(pool)), raw, atol=1e-8)
    np.testing.assert_allclose(win_rate(controlled(pool, True, NONE)(whole(pool)).log_odds), raw, atol=1e-8)


def test_the_official_figure_depends_on_the_pool() -> None:
    """500 prompts, a judge who only likes length, surplus 0.3 on average; means over 30 pools, seeds 0 to 29.

    True win rate at equal lengths 50 %, raw about 74 %.  Alone: no correction.  Beside a model of no surplus: half of
    it.  Not centred: all of it.
    """
    figures = []
    for seed in range(30):
        pool = simulated(500, [0.3, 0.0], [0.0, 0.0], 3.9, seed)
        figures.append(
            [
                win_rate_statistic(pool)(whole(pool))[0, 0],
                win_rate(controlled(pool.only("m0"), True, OFFICIAL)(whole(pool)).log_odds)[0, 0],
                lc_official_statistic(pool)(whole(pool))[0, 0],
                lc_equal_length_statistic(pool)(whole(pool))[0, 0],
            ]
        )
    raw, alone, beside, equal = np.mean(figures, 0)
    assert raw == pytest.approx(0.743, abs=0.01)
    assert alone == pytest.approx(0.757, abs=0.01) and alone > raw
    assert beside == pytest.approx(0.632, abs=0.015)
    assert equal == pytest.approx(0.5, abs=0.01)


def test_official_refuses_a_pool_of_one_model() -> None:
    pool = simulated(20, [0.3], [0.0], 1.0, 0)
    for refused in (lc_official, lc_ci_official):
        with pytest.raises(UsageError, match="two models or more; this pool has only m0") as error:
            refused(pool)
        assert "lc_equal_length" in str(error.value.hint)


def test_recovery_of_a_known_effect() -> None:
    """5 models of 5,000 prompts, slope 2.5 per unit of surplus, seed 12: quality at equal lengths within 2.5 points.

    The raw rates are up to 20 points off.
    """
    quality = [-0.8, -0.3, 0.0, 0.4, 0.9]
    pool = simulated(5000, [0.3, -0.2, 0.4, 0.0, -0.3], quality, 2.5, 12)
    truth = 1 / (1 + np.exp(-np.array(quality)))
    np.testing.assert_allclose(lc_equal_length_statistic(pool)(whole(pool))[0], truth, atol=0.025)
    assert np.abs(win_rate_statistic(pool)(whole(pool))[0] - truth).max() > 0.15
    # The joint fit sees each at the pool's mean surplus, a shift of slope * mean for all of them.
    joint = controlled(pool, True, OFFICIAL)(whole(pool))
    np.testing.assert_allclose(joint.log_odds[0], quality + 2.5 * pool.surplus.mean(), atol=0.1)
    assert joint.coefficient[0] == pytest.approx(2.5 * pool.surplus.std(), rel=0.05)


def test_coverage_of_the_controlled_interval() -> None:
    """120 prompts, surplus 0.2, slope 2, quality 0.3: of 200 simulations (seed 30) 92 to 98 % cover."""
    pool = simulated(120, [0.2] * 200, [0.3] * 200, 2.0, 30)
    truth = 1 / (1 + math.exp(-0.3))
    covered = []
    for model in pool.models:
        found = lc_equal_length(pool.only(model), draws=200)[model]
        covered.append(found.estimate.low <= truth <= found.estimate.high)
    assert 0.92 <= np.mean(covered) <= 0.98


def test_the_difference_of_two_models_is_refitted() -> None:
    pool = simulated(300, [0.3, 0.1], [0.8, 0.0], 2.0, 5)
    statistic = lc_official_statistic(pool)
    found = bootstrap_difference(lambda c: statistic(c)[:, 0], lambda c: statistic(c)[:, 1], 300, draws=500)
    points = lc_official(pool, draws=100)
    assert found.mean == pytest.approx(points["m0"].estimate.mean - points["m1"].estimate.mean)
    assert found.low > 0


def test_equal_length_does_not_depend_on_the_pool() -> None:
    pool = simulated(150, [0.3, -0.2, 0.1], [0.0, 0.5, 1.0], 2.0, 6)
    joint, alone = lc_equal_length(pool, draws=200), lc_equal_length(pool.only("m1"), draws=200)
    assert joint["m1"].pool == ("m1",)
    assert joint["m1"].coefficient == pytest.approx(alone["m1"].coefficient)
    assert joint["m1"].estimate.mean == pytest.approx(alone["m1"].estimate.mean)
    assert joint["m1"].estimate.low == pytest.approx(alone["m1"].estimate.low)


def test_a_resample_is_a_fit_of_the_prompts_it_drew() -> None:
    pool = simulated(40, [0.3, -0.2], [0.0, 0.5], 2.0, 7)
    drawn = np.random.default_rng(1).integers(0, 40, 40)
    taken = Pool(pool.models, pool.prompts, pool.weight[:, drawn], pool.score[:, drawn], pool.surplus[:, drawn])
    counts = np.bincount(drawn, minlength=40)[None] * 1.0
    for figure in (lc_official_statistic, lc_equal_length_statistic):
        np.testing.assert_allclose(figure(pool)(counts), figure(taken)(whole(pool)), atol=1e-7)


def test_separation_is_stopped_and_reported() -> None:
    """m0 wins everything, m1 wins exactly where it is longer; m2 is an ordinary model."""
    source = np.random.default_rng(8)
    pool = simulated(100, [0.3, 0.0, 0.1], [0.0, 0.0, 0.0], 1.0, 8)
    score = pool.score.copy()
    score[0] = 1
    score[1] = (pool.surplus[1] > 0)[:, None] * 1.0
    score[2] = source.integers(0, 2, (100, 2))
    pool = Pool(pool.models, pool.prompts, pool.weight, score, pool.surplus)
    found = lc_equal_length(pool, draws=100)
    assert [found[m].separated for m in pool.models] == [True, True, False]
    ceiling = 1 / (1 + math.exp(-BOUND))
    assert found["m0"].estimate.mean == pytest.approx(ceiling)
    assert all(math.isfinite(each.estimate.low) and each.estimate.high <= ceiling for each in found.values())
    official = lc_official(pool, draws=100)
    assert official["m0"].separated and not official["m2"].separated
    assert 0.9 < official["m0"].estimate.mean < 1


def test_one_ratio_everywhere_tells_nothing() -> None:
    pool = simulated(30, [0.3], [0.0], 1.0, 9)
    pool = Pool(pool.models, pool.prompts, pool.weight, pool.score, np.full_like(pool.surplus, 0.25))
    with pytest.raises(UsageError, match="by one ratio"):
        lc_equal_length(pool)


def test_a_model_without_verdicts_has_no_figure() -> None:
    battles = [
        Battle(str(p), m, 1, "B>A" if p % 2 else "A>B", (60, 100, 130)[p % 3], 90)
        for p in range(30)
        for m in ("a", "b")
    ]
    battles += [Battle(str(p), "mute", 1, None, 80 + p, 90) for p in range(30)]
    pool = make_pool(battles)
    for found in (lc_official(pool, draws=50), lc_equal_length(pool, draws=50)):
        assert found["mute"].estimate.n == 0 and math.isnan(found["mute"].estimate.mean)
        assert 0.3 < found["a"].estimate.mean < 0.7
    assert math.isnan(win_rates(pool)["mute"].mean)
    for interval in (ci_official(pool, "2024"), ci_official(pool, "2025"), lc_ci_official(pool)):
        assert interval["mute"].n == 0 and math.isnan(interval["mute"].low)
        assert 0 < interval["a"].low < interval["a"].high < 1


def test_official_interval_of_length_control() -> None:
    """Votes that are independent: as wide as the prompts' own interval; the point is `lc_official`'s."""
    pool = simulated(400, [0.3, 0.0], [0.2, 0.0], 2.0, 10)
    default, official = lc_official(pool)["m0"].estimate, lc_ci_official(pool, draws=400)["m0"]
    assert official.mean == pytest.approx(default.mean)
    assert (official.high - official.low) / (default.high - default.low) == pytest.approx(1, abs=0.15)
    assert official.n == ci_official(pool)["m0"].n == 800
