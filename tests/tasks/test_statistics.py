"""Intervals: known values, coverage by simulation, pairing."""

from __future__ import annotations

import math
import random

import pytest

from bnfctl.tasks.statistics import Z95, mean_interval, paired_difference, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (81, 263, 0.25527, 0.36622)],
)
def test_wilson_known_values(successes: int, n: int, low: float, high: float) -> None:
    found = wilson([1.0] * successes + [0.0] * (n - successes))
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)
    assert (found.n, found.mean) == (n, successes / n)


def test_wilson_solves_its_own_equation() -> None:
    found = wilson([1.0] * 30 + [0.0] * 70)
    for bound in (found.low, found.high):
        assert abs(0.3 - bound) == pytest.approx(Z95 * math.sqrt(bound * (1 - bound) / 100), rel=1e-9)


def test_coverage_of_the_paired_interval() -> None:
    """n = 200 items with their own difficulty, true gain 0.1, 2,000 simulations, seed 7: about 95 % cover."""
    rng = random.Random(7)
    covered = 0
    for _ in range(2000):
        items = [rng.uniform(0.2, 0.7) for _ in range(200)]
        base = [float(rng.random() < p) for p in items]
        policy = [float(rng.random() < p + 0.1) for p in items]
        found = paired_difference(policy, base)
        covered += found.low <= 0.1 <= found.high
    assert 0.93 <= covered / 2000 <= 0.97


def test_pairing_narrows_the_interval() -> None:
    rng = random.Random(0)
    base = [rng.random() for _ in range(300)]
    policy = [value + 0.05 + rng.gauss(0, 0.01) for value in base]
    paired = paired_difference(policy, base)
    assert paired.mean == pytest.approx(0.05, abs=0.005)
    assert paired.high - paired.low < (mean_interval(base).high - mean_interval(base).low) / 10


def test_one_item_and_unequal_lengths() -> None:
    assert mean_interval([0.5]).low == 0.5
    with pytest.raises(ValueError, match="argument 2 is longer"):
        paired_difference([1.0], [1.0, 0.0])
