"""Ranks: ties by both rules, the average ranks of the paper's table 4, intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bnfctl.errors import UsageError
from bnfctl.tasks.average_rank import Metric, average_rank, grade_statistic, ranks
from bnfctl.tasks.statistics import Array, Statistic


def test_ties() -> None:
    figures = np.array([3.0, 5.0, 3.0, 1.0])
    assert ranks(figures).tolist() == [2.5, 1, 2.5, 4]
    assert ranks(figures, ties="min").tolist() == [2, 1, 2, 4]
    assert ranks(figures, higher_is_better=False).tolist() == [2.5, 4, 2.5, 1]
    assert ranks(np.ones(5)).tolist() == [3.0] * 5
    missing = ranks(np.array([math.nan, 1.0, 2.0]))
    assert math.isnan(missing[0]) and missing[1:].tolist() == [2, 1]


def constant(figures: list[float]) -> Statistic:
    return lambda counts: np.tile(np.array(figures), (len(counts), 1))


PAPER = {
    "Llama-3": (
        {"Base": 6.00, "SLiC-HF": 6.00, "DPO": 3.75, "IPO": 3.75, "KTO": 4.13, "ORPO": 3.88, "SimPO": 5.25, "BNF": 2.88},
        [
            [1131, 1142, 1155, 1146, 1139, 1149, 1149, 1153], [29.2, 33.2, 39.5, 36.1, 34.7, 36.2, 37.2, 37.5],
            [33.9, 49.1, 60.4, 50.1, 45.4, 49.6, 52.2, 54.8], [36.1, 46.3, 62.2, 51.3, 45.8, 49.2, 52.5, 52.1],
            [78.5, 66.6, 70.5, 79.9, 78.8, 74.8, 56.6, 77.0], [6.8, 8.3, 8.5, 9.2, 10.0, 9.3, 6.0, 9.3],
            [38.1, 33.9, 31.8, 39.2, 38.9, 34.5, 32.6, 35.4], [62.4, 61.4, 56.4, 59.8, 63.7, 63.5, 55.0, 61.4],
        ],
    ),
    "Gemma-2": (
        {"Base": 3.25, "DPO": 1.75, "SimPO": 3.13, "BNF": 1.50},
        [
            [1160, 1181, 1181, 1186], [42.7, 53.2, 53.3, 53.2], [54.9, 77.3, 72.6, 77.5], [54.5, 81.3, 75.4, 80.8],
            [87.9, 88.5, 87.7, 88.0], [19.9, 20.2, 18.2, 21.8], [44.6, 44.3, 41.4, 45.3], [72.7, 72.8, 72.6, 72.7],
        ],
    ),
}  # fmt: skip
"""Table 4 of the paper: average ranks, and the eight columns they come from."""


@pytest.mark.parametrize("base", PAPER)
def test_average_ranks_of_the_paper(base: str) -> None:
    """The paper gives tied methods the best of their places."""
    published, columns = PAPER[base]
    metrics = [Metric(str(i), constant(column), 10) for i, column in enumerate(columns)]
    found = average_rank(list(published), metrics, ties="min", draws=10)
    for method, average in published.items():
        # The paper rounds halves up: 2.875 is 2.88.
        assert math.floor(found[method].average.mean * 100 + 0.5) / 100 == average, method
        assert found[method].average.n == 8


def test_ranks_per_metric_and_direction() -> None:
    found = average_rank(
        ["a", "b"], [Metric("acc", constant([0.4, 0.6]), 5), Metric("no answer", constant([0.1, 0.2]), 5, "", False)]
    )
    assert found["a"].ranks == {"acc": 2.0, "no answer": 1.0}
    assert found["a"].average.mean == found["b"].average.mean == 1.5


def test_figures_may_be_ranked_as_printed() -> None:
    shown = Metric("acc", constant([0.61441, 0.61438]), 5, decimals=3)
    assert average_rank(["a", "b"], [shown])["a"].ranks == {"acc": 1.5}


def test_intervals_tell_a_clear_order_from_a_toss_up() -> None:
    source = np.random.default_rng(2)
    grades = (source.random((3, 400)) < np.array([[0.8], [0.5], [0.5]])) * 1.0
    found = average_rank(["good", "x", "y"], [Metric("acc", grade_statistic(grades), 400)])
    assert (found["good"].average.low, found["good"].average.high) == (1, 1)
    assert (found["x"].average.low, found["x"].average.high) == (2, 3)


def test_intervals_of_the_average_rank_by_simulation() -> None:
    """2 equal methods, 3 metrics of 100 items, 150 tables (seed 4): the true average rank, 1.5, is in the interval."""
    source = np.random.default_rng(4)
    covered = 0
    for seed in range(150):
        grades = (source.random((3, 2, 100)) < 0.5) * 1.0
        metrics = [Metric(str(i), grade_statistic(each), 100) for i, each in enumerate(grades)]
        found = average_rank(["a", "b"], metrics, draws=200, seed=seed)["a"].average
        covered += found.low <= 1.5 <= found.high
    assert covered / 150 >= 0.93


def test_metrics_of_the_same_items_are_resampled_together() -> None:
    drawn: dict[str, list[Array]] = {}

    def spy(name: str) -> Statistic:
        def of(counts: Array) -> Array:
            drawn.setdefault(name, []).append(counts)
            return np.ones((len(counts), 2))

        return of

    metrics = [Metric("wr", spy("wr"), 50, "arena"), Metric("lc", spy("lc"), 50, "arena"), Metric("x", spy("x"), 50)]
    average_rank(["a", "b"], metrics, draws=20)
    np.testing.assert_array_equal(drawn["wr"][1], drawn["lc"][1])
    assert not np.array_equal(drawn["wr"][1], drawn["x"][1])


def test_items_without_a_grade_are_left_out() -> None:
    grades = np.array([[1.0, np.nan, 0.0], [1.0, 1.0, np.nan]])
    assert grade_statistic(grades)(np.ones((1, 3)))[0].tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("metrics", "what"),
    [
        ([Metric("acc", constant([1.0]), 5)], "1 figures for 2 methods"),
        ([Metric("wr", constant([1, 2]), 5, "arena"), Metric("lc", constant([1, 2]), 6, "arena")], "has 5"),
    ],
)
def test_metrics_that_do_not_fit(metrics: list[Metric], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        average_rank(["a", "b"], metrics, draws=10)
