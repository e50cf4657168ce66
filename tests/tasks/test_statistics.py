"""Intervals: known values, coverage by simulation, pairing, clusters, resampling, power."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from bnfctl.tasks import statistics
from bnfctl.tasks.statistics import (
    Z95,
    Estimate,
    bootstrap,
    cluster_bootstrap,
    detectable_difference,
    items_needed,
    mean_interval,
    paired_difference,
    ratio,
    resamples,
    standard_error,
    wilson,
)


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


@pytest.mark.parametrize(("n", "p"), [(100, 0.3), (500, 0.5), (721, 0.08), (1319, 0.785), (2778, 0.62)])
def test_coverage_of_wilson(n: int, p: float) -> None:
    """20,000 simulations each, seed 11: the nominal 95 % covers 93 to 97 %."""
    counts = np.random.default_rng(11).binomial(n, p, 20_000)
    covers = {}
    for successes in set(counts.tolist()):
        found = wilson([1.0] * successes + [0.0] * (n - successes))
        covers[successes] = found.low <= p <= found.high
    assert 0.93 <= np.mean([covers[successes] for successes in counts.tolist()]) <= 0.97


def test_wilson_covers_where_the_normal_interval_does_not() -> None:
    """n = 30, p = 0.97, 4,000 simulations, seed 1: all right 40 % of the time, which leaves the normal one a point."""
    counts = np.random.default_rng(1).binomial(30, 0.97, 4000)
    share: dict[str, float] = {}
    for name, interval in (("wilson", wilson), ("normal", mean_interval)):
        found = {k: interval([1.0] * k + [0.0] * (30 - k)) for k in set(counts.tolist())}
        share[name] = float(np.mean([found[k].low <= 0.97 <= found[k].high for k in counts.tolist()]))
    assert share["wilson"] >= 0.93
    assert share["normal"] < 0.7


def test_clustered_error_by_hand() -> None:
    values, clusters = [1.0, 2.0, 4.0, 5.0], ["a", "a", "b", "b"]
    # deviations -2 -1 | 1 2: sums -3 and 3, so sqrt(18) / 4
    assert standard_error(values, clusters) == pytest.approx(math.sqrt(18) / 4)
    found = mean_interval(values, clusters)
    assert (found.mean, found.high) == (3.0, pytest.approx(3 + Z95 * math.sqrt(18) / 4))
    # Each value its own cluster: the usual error but for n - 1.
    assert standard_error(values, range(4)) == pytest.approx(standard_error(values) * math.sqrt(3 / 4))


def test_clusters_widen_a_paired_difference() -> None:
    policy, base = [1.0, 1.0, 0.0, 0.0] * 25, [0.5] * 100
    pairs = [i // 2 for i in range(100)]
    apart, together = paired_difference(policy, base), paired_difference(policy, base, pairs)
    assert together.mean == apart.mean
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(math.sqrt(2), rel=0.01)


def test_bootstrap_equals_a_loop_over_drawn_items() -> None:
    values, clusters = [0.0, 1.0, 1.0, 3.0, 7.0, 2.0], ["x", "y", "x", "z", "y", "z"]
    drawn = []
    for counts in np.concatenate(list(resamples(3, 2000, 5))):
        sample = [v for v, c in zip(values, clusters, strict=True) for _ in range(int(counts["xyz".index(c)]))]
        drawn.append(sum(sample) / len(sample))
    found = cluster_bootstrap(values, clusters, seed=5)
    assert found.n == 3
    assert found.mean == pytest.approx(14 / 6)
    assert (found.low, found.high) == (
        pytest.approx(np.percentile(drawn, 2.5)),
        pytest.approx(np.percentile(drawn, 97.5)),
    )


def test_resamples_do_not_depend_on_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(resamples(40, 500, 3)))
    monkeypatch.setattr(statistics, "SLICE", 40 * 7)
    slices = list(resamples(40, 500, 3))
    assert len(slices) == 72
    np.testing.assert_array_equal(np.concatenate(slices), whole)
    assert whole.shape == (500, 40) and (whole.sum(1) == 40).all()
    assert cluster_bootstrap([1.0, 2.0, 5.0], seed=1) == cluster_bootstrap([1.0, 2.0, 5.0], seed=1)
    assert not np.array_equal(np.concatenate(list(resamples(40, 500, 4))), whole)


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(2).normal(size=400).tolist()
    normal, resampled = mean_interval(values), cluster_bootstrap(values)
    assert (resampled.high - resampled.low) / (normal.high - normal.low) == pytest.approx(1, abs=0.06)


def test_resamples_where_a_figure_is_undefined_are_left_out() -> None:
    """Only one of three items has a grade: 8 of 27 resamples have none."""
    found = bootstrap(ratio(np.array([0.5, 0, 0]), np.array([1.0, 0, 0])), 3)
    assert 0.25 < np.isnan(found.values).mean() < 0.35
    assert found.estimate() == Estimate(3, 0.5, 0.5, 0.5)
    nothing = bootstrap(ratio(np.zeros(3), np.zeros(3)), 3).estimate()
    assert math.isnan(nothing.mean) and math.isnan(nothing.low) and math.isnan(nothing.high)


def test_power() -> None:
    """A true difference of the detectable size is found 80 % of the time: n = 300, 4,000 simulations, seed 9."""
    error = 1 / math.sqrt(300)
    size = detectable_difference(error)
    assert size == pytest.approx(2.8016 * error, rel=1e-4)
    means = np.random.default_rng(9).normal(size, error, 4000)
    assert (np.abs(means) / error > Z95).mean() == pytest.approx(0.8, abs=0.02)
    assert items_needed(1.0, size) == 300
    assert items_needed(1.0, size / 2) == 1200
