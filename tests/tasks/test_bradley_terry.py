"""Bradley-Terry: known values, equality with the mean against one baseline, recovery, missing maxima."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bnfctl.tasks.bradley_terry import BOUND, elo, ratings, unbounded, wins_of


def test_two_players_by_hand() -> None:
    wins = np.array([[0.0, 743], [257, 0]])
    found = ratings(wins[None])[0]
    assert 1 / (1 + math.exp(found[1] - found[0])) == pytest.approx(0.743, abs=1e-9)
    # 10 to 1 is 400 points
    assert elo(ratings(np.array([[[0.0, 10], [1, 0]]])), anchor=1)[0] == pytest.approx([1400, 1000], abs=1e-5)
    assert elo(found).mean() == pytest.approx(1000)


def test_the_fit_against_one_baseline_is_the_mean() -> None:
    """Player 0 is the baseline of 6 models with random weighted votes and ties, as in Arena-Hard."""
    source = np.random.default_rng(1)
    votes: list[tuple[int, int, float]] = []
    means = []
    for model in range(1, 7):
        scores = source.choice([0.0, 0.5, 1.0], 300, p=[0.5 - 0.06 * model, 0.1, 0.4 + 0.06 * model])
        weights = source.choice([1, 3], 300)
        votes += [(model, 0, s) for s, w in zip(scores.tolist(), weights.tolist(), strict=True) for _ in range(w)]
        means.append((scores * weights).sum() / weights.sum())
    found = ratings(wins_of(votes, 7)[None])[0]
    np.testing.assert_allclose(1 / (1 + np.exp(found[0] - found[1:])), means, atol=1e-9)


def test_likelihood_equations_hold() -> None:
    """At the maximum every player has won as many votes as the model expects; several data sets at once."""
    wins = np.random.default_rng(2).integers(1, 30, (5, 4, 4)) * 1.0
    wins[:, range(4), range(4)] = 0
    found = ratings(wins)
    chance = 1 / (1 + np.exp(found[:, None, :] - found[:, :, None]))
    expected = ((wins + wins.transpose(0, 2, 1)) * chance).sum(2)
    np.testing.assert_allclose(expected, wins.sum(2), rtol=1e-7)
    np.testing.assert_allclose(found.mean(1), 0, atol=1e-9)
    np.testing.assert_allclose(found[2], ratings(wins[2:3])[0], atol=1e-9)


def test_recovery() -> None:
    """5 players 80 points apart, 4,000 games per pair, seed 3."""
    truth = np.array([840.0, 920, 1000, 1080, 1160])
    source = np.random.default_rng(3)
    wins = np.zeros((5, 5))
    for i in range(5):
        for j in range(i):
            won = source.binomial(4000, 1 / (1 + 10 ** ((truth[j] - truth[i]) / 400)))
            wins[i, j], wins[j, i] = won, 4000 - won
    np.testing.assert_allclose(elo(ratings(wins[None]))[0], truth, atol=8)


def test_votes_to_wins() -> None:
    assert wins_of([(0, 1, 1.0), (0, 1, 0.5), (2, 0, 0.0)], 3).tolist() == [[0, 1.5, 1], [0.5, 0, 0], [0, 0, 0]]


def test_no_maximum_is_found_out_and_stopped() -> None:
    chain = np.array([[0.0, 3, 0], [0, 0, 2], [0, 0, 0]])
    ring = chain.copy()
    ring[2, 0] = 1
    apart = np.zeros((4, 4))
    apart[0, 1] = apart[1, 0] = apart[2, 3] = apart[3, 2] = 5
    assert unbounded(chain) and unbounded(apart) and not unbounded(ring)
    assert not unbounded(np.roll(np.eye(9), 1, axis=1))
    found = ratings(chain[None])[0]
    assert np.isfinite(found).all() and np.abs(found).max() <= BOUND and found[0] > found[1] > found[2]
    assert ratings(apart[None])[0] == pytest.approx(0, abs=1e-9)
    assert ratings(np.zeros((1, 3, 3)))[0] == pytest.approx(0)
