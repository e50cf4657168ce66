"""What a set of shifts is like: how unevenly spread, how correlated, and how one method's lie in another's decile bins.

Plain numbers in, plain numbers out, on the rows that `shifts` writes; imports no torch.  `evaluation.shifting` makes
the figures of a run and figure 4's bins of them: `paired_bins` where all methods were measured on the same responses,
`histogram_bins` where each was measured on its own.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from bnfctl.errors import UsageError

Numbers = np.ndarray[Any, np.dtype[np.float64]]
BINS = 10


def gini(values: Iterable[float], *, corrected: bool = False) -> float:
    """Gini coefficient of non-negative numbers: 0 is evenly spread, (n - 1) / n all on one; 0 where all are 0 or none is.

    G = sum_k (2k - n - 1) g_(k) / (n sum g), g ascending (Gini 1912).  corrected: times n / (n - 1), whose upper end is
    1 for any n, so that short responses compare with long ones.  Raises ValueError for a negative number.
    """
    g = np.sort(_numbers(values))
    n = len(g)
    total = g.sum()
    if n and g[0] < 0:
        raise ValueError("a Gini coefficient is of non-negative numbers")
    if not total:
        return 0.0
    # The largest is taken out, so that neither tiny nor huge numbers leave the range of float64.
    shares = g / g[-1]
    found = float((2 * np.arange(1, n + 1) - n - 1) @ shares / (n * shares.sum()))
    return found * n / (n - 1) if corrected and n > 1 else found


@dataclass(frozen=True)
class PromptMean:
    """A mean over n responses to some prompts, and its 95 % interval."""

    n: int
    prompts: int
    mean: float
    low: float
    high: float


def mean_over_prompts(values: Sequence[float], prompts: Sequence[Hashable]) -> PromptMean:
    """The mean of one number per response, and a normal interval that counts the responses to one prompt as a cluster.

    With C prompts SE^2 = C / (C - 1) / n^2 sum_c (sum_{i in c} (s_i - mean))^2 (arXiv 2411.00640, section 2.2), which is
    the usual standard error where every prompt has one response.  A point for one prompt.
    """
    numbers = _numbers(values)
    cluster = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    n, c = len(numbers), len(cluster)
    if not n or n != len(prompts):
        raise ValueError(f"{n} numbers of {len(prompts)} prompts")
    mean = float(numbers.mean())
    sums = np.bincount([cluster[prompt] for prompt in prompts], weights=numbers - mean)
    error = math.sqrt(c / (c - 1) * float(sums @ sums)) / n if c > 1 else 0.0
    half = NormalDist().inv_cdf(0.975) * error
    return PromptMean(n, c, mean, mean - half, mean + half)


def pearson(x: Iterable[float], y: Iterable[float]) -> float | None:
    """Pearson's correlation; None where one of the two is constant."""
    a, b = _numbers(x), _numbers(y)
    if len(a) != len(b):
        raise ValueError(f"a correlation of {len(a)} with {len(b)} numbers")
    if not len(a) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(a @ b / math.sqrt(float(a @ a) * float(b @ b)), -1, 1))


def spearman(x: Iterable[float], y: Iterable[float]) -> float | None:
    """Spearman's rank correlation, tied numbers at their mean rank; None where one of the two is constant."""
    return pearson(_mean_ranks(_numbers(x)), _mean_ranks(_numbers(y)))


@dataclass(frozen=True)
class PairedBin:
    """One method's shifts on the tokens of one bin."""

    method: str
    bin: int
    """0..bins-1, the most negative shifts of the chosen method first."""
    low: float
    """The smallest shift of the chosen method in this bin, and"""
    high: float
    """its largest."""
    count: int
    mean: float
    share: float | None
    """Of the method's sum over all tokens (which may have either sign); None where that is 0."""
    absolute_share: float | None
    """Of the method's sum of absolute shifts; None where that is 0."""


