"""The rules of --choose, and rewards of several scorers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnfctl.config import BuildConfig
from bnfctl.data import choosing
from bnfctl.data.choosing import all_pairs, best_and_random, combine, label, margin, most_equal, top_and_bottom

REWARDS = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=9)


@pytest.mark.parametrize(
    ("rewards", "k", "expected"),
    [
        ([0.1, 0.9, 0.5], 1, [(1, 0)]),
        ([0.9, 0.1, 0.9, 0.1], 1, [(0, 1)]),  # the first of equals, on both ends
        ([-1.0, 0.0], 1, [(1, 0)]),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 2, [(4, 0), (3, 1)]),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 9, [(4, 0), (3, 1)]),  # the one in the middle is at neither end
        ([2.0, 1.0, 1.0, 1.0], 2, [(0, 2), (1, 3)]),
    ],
)
def test_top_against_bottom(rewards: list[float], k: int, expected: list[tuple[int, int]]) -> None:
    assert top_and_bottom(rewards, k) == expected


@given(REWARDS, st.integers(1, 5))
def test_top_and_bottom_never_overlap_and_margins_shrink(rewards: list[float], k: int) -> None:
    found = top_and_bottom(rewards, k)
    taken = [position for pair in found for position in pair]
    assert len(found) == min(k, len(rewards) // 2)
    assert len(set(taken)) == len(taken)
    margins = [margin(rewards, pair) for pair in found]
    assert margins == sorted(margins, reverse=True) and min(margins) >= 0
    assert margins[0] == max(rewards) - min(rewards)


def test_the_other_one_is_drawn_among_all_others_and_is_never_the_best() -> None:
    rewards = [0.0, 3.0, 1.0, 3.0]
    drawn = [best_and_random(rewards, draw)[0] for draw in (0.0, 0.34, 0.67, 0.999999)]
    assert drawn == [(1, 0), (1, 2), (1, 3), (1, 3)]


def test_the_draw_depends_on_seed_and_prompt_alone() -> None:
    rewards = [5.0, 1.0, 2.0, 3.0, 4.0]

    def found(seed: int) -> list[int]:
        config = BuildConfig(input="x", choose="best-random", seed=seed)
        return [choosing.pairs(config, f"p{i}", rewards, ())[0][1] for i in range(400)]

    assert found(0) == found(0) != found(1)
    counts = [found(0).count(other) for other in (1, 2, 3, 4)]
    assert sum(counts) == 400 and all(70 < count < 130 for count in counts)


@given(REWARDS)
def test_all_pairs_are_every_two_with_the_better_first(rewards: list[float]) -> None:
    found = all_pairs(rewards)
    assert {frozenset(pair) for pair in found} == {
        frozenset((i, j)) for i in range(len(rewards)) for j in range(i) if i != j
    }
    assert len(found) == math.comb(len(rewards), 2)
    assert all(margin(rewards, pair) >= 0 for pair in found)


def test_of_wide_pairs_the_most_equal_in_length() -> None:
    rewards, lengths = [1.0, 0.9, 0.0, 0.3], [100, 40, 10, 39]
    assert most_equal(rewards, lengths, 1.0, 0.0) == [(0, 2)]
    assert most_equal(rewards, lengths, 0.8, 0.0) == [(1, 2)]  # 30 apart rather than 90
    assert most_equal(rewards, lengths, 0.6, 0.0) == [(1, 3)]
    assert most_equal(rewards, lengths, 0.0, 0.65) == [(1, 2)]
    assert most_equal(rewards, lengths, 0.0, 2.0) == [(0, 2)]  # none is above: the widest, to be dropped
    assert most_equal([1.0, 1.0, 0.0], [5, 5, 5], 1.0, 0.0) == [(0, 2)]
    assert most_equal([1.0, 1.0, 0.0, 0.0], [90, 12, 50, 10], 1.0, 0.0) == [(1, 3)]  # all margins are the largest


@given(REWARDS, st.floats(0, 1), st.data())
def test_the_balanced_pair_has_its_share_of_the_margin(rewards: list[float], share: float, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 50), min_size=len(rewards), max_size=len(rewards)))
    (pair,) = most_equal(rewards, lengths, share, 0.0)
    assert margin(rewards, pair) >= share * (max(rewards) - min(rewards))
    if max(rewards) > min(rewards):
        assert margin(rewards, pair) > 0


@pytest.mark.parametrize(
    ("flags", "reward", "mean", "expected"),
    [
        ({"good": 0.2, "bad": -0.2}, 1.0, 0.8, "chosen"),  # 1 - 0.8 is a little under 0.2 in floating point
        ({"good": 0.2, "bad": -0.2}, 0.7, 0.8, None),
        ({"good": 0.2, "bad": -0.2}, 0.6, 0.8, "rejected"),
        ({"good": 0.5, "scope": "global"}, 0.5, 9.0, "chosen"),
        ({"good": 0.5, "scope": "global"}, 0.4, -9.0, None),
        ({"bad": 0.5, "scope": "global"}, 0.5, 0.0, "rejected"),
    ],
)
def test_labels_from_thresholds(flags: dict[str, object], reward: float, mean: float, expected: str | None) -> None:
    config = BuildConfig(input="x", choose="threshold", **flags)  # type: ignore[arg-type]
    assert label(config, reward, mean) == expected


def test_raw_rewards_are_added_with_their_weights() -> None:
    assert combine([[1.0, 2.0], [10.0, 20.0]], (1.0, 0.5), "raw") == [6.0, 12.0]


def test_zscores_make_scorers_of_any_scale_count_alike() -> None:
    first, second = [1.0, 2.0, 3.0], [500.0, -100.0, 200.0]
    made = combine([first, second], (1.0, 1.0), "zscore")
    deviation = math.sqrt(2 / 3)
    expected = [-1 / deviation + 1 / deviation, -1 / deviation, 1 / deviation]  # z of 500, -100, 200 is 1, -1, 0
    assert made == pytest.approx(expected)
    assert combine([[7.0, 7.0], [1.0, 2.0]], (1.0, 1.0), "zscore") == [-1.0, 1.0]


def test_scorers_that_cancel_each_other_leave_no_margin() -> None:
    assert combine([[0.1, 0.7, 0.2], [5.0, -1.0, 4.0]], (1.0, 1.0), "zscore") == [0.0, 0.0, 0.0]
    assert combine([[1e308, -1e308, 0.0], [3e-320, 0.0, 1.5e-320]], (1.0, -1.0), "zscore") == [0.0, 0.0, 0.0]
    assert combine([[1e308, 1.0], [1e308, 1.0]], (1.0, 1.0), "raw") == [None, 2.0]


def test_a_reward_that_is_missing_anywhere_is_missing_and_counts_in_no_mean() -> None:
    assert combine([[1.0, None, 3.0], [0.0, 99.0, 0.0]], (1.0, 1.0), "zscore") == [-1.0, None, 1.0]
    assert combine([[None, None]], (1.0,), "zscore") == [None, None]
    assert combine([[1.0, 2.0], [None, 5.0]], (1.0, 0.0), "raw") == [None, 2.0]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_standardized_has_mean_0_and_deviation_1(values: list[float]) -> None:
    made = choosing.standardized(values)
    spread = max(values) - min(values)
    if spread == 0:
        assert made == [0.0] * len(values)
    elif spread > 1e-3:
        assert abs(math.fsum(made)) < 1e-6
        assert math.fsum(z * z for z in made) / len(made) == pytest.approx(1, rel=1e-6)


def test_equal_values_have_exactly_themselves_as_mean() -> None:
    assert choosing.mean([0.1] * 3) == 0.1
    assert choosing.mean([1.0, 2.0]) == 1.5
