"""Intervals for a mean and for a paired difference, at 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

Z95 = NormalDist().inv_cdf(0.975)


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


def mean_interval(grades: Sequence[float]) -> Estimate:
    """The normal interval of a mean of independent grades (any real numbers); a point for n = 1."""
    n, mean = len(grades), fmean(grades)
    half = Z95 * stdev(grades) / math.sqrt(n) if n > 1 else 0.0
    return Estimate(n, mean, mean - half, mean + half)


def paired_difference(policy: Sequence[float], base: Sequence[float]) -> Estimate:
    """policy - base on the same items, in the same order: the normal interval of the mean of the differences.

    Pairing removes the items' own difficulty, so it is much narrower than the two intervals suggest.
    """
    return mean_interval([a - b for a, b in zip(policy, base, strict=True)])
