"""What a build leaves out: responses one by one, and pairs by their margin and texts."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from bnfctl.config import BuildConfig
from bnfctl.data.filters import REASONS, codes, margin_reason, text_reasons


def reasons(texts: list[str], finish: list[str | None] | None = None, rewarded: list[bool] | None = None,
            gate: list[float | None] | None = None, **flags: Any) -> list[str]:  # fmt: skip
    found = codes(
        BuildConfig(input="x", **flags), pa.array(texts, pa.string()), pa.array(finish or [None] * len(texts), pa.string()),
        pa.array(rewarded or [True] * len(texts)), None if gate is None else pa.array(gate, pa.float64()),
    )  # fmt: skip
    return [REASONS[code] for code in found.tolist()]


def test_spaces_and_characters_that_do_not_show_are_empty() -> None:
    blank = ["", " \n\t", "\u00a0\u3000", "\u200b\u2060\ufeff", "\x00\x1b"]
    assert reasons(blank) == ["empty"] * len(blank)
    assert reasons([".", " 0 ", "字", "🙂", "\u0301"]) == [""] * 5
    assert reasons(blank, drop_empty=False) == [""] * len(blank)


def test_length_is_in_characters_and_inclusive() -> None:
    assert reasons(["é" * n for n in (1, 2, 3, 4)], min_chars=2, max_chars=3) == ["length", "", "", "length"]


def test_cut_off_only_where_asked_and_known() -> None:
    texts, finish = ["a", "b", "c"], ["length", "stop", None]
    assert reasons(texts, finish) == ["", "", ""]
    assert reasons(texts, finish, drop_cut=True) == ["cut", "", ""]


def test_a_gate_leaves_out_what_is_outside_and_what_is_unknown() -> None:
    gate = [0.0, 0.5, 1.0, None]
    assert reasons(["x"] * 4, gate=gate, filter_min=0.5) == ["filter", "", "", "filter_no_reward"]
    assert reasons(["x"] * 4, gate=gate, filter_max=0.5) == ["", "", "filter", "filter_no_reward"]
    assert reasons(["x"] * 4, gate=gate, filter_min=0.2, filter_max=0.7) == ["filter", "", "filter", "filter_no_reward"]


def test_each_response_has_one_reason_the_first() -> None:
    found = reasons(
        ["", "", "", "", "x"], finish=["length"] * 5, rewarded=[False, True, True, True, True],
        gate=[None, None, -1.0, 1.0, 1.0], filter_min=0.0, drop_cut=True, min_chars=5,
    )  # fmt: skip
    assert found == ["no_reward", "filter_no_reward", "filter", "empty", "cut"]


@pytest.mark.parametrize(
    ("margin", "least", "most", "expected"),
    [(0.0, 0.0, None, "no_margin"), (0.1, 0.1, None, "no_margin"), (0.2, 0.1, None, None), (0.2, 0.1, 0.2, None),
     (0.3, 0.1, 0.2, "max_margin")],
)  # fmt: skip
def test_margins(margin: float, least: float, most: float | None, expected: str | None) -> None:
    assert margin_reason(margin, least, most) == expected


def test_texts_that_are_too_much_alike() -> None:
    chosen = ["same", "the answer is 4", "abcd", "", "abcdefghij"]
    rejected = ["same", "the answer is 5", "wxyz", "x", "abcdefghXX"]
    assert text_reasons(chosen, rejected, 0.0) == ["identical", None, None, None, None]
    assert text_reasons(chosen, rejected, 0.1) == ["identical", "edit", None, None, None]
    assert text_reasons(chosen, rejected, 0.2) == ["identical", "edit", None, None, None]  # exactly 0.2 is not below
    assert text_reasons(chosen, rejected, 0.21) == ["identical", "edit", None, None, "edit"]
    assert text_reasons(["x"], ["x "], 1.0) == ["edit"]
