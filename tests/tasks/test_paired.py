"""Tests of two models on the same items: hand counts, error rates by simulation, several at once."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bnfctl.tasks.paired import bootstrap_difference, difference, holm, mcnemar, sign_flips
from bnfctl.tasks.statistics import Array, clustered_mean, mean_interval


def test_mcnemar_known_values() -> None:
    first = [1.0] * 10 + [0.0] * 2 + [1.0] * 50 + [0.0] * 7
    second = [0.0] * 10 + [1.0] * 2 + [1.0] * 50 + [0.0] * 7
    found = mcnemar(first, second)
    # 2 (C(12,0) + C(12,1) + C(12,2)) / 2^12
    assert (found.first_only, found.second_only, found.p) == (10, 2, 2 * (1 + 12 + 66) / 4096)
    assert mcnemar(second, first).p == found.p
    assert mcnemar([1.0, 0.0], [1.0, 0.0]).p == 1.0
    assert mcnemar([1.0, 0.0], [0.0, 1.0]).p == 1.0


def test_mcnemar_is_exact_for_many_items() -> None:
    found = mcnemar([1.0] * 1100 + [0.0] * 1000, [0.0] * 1100 + [1.0] * 1000)
    z = (100 - 1) / math.sqrt(2100)  # with the continuity correction
    assert found.p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_difference_by_hand() -> None:
    found = difference([3.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    # differences 2 0 1: mean 1, sd 1, error 1 / sqrt(3), z = sqrt(3)
    assert found.mean == 1.0
    assert found.p == 0.25  # erfc(sqrt(3 / 2)) is 0.08, which three items cannot say
    mixed = difference([3.0, 2.0, 3.0], [1.0, 2.0, 4.0])  # 2 0 -1: mean 1/3, sd sqrt(7/3), z = 1 / sqrt(7)
    assert mixed.p == pytest.approx(math.erfc(math.sqrt(1 / 14)))
    assert (found.low, found.high) == (mean_interval([2.0, 0.0, 1.0]).low, mean_interval([2.0, 0.0, 1.0]).high)
    assert found.detectable == pytest.approx(2.8016 / math.sqrt(3), rel=1e-4)
    assert difference([0.5, 0.5], [0.5, 0.5]).p == 1.0
    assert difference([0.6, 0.6], [0.5, 0.5]).p == 0.5  # two equal signs
    assert difference([0.6] * 9, [0.5] * 9).p == 2**-8
    assert difference([0.6] * 9, [0.5] * 9, list("aaabbbccc")).p == 0.25
    assert difference([0.6], [0.5]).p == 1.0


def test_interval_and_p_agree() -> None:
    source = np.random.default_rng(3)
    for _ in range(200):
        first, second = source.normal(0.2, 1, 60).tolist(), source.normal(0, 1, 60).tolist()
        found = difference(first, second, [i // 2 for i in range(60)])
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_sign_flips_by_hand() -> None:
    assert sign_flips([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5) == 2 / 32
    # |sum| >= 4 of +-1 +-2 +-3: 6 and 4, and their mirrors
    assert sign_flips([-1.0, 2.0, 3.0], [0.0] * 3) == 4 / 8
    assert sign_flips([0.3, 0.3], [0.3, 0.3]) == 1.0
    # Two clusters of two flip together.
    assert sign_flips([1.0, 1.0, 1.0, 1.0], [0.0] * 4, ["a", "a", "b", "b"]) == 2 / 4


def test_sampled_sign_flips_agree_with_all_of_them() -> None:
    first = np.random.default_rng(4).normal(0.5, 1, 14).tolist()
    exact = sign_flips(first, [0.0] * 14, draws=2**14)
    assert 0.005 < exact < 0.5
    assert sign_flips(first, [0.0] * 14, draws=10_000) == pytest.approx(exact, abs=0.02)
    assert sign_flips(first * 10, [0.0] * 140, draws=500, seed=1) >= 1 / 501


def test_sign_flips_hold_their_level_in_clusters() -> None:
    """No difference, 30 prompts of 2 equal games, 1,000 simulations, seed 6: 5 % reject; without clusters far more."""
    source = np.random.default_rng(6)
    clusters = [i // 2 for i in range(60)]
    rejected = np.zeros(2)
    for seed in range(1000):
        games = source.normal(size=30).repeat(2).tolist()
        rejected += [
            sign_flips(games, [0.0] * 60, clusters, 200, seed) < 0.05,
            sign_flips(games, [0.0] * 60, None, 200, seed) < 0.05,
        ]
    assert 30 <= rejected[0] <= 70
    assert rejected[1] > 120


def test_bootstrap_difference_is_paired() -> None:
    source = np.random.default_rng(5)
    skill = source.normal(size=200)
    first, second = skill + 0.1 + source.normal(0, 0.2, 200), skill + source.normal(0, 0.2, 200)
    one, other = clustered_mean(first.tolist())[0], clustered_mean(second.tolist())[0]
    found = bootstrap_difference(one, other, 200)
    closed = difference(first.tolist(), second.tolist())
    assert found.mean == pytest.approx(closed.mean)
    assert found.high - found.low == pytest.approx(closed.high - closed.low, rel=0.08)
    assert found.detectable == pytest.approx(closed.detectable, rel=0.08)
    assert found.p < 0.01
    assert bootstrap_difference(one, one, 200).p == 1.0
    first = skill - 0.02 + source.normal(0, 0.2, 200)
    closed = difference(first.tolist(), second.tolist())
    assert 0.05 < closed.p < 0.8
    assert bootstrap_difference(clustered_mean(first.tolist())[0], other, 200).p == pytest.approx(closed.p, rel=0.15)
    assert bootstrap_difference(other, one, 200).mean == -found.mean


def test_a_bootstrap_that_never_crosses_zero_has_the_p_of_its_error() -> None:
    """200 items with z near 7: 2 / 2001 would be a bound that Holm's correction of 60 tests cannot pass."""
    source = np.random.default_rng(3)
    first = source.normal(0.5, 1, 200)
    found = bootstrap_difference(clustered_mean(first.tolist())[0], lambda counts: np.zeros(len(counts)), 200)
    closed = difference(first.tolist(), [0.0] * 200)
    assert found.p < 1e-6 and math.log(found.p) == pytest.approx(math.log(closed.p), rel=0.1)
    few = bootstrap_difference(clustered_mean([1.0, 2.0, 1.5])[0], lambda counts: np.zeros(len(counts)), 3)
    assert few.p == 0.25, "three prompts"
    one = bootstrap_difference(lambda counts: np.ones(len(counts)), lambda counts: np.zeros(len(counts)), 1)
    assert one.p == 1.0


