"""Intervals at 95 %: of a share, of a mean, of a paired difference, of any figure by resampling whole clusters.

A *statistic* here takes how often each cluster counts, [b, C], and gives its figure for each of the b data sets,
[b, ...]: ones are the data as they are, other counts are resamples.  So a figure is written once and its interval,
its paired difference and its rank all come from the same lines, with every fit done again in each resample.
Judged tasks resample prompts: two games about one prompt are not two independent votes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Counts of the clusters [b, C] -> the figure of each data set [b, ...]."""

Z95 = NormalDist().inv_cdf(0.975)
DRAWS = 2000
"""Resamples of a percentile interval: enough that its ends move by a few hundredths of its width between seeds."""
SLICE = 1 << 17
"""Cells of counts made at once (1 MiB): a statistic multiplies them by its own dimensions, and cache is small."""


@dataclass(frozen=True)
class Estimate:
    """A mean over n items and its 95 % interval."""

    n: int
    mean: float
    low: float
    high: float


def wilson(grades: Sequence[float]) -> Estimate:
    """Wilson's score interval for a share (E. B. Wilson 1927, eq. 4); right at 0 and 1 too, where the normal one is not.

    grades: 0 or 1 each, at least one.
    """
    n, share = len(grades), fmean(grades)
    center = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return Estimate(n, share, max(0.0, center - half), min(1.0, center + half))


def standard_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> float:
    """The standard error of a mean; 0 for one value.

    With `clusters` (one per value): sqrt(sum over clusters of (sum of their deviations)^2) / n, so values of one
    cluster may depend on each other in any way (E. Miller 2024, "Adding Error Bars to Evals").
    """
    n = len(values)
    if n < 2:
        return 0.0
    if clusters is None:
        return stdev(values) / math.sqrt(n)
    deviations = np.asarray(values, np.float64) - fmean(values)
    sums = np.bincount(cluster_index(clusters), weights=deviations)
    return float(np.sqrt((sums**2).sum())) / n


def mean_interval(grades: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """The normal interval of a mean of grades (any real numbers), independent or in clusters; a point for n = 1."""
    n, mean = len(grades), fmean(grades)
    half = Z95 * standard_error(grades, clusters)
    return Estimate(n, mean, mean - half, mean + half)


def paired_difference(
    policy: Sequence[float], base: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """policy - base on the same items, in the same order: the normal interval of the mean of the differences.

    Pairing removes the items' own difficulty, so it is much narrower than the two intervals suggest.
    """
    return mean_interval([a - b for a, b in zip(policy, base, strict=True)], clusters)


def cluster_index(clusters: Sequence[Hashable]) -> NDArray[np.intp]:
    """0, 1, 2, ... for each item's cluster, numbered by first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], np.intp)


def resamples(clusters: int, draws: int = DRAWS, seed: int = 0) -> Iterator[Array]:
    """Slices [b, clusters] of how often each cluster was drawn, in `draws` draws with replacement of as many.

    The same (clusters, draws, seed) give the same counts whatever the slices are.
    """
    source = np.random.default_rng(seed)
    step = max(1, SLICE // clusters)
    even = np.full(clusters, 1 / clusters)
    for done in range(0, draws, step):
        yield source.multinomial(clusters, even, size=min(step, draws - done)).astype(np.float64)


@dataclass(frozen=True)
class Bootstrap:
    """A statistic on the data, `point` [...], and on the resamples, `values` [draws, ...], of n clusters."""

    n: int
    point: Array
    values: Array

    def estimate(self, index: int | tuple[int, ...] = (), bounds: tuple[float, float] = (2.5, 97.5)) -> Estimate:
        """Point and percentile interval of one entry; resamples in which it is undefined (NaN) are left out."""
        point, values = float(self.point[index]), np.moveaxis(self.values, 0, -1)[index]
        values = values[~np.isnan(values)]
        if not len(values):
            return Estimate(self.n, point, math.nan, math.nan)
        low, high = np.percentile(values, bounds)
        return Estimate(self.n, point, float(low), float(high))


def bootstrap(statistic: Statistic, clusters: int, draws: int = DRAWS, seed: int = 0) -> Bootstrap:
    """Any statistic over `clusters` clusters, resampled whole (percentile bootstrap; Efron and Tibshirani 1993, 13)."""
    point = statistic(np.ones((1, clusters)))[0]
    return Bootstrap(
        clusters, point, np.concatenate([statistic(counts) for counts in resamples(clusters, draws, seed)])
    )


def ratio(top: Array, bottom: Array) -> Statistic:
    """The statistic sum(top) / sum(bottom), both [C, ...] per cluster: a mean, weighted or not; 0 / 0 is NaN."""

    def of(counts: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.tensordot(counts, top, 1) / np.tensordot(counts, bottom, 1)

    return of


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> tuple[Statistic, int]:
    """The mean of values as a statistic, and how many clusters it has (every value its own without `clusters`)."""
    if clusters is None:
        return ratio(np.asarray(values, np.float64), np.ones(len(values))), len(values)
    index = cluster_index(clusters)
    sums = np.bincount(index, weights=np.asarray(values, np.float64)).astype(np.float64)
    return ratio(sums, np.bincount(index).astype(np.float64)), len(sums)


def cluster_bootstrap(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """The mean of `values` and its interval by resampling whole clusters: the default for judged tasks."""
    statistic, count = clustered_mean(values, clusters)
    return bootstrap(statistic, count, draws, seed).estimate()


def detectable_difference(error: float, power: float = 0.8, t95: float = Z95) -> float:
    """The smallest true difference that a two-sided 5 % test finds with `power`, given the standard error it has.

    t95: how many standard errors the test asks for.
    """
    return (t95 + NormalDist().inv_cdf(power)) * error


def items_needed(variance: float, difference: float, power: float = 0.8) -> int:
    """How many items (clusters) find `difference` with `power`; variance: of one item's paired difference."""
    needed = (Z95 + NormalDist().inv_cdf(power)) ** 2 * variance / difference**2
    return math.ceil(round(needed, 6))  # a whole number that rounding put just above itself
