"""WildBench's aggregation: hand tables, groups, the length penalty's boundary."""

from __future__ import annotations

import dataclasses
import math

import pytest

from bnfctl.errors import UsageError
from bnfctl.tasks.paired import bootstrap_difference
from bnfctl.tasks.wildbench_scores import (
    GROUPS,
    MACRO,
    OVERALL,
    Comparison,
    Scored,
    groups_of,
    points,
    reward,
    reward_mix,
    reward_statistic,
    score_statistic,
    summarize_rewards,
    summarize_scores,
)


def test_points() -> None:
    assert [points(score) for score in (1, 5, 10)] == [-80, 0, 100]
    # A published pair: mean 4.738, adjusted -0.525, before the last times 10.
    assert points(4.7375) / 10 == pytest.approx(-0.525)


def test_groups() -> None:
    assert groups_of(["Math", "Data Analysis"]) == {"Math & Data Analysis"}
    assert groups_of(["Planning", "Editing", "Reasoning"]) == {"Planning & Reasoning", "Creative Tasks"}
    assert sum(GROUPS.values()) == 4.75
    with pytest.raises(UsageError, match="no WildBench tag: 'Maths'"):
        groups_of(["Maths"])


SCORED = [
    Scored("s1", 8, 1000, ("Math",)),
    Scored("s2", 6, 2000, ("Coding & Debugging", "Math")),  # in two groups
    Scored("s3", 4, 600, ("Editing",)),
    Scored("s4", 1, 0, ("Math",), whole=False),  # empty: in the overall mean only
    Scored("s5", None, 900, ("Math",)),  # not read: nowhere
]


def test_scores_by_hand() -> None:
    found = summarize_scores(SCORED)
    assert (found.n, found.dropped) == (4, 1)
    assert found.overall.mean == pytest.approx(points((8 + 6 + 4 + 1) / 4))
    means = {group: estimate.mean for group, estimate in found.groups.items()}
    assert means == {"Math & Data Analysis": 40.0, "Coding & Debugging": 20.0, "Creative Tasks": -20.0}
    assert [found.groups[g].n for g in means] == [1, 2, 1]
    assert found.macro.mean == pytest.approx((1.0 * 40 + 1.25 * 20 + 0.5 * -20) / (1.0 + 1.25 + 0.5))
    assert found.length == pytest.approx(1200)
    assert found.overall.low < found.overall.mean < found.overall.high


def test_all_groups_give_the_published_macro_mean() -> None:
    tags = ["Editing", "Reasoning", "Math", "Advice seeking", "Coding & Debugging"]
    items = [Scored(tag, score, 10, (tag,)) for tag, score in zip(tags, (2, 4, 6, 8, 10), strict=True)]
    expected = (0.5 * 2 + 1.25 * 4 + 1.0 * 6 + 0.75 * 8 + 1.25 * 10) / 4.75
    assert summarize_scores(items).macro.mean == pytest.approx(points(expected))


def test_scores_without_tags_have_no_macro_mean() -> None:
    found = summarize_scores([dataclasses.replace(item, tags=()) for item in SCORED])
    assert found.groups == {} and math.isnan(found.macro.mean)
    assert found.overall.mean == pytest.approx(-5)


def test_what_cannot_be_summarized() -> None:
    with pytest.raises(UsageError, match="no judgment could be read"):
        summarize_scores([SCORED[-1]])
    with pytest.raises(UsageError, match="judged twice"):
        summarize_scores([SCORED[0], SCORED[1], SCORED[0]])


@pytest.mark.parametrize(
    ("choice", "model_is_a", "expected"),
    [
        ("A++", True, 1), ("A+", True, 0.5), ("A=B", True, 0), ("B+", True, -0.5), ("B++", True, -1),
        ("A++", False, -1), ("A+", False, -0.5), ("A=B", False, 0), ("B+", False, 0.5), ("B++", False, 1),
    ],
)  # fmt: skip
def test_rewards(choice: str, model_is_a: bool, expected: float) -> None:
    assert reward(Comparison("s", choice, model_is_a, 100, 90)) == expected