def test_bootstrap_difference_refits() -> None:
    """A figure that is no mean: the ratio of two sums, computed anew for each resample."""
    values = np.random.default_rng(8).uniform(1, 2, (2, 50))
    calls: list[int] = []

    def figure(counts: Array) -> Array:
        calls.append(len(counts))
        return (counts @ values[0]) / (counts @ values[1])

    found = bootstrap_difference(figure, lambda counts: np.ones(len(counts)), 50, draws=300)
    assert sum(calls) == 301
    assert found.mean == pytest.approx(values[0].sum() / values[1].sum() - 1)


def test_holm() -> None:
    found = holm({"gsm8k": 0.01, "crux": 0.04, "mmlu": 0.03, "math": 0.005})
    assert found == {
        "gsm8k": pytest.approx(0.03),
        "crux": pytest.approx(0.06),
        "mmlu": pytest.approx(0.06),
        "math": pytest.approx(0.02),
    }
    assert list(found) == ["gsm8k", "crux", "mmlu", "math"]
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_a_p_value_keeps_its_digits_far_out() -> None:
    """z is 20: the normal tail has 5.5e-89 there, which 1 - Phi(z) would round to 0."""
    first = [1.0 + (-1) ** n * math.sqrt(99 / 100) / 2 for n in range(100)]
    assert difference(first, [0.0] * 100).p == pytest.approx(5.507e-89, rel=1e-3)
