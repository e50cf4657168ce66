"""Two models on the same items: is one better?  Never from two separate intervals.

`difference` for grades and scores, `mcnemar` for right / wrong, `sign_flips` as a check that assumes no distribution,
`bootstrap_difference` for any figure (win rate, length-controlled win rate, Elo), refitted in each resample.
`holm` when there is more than one of them.  Every p-value is two-sided.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bnfctl.tasks.statistics import (
    DRAWS,
    Bootstrap,
    Statistic,
    bootstrap,
    cluster_index,
    detectable_difference,
    paired_difference,
    standard_error,
)

FLIPS = 10_000


@dataclass(frozen=True)
class Difference:
    """First - second over n items (clusters, for the bootstrap), its 95 % interval and p-value."""

    n: int
    mean: float
    low: float
    high: float
    p: float
    standard_error: float
    """NaN where it is not known."""
    detectable: float
    """The smallest true difference that would be found with 80 % power at this standard error."""


def difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> Difference:
    """The mean paired difference with its (clustered) standard error, normal interval and z-test.

    No difference on any item is p = 1; the same nonzero one on every item has no error, and the p of its signs.
    """
    found = paired_difference(first, second, clusters)
    error = standard_error([a - b for a, b in zip(first, second, strict=True)], clusters)
    p = p_of(found.mean, error, found.n if clusters is None else len(set(clusters)))
    return Difference(found.n, found.mean, found.low, found.high, p, error, detectable_difference(error))


def p_of(mean: float, error: float, n: int, degrees: float = math.inf) -> float:
    """The z-test's p, or the t-test's with so many degrees of freedom, but 2^(1 - n) at least.

    The latter is what n equal signs give, and no few items say more than that.
    """
    p = 0.0 if mean else 1.0
    if error > 0 and math.isinf(degrees):
        p = math.erfc(abs(mean) / error / math.sqrt(2))  # 2 cdf(-|z|), which keeps its digits far out
    elif error > 0:
        from scipy.special import stdtr  # 0.1 s, which only several seeds have a use for

        p = 2 * float(stdtr(degrees, -abs(mean) / error))
    return max(p, min(1.0, 2.0 ** (1 - n)))


@dataclass(frozen=True)
class McNemar:
    """Items that only one of the two models got right, and the exact p-value."""

    first_only: int
    second_only: int
    p: float


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """McNemar's exact test (McNemar 1947, binomial form): of the items that differ, is the split even?

    first, second: 0 or 1 each, in the same order.
    """
    b = sum(x > y for x, y in zip(first, second, strict=True))
    c = sum(x < y for x, y in zip(first, second, strict=True))
    # Python's integers: exact for any n, where a float binomial would overflow at 1,030.
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    return McNemar(b, c, min(1.0, 2 * tail / 2 ** (b + c)))


def sign_flips(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    draws: int = FLIPS,
    seed: int = 0,
) -> float:
    """p of the mean difference when the two models' names are exchanged at random, cluster by cluster.

    Exact where there are no more than `draws` ways to do that; else (1 + as extreme ones) / (1 + draws).
    """
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    sums = differences if clusters is None else np.bincount(cluster_index(clusters), weights=differences)
    # Rounding must not make a permutation that is equal to the data look smaller.
    bound = abs(sums.sum()) * (1 - 1e-12) - 1e-12 * np.abs(sums).sum()
    if 2 ** len(sums) <= draws:
        flips = np.array(list(itertools.product((1.0, -1.0), repeat=len(sums))))
        return float((np.abs(flips @ sums) >= bound).mean())
    source, extreme, step = np.random.default_rng(seed), 0, max(1, (1 << 20) // len(sums))
    for done in range(0, draws, step):
        flips = source.integers(0, 2, (min(step, draws - done), len(sums))) * 2.0 - 1
        extreme += int((np.abs(flips @ sums) >= bound).sum())
    return (1 + extreme) / (1 + draws)


def bootstrap_difference(
    first: Statistic, second: Statistic, clusters: int, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """first - second, both refitted on the same resamples of the same clusters: interval, and p by inversion.

    p is twice the share of resamples on the far side of 0, (1 + k) / (1 + draws) each; see `bootstrapped` for k = 0.
    Both statistics give one figure per data set, [b].
    """
    return bootstrapped(bootstrap(lambda counts: first(counts) - second(counts), clusters, draws, seed))


def bootstrapped(found: Bootstrap) -> Difference:
    """The difference whose resamples are known, one figure per data set: interval, and p by inversion.

    Where no resample is on the far side, p is that of a z-test with their standard error, if that is less: how many
    resamples there are is no bound on it, which Holm's correction of many tests would run into.
    """
    values = found.values[~np.isnan(found.values)]
    far = min(int((values <= 0).sum()), int((values >= 0).sum()))
    estimate = found.estimate()
    error = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    p = min(1.0, 2 * (1 + far) / (1 + len(values)))
    if far == 0 and len(values) > 1:
        p = min(p, p_of(estimate.mean, error, found.n))
    p = max(p, min(1.0, 2.0 ** (1 - found.n)))
    return Difference(found.n, estimate.mean, estimate.low, estimate.high, p, error, detectable_difference(error))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values (Holm 1979): below 0.05 holds for all of them together.  In the order given."""
    adjusted, floor = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = floor
    return {name: adjusted[name] for name in p_values}
