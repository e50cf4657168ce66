"""The average rank of methods over many metrics, with an interval: a difference of ranks is often no difference.

    average_rank(methods, [
        Metric("Arena-Hard WR", win_rate_statistic(pool), len(pool.prompts), items="arena-hard"),
        Metric("Arena-Hard LC", lc_official_statistic(pool), len(pool.prompts), items="arena-hard"),
        Metric("GSM8K", grade_statistic(grades), 1319),          # grades [methods, items]
    ])

Each statistic gives one figure per method, [b, M], in the order of `methods`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bnfctl.errors import UsageError
from bnfctl.tasks.statistics import DRAWS, Array, Bootstrap, Estimate, Statistic, bootstrap, ratio

Ties = Literal["average", "min"]
"""What methods with the same figure get: the mean of their places, or the best of them (as in the paper's table 4)."""


@dataclass(frozen=True)
class Metric:
    """One column of the table."""

    name: str
    statistic: Statistic
    """Counts of its items [b, C] -> figures [b, M]."""
    clusters: int
    items: str = ""
    """Metrics of the same items share a name here, and so their resamples; empty: items of its own."""
    higher_is_better: bool = True
    decimals: int | None = None
    """Rank the figures as a table prints them; None: as they are."""


@dataclass(frozen=True)
class Ranked:
    """A method's rank per metric, and their mean over n metrics with its interval."""

    ranks: dict[str, float]
    average: Estimate


def ranks(figures: Array, higher_is_better: bool = True, ties: Ties = "average") -> Array:
    """[..., M] figures -> ranks, 1 the best; NaN stays NaN."""
    mine, others = figures[..., :, None], figures[..., None, :]
    better = (others > mine if higher_is_better else others < mine).sum(-1)
    equal = (others == mine).sum(-1)
    places = better + ((equal + 1) / 2 if ties == "average" else 1.0)
    return np.where(np.isnan(figures), np.nan, places)


def grade_statistic(grades: Array) -> Statistic:
    """The mean grade of each method from grades [M, items]; NaN, an item without a grade, is left out."""
    known = ~np.isnan(grades)
    return ratio(np.where(known, grades, 0.0).T, known.T.astype(np.float64))


def average_rank(
    methods: Sequence[str], metrics: Sequence[Metric], ties: Ties = "average", draws: int = DRAWS, seed: int = 0
) -> dict[str, Ranked]:
    """Each method's ranks and their mean; the interval resamples the items of each metric and ranks all again.

    UsageError for a metric that does not have one figure per method, and for metrics of the same items that differ
    in their number.
    """
    sizes: dict[str, int] = {}
    found: list[Bootstrap] = []
    for metric in metrics:
        items = metric.items or metric.name
        if sizes.setdefault(items, metric.clusters) != metric.clusters:
            raise UsageError(f"{metric.name}: {metric.clusters} items, another metric of {items} has {sizes[items]}")
        figures = bootstrap(metric.statistic, metric.clusters, draws, _seed_of(items, seed))
        if figures.point.shape != (len(methods),):
            raise UsageError(f"{metric.name}: {figures.point.size} figures for {len(methods)} methods")
        found.append(Bootstrap(figures.n, _ranked(metric, figures.point, ties), _ranked(metric, figures.values, ties)))
    average = Bootstrap(
        len(metrics), np.mean([each.point for each in found], 0), np.mean([each.values for each in found], 0)
    )
    return {
        method: Ranked(
            {metric.name: float(each.point[m]) for metric, each in zip(metrics, found, strict=True)},
            average.estimate(m),
        )
        for m, method in enumerate(methods)
    }


def _ranked(metric: Metric, figures: Array, ties: Ties) -> Array:
    shown = figures if metric.decimals is None else np.round(figures, metric.decimals)
    return ranks(shown, metric.higher_is_better, ties)


def _seed_of(items: str, seed: int) -> int:
    """Items of different benchmarks are drawn independently, those of one benchmark together."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{items}".encode()).digest()[:8])
