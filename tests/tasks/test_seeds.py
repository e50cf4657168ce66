"""Training seeds: errors of items and seeds together, and what their intervals cover by simulation."""

from __future__ import annotations

import math
from statistics import stdev

import numpy as np
import pytest

from bnfctl.tasks.paired import p_of
from bnfctl.tasks.seeds import error_of, mean_over_seeds, over_seeds
from bnfctl.tasks.statistics import Z95, Estimate


def test_over_seeds() -> None:
    found = over_seeds([0.5, 0.6, 0.7])
    assert (found.n, found.mean, found.sd) == (3, pytest.approx(0.6), pytest.approx(0.1))
    assert found.variance == pytest.approx(0.1**2 / 3)
    assert math.isnan(over_seeds([0.5]).sd)


def test_the_items_are_shared_and_three_seeds_shrink_the_seeds_noise_only() -> None:
    error = error_of(0.03, [over_seeds([0.5, 0.6, 0.7])])
    assert error.size == pytest.approx(math.sqrt(0.03**2 + 0.1**2 / 3))
    assert error.degrees == pytest.approx(2 * (error.size**2 / (0.1**2 / 3)) ** 2)


def test_without_items_it_is_student_and_welch() -> None:
    """By the tables: t(0.975) is 12.706 with one degree of freedom, 4.303 with two."""
    two, three = over_seeds([1.0, 2.0]), over_seeds([1.0, 2.0, 3.0])
    assert error_of(0, [two]).t95 == pytest.approx(12.706, abs=1e-3)
    assert error_of(0, [three]).t95 == pytest.approx(4.303, abs=1e-3)
    both = error_of(0, [two, three])
    assert both.degrees == pytest.approx((0.25 + 1 / 3) ** 2 / (0.25**2 / 1 + (1 / 3) ** 2 / 2))
    assert p_of(both.t95 * both.size, both.size, 100, both.degrees) == pytest.approx(0.05)
    assert p_of(1.0, 0.5, 100, 1.0) == pytest.approx(1 - 2 * math.atan(2) / math.pi), "Cauchy's"


def test_seeds_that_agree_leave_the_items_interval() -> None:
    each = [Estimate(20, 0.95, 0.76, 0.99)] * 2
    found, spread = mean_over_seeds(each)
    assert found == Estimate(20, 0.95, pytest.approx(0.76), pytest.approx(0.99)) and spread.sd == 0
    assert error_of(0.1, [spread]).t95 == Z95


@pytest.mark.parametrize(
    ("seeds", "least"), [(2, (0.94, 0.94, 0.93, 0.86)), (3, (0.94, 0.94, 0.94, 0.91)), (5, (0.94, 0.94, 0.94, 0.93))]
)
def test_coverage(seeds: int, least: tuple[float, ...]) -> None:
    """Nominal 95 %, n = 3,000 each (sd 0.004 to 0.006), seed 17; the seeds' sd is 0, 1/2, 1 and 5 errors of the items."""
    rng = np.random.default_rng(17)
    for ratio, bound in zip((0.0, 0.5, 1.0, 5.0), least, strict=True):
        scores = rng.normal(0, 1, (3000, 1)) + rng.normal(0, 1, (3000, seeds)) * ratio
        covered = 0
        for mine in scores.tolist():
            found, _ = mean_over_seeds([Estimate(1, score, score - Z95, score + Z95) for score in mine])
            covered += found.low <= 0 <= found.high
        assert bound <= covered / 3000 <= 0.965, (seeds, ratio)


def test_the_interval_of_several_seeds_has_their_spread() -> None:
    scores = [40.0, 44.0, 48.0]
    found, spread = mean_over_seeds([Estimate(9, score, score - 2, score + 2) for score in scores])
    error = error_of(2 / Z95, [spread])
    assert spread.sd == stdev(scores) and found.high - found.mean == pytest.approx(error.t95 * error.size)
    assert error.t95 > Z95
