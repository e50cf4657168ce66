"""Reading ahead and batching by length."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from bnfctl.scorers.windows import BATCHES, batches, windows

LENGTHS = st.lists(st.integers(0, 50), max_size=60)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 120))
def test_batches_hold_the_budget_and_every_index_once(lengths: list[int], budget: int) -> None:
    made = list(batches(lengths, budget))
    assert sorted(index for batch in made for index in batch) == list(range(len(lengths)))
    for batch in made:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    in_order = [lengths[index] for batch in made for index in batch]
    assert in_order == sorted(lengths)


def test_batches_are_as_large_as_the_budget_lets_them() -> None:
    assert [len(batch) for batch in batches([10] * 7, 30)] == [3, 3, 1]
    assert list(batches([5, 1, 5, 1], 10)) == [[1, 3], [0, 2]]


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 5))
def test_windows_keep_the_order(lengths: list[int], budget: int) -> None:
    made = list(windows(lengths, lambda length: length, budget))
    assert [length for window in made for length in window] == lengths
    assert all(sum(window[:-1]) < BATCHES * budget for window in made)
    assert all(sum(window) >= BATCHES * budget for window in made[:-1])


def test_a_window_is_given_out_before_the_next_is_read() -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield 8

    found = windows(items(), lambda length: length, 2)
    assert len(next(found)) == 8
    assert read == 8
