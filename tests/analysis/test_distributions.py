"""Gini coefficients, correlations, intervals and decile bins: closed forms, hand counts, and what must not change them."""

from __future__ import annotations

import math
from collections import Counter
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch

from bnfctl.analysis.distributions import (
    PairedBin,
    gini,
    histogram_bins,
    mean_over_prompts,
    paired_bins,
    pearson,
    same_tokens,
    spearman,
)
from bnfctl.errors import UsageError
from tests import reference

RANDOM = np.random.default_rng(5)


@pytest.mark.parametrize(
    ("values", "found"),
    [([1, 1, 1, 1], 0), ([0, 0, 0, 1], 0.75), ([1, 2, 3, 4], 0.25), ([0, 0], 0), ([7], 0), ([], 0), ([5e-324, 0], 0.5)],
)
def test_gini_in_closed_form(values: list[float], found: float) -> None:
    assert gini(values) == pytest.approx(found, abs=1e-15)
    assert gini(values[::-1]) == gini(values)


def test_gini_is_its_definition_and_knows_no_unit() -> None:
    values = RANDOM.exponential(size=301)
    exact = float(reference.gini(torch.from_numpy(values)))
    assert gini(values) == pytest.approx(exact, abs=1e-12)
    assert gini(values * 1e300) == pytest.approx(exact, abs=1e-12) and gini(values * 1e-300) == pytest.approx(exact)
    assert gini(values, corrected=True) == pytest.approx(exact * 301 / 300)


def test_gini_of_half_normal_numbers() -> None:
    normal = NormalDist()
    quantiles = [normal.inv_cdf(0.5 + (k + 0.5) / 40000) for k in range(20000)]
    assert gini(quantiles) == pytest.approx(math.sqrt(2) - 1, abs=1e-4)


def test_the_correction_makes_one_token_of_all_1() -> None:
    assert [gini([0] * (n - 1) + [3], corrected=True) for n in (2, 5, 90)] == pytest.approx([1, 1, 1])
    assert gini([3], corrected=True) == 0


def test_gini_refuses_signed_shifts() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        gini([0.5, -0.1])


def test_an_interval_over_prompts_of_one_response_is_the_usual_one() -> None:
    grades = [0.3, 0.9, -0.2, 1.4]
    found = mean_over_prompts(grades, ["a", "b", "c", "d"])
    half = 1.959964 * stdev(grades) / 2
    assert (found.n, found.prompts) == (4, 4) and found.mean == pytest.approx(fmean(grades))
    assert (found.low, found.high) == pytest.approx((fmean(grades) - half, fmean(grades) + half))


def test_copies_of_a_response_add_no_certainty() -> None:
    once = mean_over_prompts([0.3, 0.9, -0.2], "abc")
    thrice = mean_over_prompts([0.3, 0.9, -0.2] * 3, "abc" * 3)
    assert (thrice.n, thrice.prompts) == (9, 3)
    assert (thrice.mean, thrice.low, thrice.high) == pytest.approx((once.mean, once.low, once.high))
    point = mean_over_prompts([1.0, 2.0], "aa")
    assert (point.low, point.mean, point.high) == (1.5, 1.5, 1.5)
    for wrong in (([], ""), ([1.0], "ab")):
        with pytest.raises(ValueError, match="numbers of"):
            mean_over_prompts(*wrong)


