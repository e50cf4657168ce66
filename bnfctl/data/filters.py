"""What a build leaves out: single responses by what they are, and pairs by how their sides compare.

Every response, prompt and pair that is left out is counted once, under the first reason that holds.  The names of
the counts, in the order in which they are looked at:

    left_out_no_reward          a response without a reward from every scorer
    left_out_filter_no_reward   a response without a reward in --filter
    left_out_filter             its reward in --filter is outside --filter-min and --filter-max
    left_out_empty              no visible character
    left_out_cut                cut off at max_tokens (--drop-cut)
    left_out_length             shorter than --min-chars or longer than --max-chars
    left_out_between            under `threshold`: neither good nor bad
    dropped_no_reward           a prompt with rewards for fewer than two responses (under `threshold`: for none)
    dropped_too_few             a prompt that has fewer than that after the responses above were left out
    dropped_incomplete          a pair of a set that was read, one of whose sides was left out
    dropped_no_margin           a pair whose margin is not above --min-margin
    dropped_max_margin          a pair whose margin is above --max-margin
    dropped_identical           a pair with twice the same text
    dropped_edit                a pair whose edit distance is below --min-edit
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bnfctl import console
from bnfctl.config import BuildConfig

REASONS = ("", "no_reward", "filter_no_reward", "filter", "empty", "cut", "length")
"""Why a response is left out, by its code; 0 takes part."""

_VISIBLE = r"[^\p{Z}\p{C}]"
"""Neither a space of any kind nor a control or format character."""

Codes = np.ndarray[Any, np.dtype[np.uint8]]


def codes(config: BuildConfig, text: pa.Array, finish: pa.Array, rewarded: pa.Array, gate: pa.Array | None) -> Codes:
    """[C] An index into REASONS per response.

    rewarded: whether it has a reward (True where none is needed); gate: its rewards in --filter, if that was given.
    """
    failed: list[pa.Array] = [pc.invert(rewarded)]
    unknown = pa.scalar(False)
    failed.append(pc.is_null(gate) if gate is not None else unknown)
    failed.append(_outside(gate, config.filter_min, config.filter_max) if gate is not None else unknown)
    failed.append(pc.invert(pc.match_substring_regex(text, _VISIBLE)) if config.drop_empty else unknown)
    failed.append(pc.equal(finish, "length") if config.drop_cut else unknown)
    bounded = config.min_chars > 0 or config.max_chars is not None
    failed.append(_outside(pc.utf8_length(text), config.min_chars, config.max_chars) if bounded else unknown)
    found = np.zeros(len(text), np.uint8)
    for code, mask in reversed(list(enumerate(failed, 1))):  # the first reason is written last
        if mask is not unknown:
            found[pc.fill_null(mask, False).to_numpy(zero_copy_only=False)] = code
    return found


class Endings:
    """Whether any response says how it ended: without that, `--drop-cut` changes nothing, which nobody would see."""

    def __init__(self) -> None:
        self._seen = self._known = 0

    def add(self, finish: pa.Array) -> None:
        """finish: the finish reasons of some responses."""
        self._seen += len(finish)
        self._known += len(finish) - finish.null_count

    def say(self, config: BuildConfig) -> None:
        """After the last response: a line on stderr, if there is reason for one."""
        if config.drop_cut and self._seen and not self._known:
            console.say("no response says how it ended: --drop-cut leaves nothing out")


def _outside(values: pa.Array, low: float | None, high: float | None) -> pa.Array:
    below = pc.less(values, low) if low is not None else pa.scalar(False)
    above = pc.greater(values, high) if high is not None else pa.scalar(False)
    return pc.or_(below, above)


def margin_reason(margin: float, least: float, most: float | None) -> str | None:
    """Why a pair with this margin is dropped; the smallest margin that is kept is above `least`."""
    if margin <= least:
        return "no_margin"
    return "max_margin" if most is not None and margin > most else None


def text_reasons(chosen: Sequence[str], rejected: Sequence[str], min_edit: float) -> list[str | None]:
    """[P] Why pairs with these texts are dropped: "identical", "edit", or None.

    The edit distance is Levenshtein's over characters, as a share of the longer text.  The paper (2.3, and Pal et al.
    2024) finds that losses with a pairwise contrast fail on pairs that are nearly equal.
    """
    same: list[str | None] = ["identical" if a == b else None for a, b in zip(chosen, rejected, strict=True)]
    if not min_edit:
        return same
    from rapidfuzz.distance import Levenshtein

    for number, reason in enumerate(same):
        if reason is None:
            # Beyond the cutoff the answer is 1 at once.
            share = Levenshtein.normalized_distance(chosen[number], rejected[number], score_cutoff=min_edit)
            same[number] = "edit" if share < min_edit else None
    return same
