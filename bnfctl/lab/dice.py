"""Random choices that stay the same for ever: Python guarantees the sequence of `Random.random` only."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random


def pick(rng: Random, options: Sequence[str]) -> str:
    """One of `options`, all equally likely."""
    return options[int(rng.random() * len(options))]


def pick_weighted(rng: Random, weights: dict[str, float]) -> str:
    """A key of `weights`, with a probability in proportion to its value."""
    threshold = rng.random() * sum(weights.values())
    for name, weight in weights.items():
        threshold -= weight
        if threshold < 0:
            return name
    return name


def between(rng: Random, low: int, high: int) -> int:
    """An integer from `low` to `high`, both included."""
    return low + int(rng.random() * (high - low + 1))