@pytest.mark.parametrize("model_is_a", [True, False])
@pytest.mark.parametrize("model_wins", [True, False])
def test_the_length_penalty_starts_at_one_more_than_k(model_is_a: bool, model_wins: bool) -> None:
    """The winner longer by exactly K: a win.  By K + 1: a tie.  A shorter winner and a strong win are never touched."""
    slight, strong = ("A+", "A++") if model_is_a == model_wins else ("B+", "B++")
    sign = 1 if model_wins else -1

    def value(choice: str, longer: int, k: int) -> float:
        lengths = (1000 + longer, 1000) if model_wins else (1000, 1000 + longer)
        return reward(Comparison("s", choice, model_is_a, *lengths), k)

    assert value(slight, 500, 500) == 0.5 * sign
    assert value(slight, 501, 500) == 0
    assert value(strong, 501, 500) == sign
    assert value(slight, -900, 500) == 0.5 * sign
    assert value(slight, 10_000, -1) == 0.5 * sign
    assert (value(slight, 0, 0), value(slight, 1, 0)) == (0.5 * sign, 0)


COMPARED = [
    Comparison("s1", "A+", True, 2000, 900, ("Math",)),  # +0.5, or a tie for K < 1100
    Comparison("s2", "A++", False, 500, 500, ("Math",)),  # -1
    Comparison("s3", "B++", False, 500, 500, ("Editing",)),  # +1
    Comparison("s4", "A++", True, 500, 0, ("Math",), whole=False),  # 0, but divides
    Comparison("s5", None, True, 500, 500, ("Math",)),
]


def test_rewards_by_hand() -> None:
    found = summarize_rewards(COMPARED)
    assert (found.n, found.dropped, found.overall.mean) == (4, 1, pytest.approx(100 * 0.5 / 4))
    assert {g: e.mean for g, e in found.groups.items()} == {"Creative Tasks": 100, "Math & Data Analysis": -25}
    assert found.macro.mean == pytest.approx((0.5 * 100 + 1.0 * -25) / 1.5)
    assert found.length == 1000
    penalised = summarize_rewards(COMPARED, 500)
    assert penalised.overall.mean == 0 and penalised.groups["Math & Data Analysis"].mean == -50
    with pytest.raises(UsageError, match="no choice: 'A'"):
        summarize_rewards([dataclasses.replace(COMPARED[0], choice="A")])


def test_mix_of_references() -> None:
    other = [dataclasses.replace(item, choice="A=B") for item in COMPARED]
    found = reward_mix([COMPARED[:4], other[:4], COMPARED[:4]])
    assert found.mean == pytest.approx(100 * 0.5 / 4 * 2 / 3)
    same = reward_mix([COMPARED[:4]] * 3)
    one = summarize_rewards(COMPARED[:4]).overall
    assert (same.low, same.high) == (pytest.approx(one.low), pytest.approx(one.high))


def test_two_models_on_the_same_sessions() -> None:
    sessions = [str(i) for i in range(100)]
    tags = ["Math", "Editing", "Planning"]
    worse = [Scored(s, 1 + i % 8, 10, (tags[i % 3],)) for i, s in enumerate(sessions)]
    better = [dataclasses.replace(item, score=(item.score or 0) + 1 + i % 2) for i, item in enumerate(worse)]
    first, second = score_statistic(better, sessions), score_statistic(worse, sessions)
    for column in (OVERALL, MACRO):
        found = bootstrap_difference(lambda c, k=column: first(c)[:, k], lambda c, k=column: second(c)[:, k], 100)
        assert found.mean == pytest.approx(30, abs=1) and 25 < found.low < found.high < 35
    rewards = reward_statistic(COMPARED, [item.session_id for item in COMPARED])
    assert rewards([[1.0] * 5])[0, OVERALL] == 12.5