def test_correlations_by_hand() -> None:
    x, y = [1, 2, 3, 4], [1.0, 4.0, 9.0, 16.0]
    assert pearson(x, y) == pytest.approx(float(np.corrcoef(x, y)[0, 1])) and spearman(x, y) == pytest.approx(1)
    assert pearson(x, [-v for v in x]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: 4.5 / sqrt(4.5 * 5).
    assert spearman([1, 2, 2, 3], [0, 5, 1, 9]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert pearson([1, 1, 1], [1, 2, 3]) is None and spearman([], []) is None and pearson([1], [2]) is None
    with pytest.raises(ValueError, match="correlation of 2 with 1"):
        pearson([1, 2], [1])


def of(bins: list[PairedBin], method: str, field: str) -> list[Any]:
    return [getattr(found, field) for found in bins if found.method == method]


def test_paired_bins_by_hand() -> None:
    dpo = [5.0, -1.0, 3.0, 0.0, -4.0]
    bnf = [1.0, 2.0, 3.0, 4.0, -6.0]
    bins = paired_bins({"dpo": dpo, "bnf": bnf}, by="dpo", bins=2)
    assert of(bins, "dpo", "count") == of(bins, "bnf", "count") == [2, 3]
    assert of(bins, "bnf", "low") == [-4, 0] and of(bins, "bnf", "high") == [-1, 5]
    assert of(bins, "dpo", "mean") == pytest.approx([-2.5, 8 / 3]) and of(bins, "bnf", "mean") == pytest.approx(
        [-2, 8 / 3]
    )
    assert of(bins, "bnf", "share") == pytest.approx([-4 / 4, 8 / 4])
    assert of(bins, "bnf", "absolute_share") == pytest.approx([8 / 16, 8 / 16])
    nothing = paired_bins({"dpo": dpo, "same": [0.0] * 5}, by="dpo", bins=2)
    assert of(nothing, "same", "share") == of(nothing, "same", "absolute_share") == [None, None]


@pytest.mark.parametrize("n", [10, 99, 1000, 1007])
def test_deciles_are_equal_in_count_with_ties_and_without(n: int) -> None:
    for shifts in (RANDOM.normal(size=n), np.zeros(n), RANDOM.integers(-1, 2, n).astype(float)):
        bins = paired_bins({"dpo": shifts}, by="dpo")
        counts = Counter(found.count for found in bins)
        assert sum(count * times for count, times in counts.items()) == n and set(counts) <= {n // 10, n // 10 + 1}
        if n % 10 == 0:
            shares = [found.share for found in histogram_bins({"dpo": shifts}, by="dpo")]
            assert shares == pytest.approx([0.1] * 10, abs=1e-12)


def test_tied_tokens_keep_their_order() -> None:
    other = np.arange(20.0)
    means = of(paired_bins({"dpo": np.zeros(20), "bnf": other}, by="dpo"), "bnf", "mean")
    assert means == pytest.approx(np.arange(10) * 2 + 0.5)
    mixed, many = np.tile([1.0, 0.0], 1000), np.arange(2000.0)
    means = of(paired_bins({"dpo": mixed, "bnf": many}, by="dpo"), "bnf", "mean")
    assert means == [200, 600, 1000, 1400, 1800, 199, 599, 999, 1399, 1799]


def test_paired_bins_refuse_other_tokens() -> None:
    with pytest.raises(ValueError, match="'bnf': 11"):
        paired_bins({"dpo": np.zeros(10), "bnf": np.zeros(11)}, by="dpo")
    with pytest.raises(ValueError, match="9 tokens are too few for 10 bins"):
        paired_bins({"dpo": np.zeros(9)}, by="dpo")


def test_histogram_bins_are_closed_on_the_right() -> None:
    dpo = list(range(1, 11))
    bins = histogram_bins({"dpo": dpo, "bnf": [-50, 1, 1.5, 2, 10, 11, 99, 9.5]}, by="dpo")
    shares = [found.share * 8 for found in bins if found.method == "bnf"]
    assert shares == pytest.approx([2, 2, 0, 0, 0, 0, 0, 0, 0, 4])
    assert [found.low for found in bins[:10]] == [None, *range(1, 10)]
    assert [found.high for found in bins[:10]] == [*range(1, 10), None]


def test_a_method_with_the_same_distribution_has_the_same_shares() -> None:
    """Three quarters of the shifts are exactly 0, so several edges are; other lengths and another order too."""
    dpo = np.concatenate([np.zeros(75), np.arange(-12, 13) * 1.0])
    found = histogram_bins({"dpo": dpo, "bnf": RANDOM.permutation(np.tile(dpo, 3)), "still": np.zeros(7)}, by="dpo")
    for method in ("dpo", "bnf"):
        assert [b.share for b in found if b.method == method] == pytest.approx([0.1] * 10)
    # Of the 76 zeros, ranks 12 to 87, bins 1 and 8 hold 8 each, those between 10 each.
    still = [b.share for b in found if b.method == "still"]
    assert still == pytest.approx([0, *[share / 76 for share in (8, 10, 10, 10, 10, 10, 10, 8)], 0])


def test_a_histogram_needs_tokens() -> None:
    with pytest.raises(ValueError, match="bnf has no tokens"):
        histogram_bins({"dpo": np.arange(10.0), "bnf": []}, by="dpo")


def rows(*found: tuple[str, list[float]]) -> list[dict[str, Any]]:
    return [{"sequence": name, "token_ll": values} for name, values in found]


def test_same_tokens_stand_beside_each_other_whatever_the_order() -> None:
    found = same_tokens({"dpo": rows(("x", [1, 2]), ("y", [3])), "bnf": rows(("y", [30]), ("x", [10, 20]))})
    assert found["dpo"].tolist() == [1, 2, 3] and found["bnf"].tolist() == [10, 20, 30]
    assert same_tokens({"dpo": [], "bnf": []})["bnf"].tolist() == []


def test_own_responses_are_no_paired_tokens() -> None:
    with pytest.raises(UsageError, match="bnf and dpo have only 1 of 2 and 1 responses in common"):
        same_tokens({"dpo": rows(("x", [1])), "bnf": rows(("x", [1]), ("z", [4]))})
