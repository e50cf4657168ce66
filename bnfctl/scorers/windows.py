"""Reading ahead and batching by length, the one way for every scorer that runs a model here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

BATCHES = 32
"""Batches that are gathered before they are sorted by length."""


def windows(items: Iterable[T], tokens: Callable[[T], int], batch_tokens: int) -> Iterator[list[T]]:
    """`items` in their order, in lists of about BATCHES batches of tokens each; holds one list at a time."""
    window: list[T] = []
    total = 0
    for item in items:
        window.append(item)
        total += tokens(item)
        if total >= BATCHES * batch_tokens:
            yield window
            window, total = [], 0
    if window:
        yield window


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar lengths, shortest first, at most `batch_tokens` padded tokens each (or one)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
