"""Splits and masks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnfctl.data.pairing import SIDES, kept_sides, split_of, uniform

IDS = [f"p{i}" for i in range(4000)]


def test_uniform_is_uniform_and_depends_on_all_its_arguments() -> None:
    values = [uniform(0, "split", i) for i in IDS]
    assert all(0 <= v < 1 for v in values)
    assert abs(sum(values) / len(values) - 0.5) < 0.02
    assert uniform(0, "a", "x") != uniform(1, "a", "x") != uniform(1, "b", "x") != uniform(1, "b", "y")


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_pairing_ratio_is_the_share_of_pairs(ratio: float) -> None:
    kept = [kept_sides(3, i, ratio) for i in IDS]
    pairs = sum(sides == SIDES for sides in kept) / len(IDS)
    assert abs(pairs - ratio) < 0.03
    singles = [sides[0] for sides in kept if len(sides) == 1]
    if singles:
        assert abs(singles.count("chosen") / len(singles) - 0.5) < 0.05


@given(st.text(), st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 1))
def test_what_is_kept_grows_with_the_ratio(prompt_id: str, seed: int, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert set(kept_sides(seed, prompt_id, low)) <= set(kept_sides(seed, prompt_id, high))


def test_split_is_by_prompt_and_near_its_share() -> None:
    share = sum(split_of(0, i, 0.1) == "test" for i in IDS) / len(IDS)
    assert abs(share - 0.1) < 0.02
    assert all(split_of(0, i, 0.0) == "train" for i in IDS)
    small = {i for i in IDS if split_of(0, i, 0.1) == "test"}
    large = {i for i in IDS if split_of(0, i, 0.3) == "test"}
    assert small <= large, "a larger test split keeps the smaller one's prompts out of training"