def same_tokens(
    methods: Mapping[str, Iterable[Mapping[str, Any]]], column: str = "token_ll"
) -> dict[str, Numbers]:  # fmt: skip
    """A per-token column of each method's rows (`shifts.SCHEMA`), token by token beside each other: what R1 needs.

    Rows may come in any order.  Raises UsageError where two methods were measured on different responses.
    """
    found = {method: _by_sequence(rows, column) for method, rows in methods.items()}
    first = next(iter(found), "")
    for method, rows in found.items():
        if rows.keys() != found[first].keys():
            both = len(rows.keys() & found[first].keys())
            what = f"{method} and {first} have only {both} of {len(rows)} and {len(found[first])} responses in common"
            raise UsageError(what, hint="measure all methods on the responses of one file")
    empty = np.zeros(0)
    return {method: np.concatenate([empty, *(rows[key] for key in found[first])]) for method, rows in found.items()}


def paired_bins(shifts: Mapping[str, Iterable[float]], by: str, bins: int = BINS) -> list[PairedBin]:
    """Figure 4, reading R1: every method's shifts on the same tokens, in equal-count bins of the method `by`.

    shifts: method -> one number per token, in the same order for all methods.  Bins are by rank; tied tokens keep their
    order.  Raises ValueError for fewer tokens than bins, or different numbers of tokens.
    """
    numbers = {method: _numbers(values) for method, values in shifts.items()}
    n = len(numbers[by])
    if any(len(values) != n for values in numbers.values()):
        raise ValueError(f"paired bins of { ({method: len(values) for method, values in numbers.items()}) } tokens")
    edges = _edges(n, bins)
    order = np.argsort(numbers[by], kind="stable")
    ranked = numbers[by][order]
    found = []
    for method, values in numbers.items():
        sums, sizes = (np.add.reduceat(part[order], edges[:-1]) for part in (values, np.abs(values)))
        for index in range(bins):
            start, end = int(edges[index]), int(edges[index + 1])
            total, size = float(sums[index]), float(sizes[index])
            shares = _share(total, float(sums.sum())), _share(size, float(sizes.sum()))
            extent = float(ranked[start]), float(ranked[end - 1])
            found.append(PairedBin(method, index, *extent, end - start, total / (end - start), *shares))
    return found


@dataclass(frozen=True)
class HistogramBin:
    """The share of one method's tokens between two decile edges of another."""

    method: str
    bin: int
    low: float | None
    """Above this (None: the first bin is open; for the edge itself see `histogram_bins`), and"""
    high: float | None
    """up to this (None for the last)."""
    share: float


def histogram_bins(shifts: Mapping[str, Iterable[float]], by: str, bins: int = BINS) -> list[HistogramBin]:
    """Figure 4, reading R2: how each method's own tokens fall between the decile edges of the method `by`.

    shifts: method -> one number per token of its own.  Bins are closed on the right, and `by` has the same number of its
    tokens in each.  Where equal shifts of `by` go on over an edge (exact zeros do), an equal shift of another method is
    split like those, so a method with the distribution of `by` has its shares.  Raises ValueError for too few tokens.
    """
    numbers = {method: _numbers(values) for method, values in shifts.items()}
    ranked = np.sort(numbers[by])
    n = len(ranked)
    edges = _edges(n, bins)
    bounds = [None, *ranked[edges[1:-1] - 1].tolist(), None]
    found = []
    for method, values in numbers.items():
        if not len(values):
            raise ValueError(f"{method} has no tokens")
        first = np.minimum(np.searchsorted(ranked, values, side="left"), n - 1)
        beyond = np.maximum(np.searchsorted(ranked, values, side="right"), first + 1)
        # A token is spread evenly over the ranks that `by` has at its shift; where it has none, over the next one above.
        below = [float(np.clip((edge - first) / (beyond - first), 0, 1).mean()) for edge in edges]
        found += [
            HistogramBin(method, index, bounds[index], bounds[index + 1], below[index + 1] - below[index])
            for index in range(bins)
        ]
    return found


def _edges(n: int, bins: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[bins + 1] ranks between which the bins lie, as equal in number as n allows."""
    if n < bins:
        raise ValueError(f"{n} tokens are too few for {bins} bins")
    return np.arange(bins + 1, dtype=np.int64) * n // bins


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _by_sequence(rows: Iterable[Mapping[str, Any]], column: str) -> dict[str, Numbers]:
    """The same response to the same prompt twice (two greedy samples) is one."""
    return {row["sequence"]: _numbers(row[column]) for row in rows}


def _mean_ranks(values: Numbers) -> Numbers:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts + 1) / 2)[inverse]


def _numbers(values: Iterable[float]) -> Numbers:
    return np.asarray(values if hasattr(values, "__len__") else list(values), np.float64)
