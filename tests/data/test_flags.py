"""Flags of build that do not go together are refused, with the flag named and something to type."""

from __future__ import annotations

from typing import Any

import pytest

from bnfctl.config import BuildConfig
from bnfctl.data.flags import check
from bnfctl.errors import UsageError

SCORED: list[tuple[dict[str, Any], str]] = [
    ({"top_k": 2}, "--top-k"),
    ({"good": 1.0}, "--good"),
    ({"choose": "all-pairs", "bad": 1.0}, "--bad"),
    ({"scope": "global"}, "--scope"),
    ({"choose": "top-bottom", "length_balance": 0.5}, "--length-balance"),
    ({"choose": "best-random", "length_balance": 0.0}, "--length-balance"),
    ({"choose": "threshold", "good": 1.0, "pairing_ratio": 0.5}, "--pairing-ratio"),
    ({"choose": "threshold", "good": 1.0, "min_margin": 0.5}, "--min-margin"),
    ({"choose": "threshold", "good": 1.0, "min_edit": 0.5}, "--min-edit"),
    ({"choose": "threshold"}, "--choose"),
    ({"choose": "threshold", "good": 0.0, "bad": 0.0}, "--bad"),
    ({"choose": "threshold", "good": 0.0, "bad": 1.0}, "--bad"),
    ({"weights": (1.0, 2.0)}, "--weights"),
    ({"combine": "raw"}, "--combine"),
    ({"also": ("a",), "weights": (1.0,)}, "--weights"),
    ({"also": ("a",), "weights": (0.0, 0.0)}, "--weights"),
    ({"filter_min": 1.0}, "--filter-min"),
    ({"filter": "a"}, "--filter"),
    ({"filter": "a", "filter_min": 2.0, "filter_max": 1.0}, "--filter-min"),
    ({"min_margin": 1.0, "max_margin": 1.0}, "--min-margin"),
    ({"min_chars": 5, "max_chars": 4}, "--min-chars"),
    ({"format": "unpaired"}, "--format"),
    ({"label_column": "thumb"}, "--label-column"),
]
SETS: list[tuple[dict[str, Any], str]] = [
    ({"also": ("a",)}, "--also"),
    ({"choose": "all-pairs"}, "--choose"),
    ({"format": "unpaired", "chosen_column": "best"}, "--chosen-column"),
    ({"format": "preference", "label_column": "thumb"}, "--label-column"),
    ({"filter": "a", "filter_min": 0.0}, "--filter"),
    ({"good": 1.0}, "--good"),
    ({"length_balance": 0.5}, "--length-balance"),
    ({"format": "unpaired", "pairing_ratio": 0.5}, "--pairing-ratio"),
    ({"format": "unpaired", "min_edit": 0.5}, "--min-edit"),
    ({"min_margin": 2.0, "max_margin": 1.0}, "--min-margin"),
]
FINE: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({}, False),
    ({"choose": "top-bottom", "top_k": 3, "max_margin": 1.0}, True),
    ({"choose": "threshold", "bad": -0.5, "max_chars": 9, "drop_cut": True}, True),
    ({"choose": "threshold", "good": 0.5, "bad": -0.5, "scope": "global"}, True),
    ({"also": ("a", "b"), "weights": (1.0, 0.0, -1.0), "combine": "raw"}, True),
    ({"filter": "a", "filter_min": 1.0, "filter_max": 1.0}, True),
    ({"length_balance": 0.0}, True),
    ({"format": "unpaired", "min_chars": 3, "max_chars": 3}, False),
    ({"chosen_column": "good", "min_edit": 0.2, "pairing_ratio": 0.5, "max_margin": 2.0}, False),
]


@pytest.mark.parametrize(
    ("flags", "where", "scored"), [(*case, True) for case in SCORED] + [(*case, False) for case in SETS]
)
def test_what_does_not_apply_is_refused(flags: dict[str, Any], where: str, scored: bool) -> None:
    with pytest.raises(UsageError) as caught:
        check(BuildConfig(input="x", **flags), scored)
    assert caught.value.where == where
    assert caught.value.hint is not None and "--" in caught.value.hint


@pytest.mark.parametrize(("flags", "scored"), FINE)
def test_what_applies_passes(flags: dict[str, Any], scored: bool) -> None:
    check(BuildConfig(input="x", **flags), scored)
