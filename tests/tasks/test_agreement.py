"""Judges: kappa by known tables, position bias by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bnfctl.errors import UsageError
from bnfctl.tasks.agreement import cohen_kappa, null_share, position_bias
from bnfctl.tasks.battles import VERDICTS, Battle


def test_kappa_of_a_known_table() -> None:
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed 0.7, by chance 0.5, so 0.4."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second, ["yes", "no"]) == pytest.approx(0.4)
    # With two labels every miss is one place off.
    assert cohen_kappa(first, second, ["yes", "no"], "linear") == pytest.approx(0.4)


def test_linear_weights_by_hand() -> None:
    """Pairs aa ab bb bc cc ca: misses 1, 1 and 2 places; by chance, each with sums 2 2 2: 6 * 8 / 9."""
    first, second = list("aabbcc"), list("abbcca")
    assert cohen_kappa(first, second, "abc") == pytest.approx(1 - 3 / 4)
    assert cohen_kappa(first, second, "abc", "linear") == pytest.approx(1 - 4 / (6 * 8 / 9))


def test_near_misses_count_less_with_weights() -> None:
    source = np.random.default_rng(1)
    first = source.integers(0, 5, 500)
    near = np.clip(first + source.integers(-1, 2, 500), 0, 4)
    one, other = ([VERDICTS[i] for i in places] for places in (first, near))
    assert cohen_kappa(one, other, weights="linear") > cohen_kappa(one, other) + 0.2
    assert cohen_kappa(one, one) == 1.0
    shuffled = [VERDICTS[i] for i in source.permutation(first)]
    assert abs(cohen_kappa(one, shuffled)) < 0.1


def test_kappa_without_variation_and_unknown_labels() -> None:
    assert math.isnan(cohen_kappa(["A=B"] * 3, ["A=B"] * 3))
    with pytest.raises(UsageError, match="no label: 'A'"):
        cohen_kappa(["A"], ["A=B"])


def test_position_bias_by_hand() -> None:
    games = {
        "same": ("B>A", "A>>B"),  # the model wins both: nothing changes
        "flip": ("A>B", "A>B"),  # the first shown wins both: flipped
        "half": ("A=B", "A>B"),  # a tie becomes a win: changed only
        "loss": ("A>B", "A=B"),  # a loss becomes a tie: changed only
        "ties": ("A=B", "A=B"),
        "null": ("A>B", None),
    }
    battles = [Battle(p, "m", g + 1, verdict) for p, both in games.items() for g, verdict in enumerate(both)]
    found = position_bias(battles)
    assert (found.n, found.flipped, found.changed) == (5, 0.2, 0.6)
    # games that were no tie: same 0 1, flip 1 1, half 1, loss 1
    assert found.first == pytest.approx(5 / 6)
    assert null_share(battles) == pytest.approx(1 / 12)
    nothing = position_bias([Battle("p", "m", 1, "A>B")])
    assert nothing.n == 0 and math.isnan(nothing.flipped)
    assert math.isnan(position_bias([Battle("p", "m", 1, "A=B"), Battle("p", "m", 2, "A=B")]).first)
