"""Records from a ready preference or feedback set: the same filters, masks and splits as for scored candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from bnfctl.config import BuildConfig
from bnfctl.data import filters, pairing
from bnfctl.data.imports import Found

_BATCH = 1024
"""Records that are Python objects at one time."""


def records(config: BuildConfig, found: Iterable[Found], counts: Counter[str]) -> Iterator[pa.Table]:
    """Tables of pairing.SCHEMA; `counts` gets rows (records of the set) and what was left out (see filters).

    A set's labels are taken at their word: a pair without a margin is dropped only where `--min-margin` asks for one
    and both rewards are known.
    """
    rest, endings = islice(found, config.limit), filters.Endings()
    while batch := list(islice(rest, _BATCH)):
        counts["rows"] += len(batch)
        yield pa.Table.from_pylist(list(_rows(config, batch, counts, endings)), schema=pairing.SCHEMA)
    endings.say(config)


def _rows(
    config: BuildConfig, batch: Sequence[Found], counts: Counter[str], endings: filters.Endings
) -> Iterator[dict[str, Any]]:
    keeps = _keeps(config, batch, counts, endings)
    whole = []
    for one in batch:
        kept = [next(keeps) for _ in one.sides]
        if all(kept):
            whole.append(one)
        elif len(kept) == 2:
            counts["dropped_incomplete"] += 1
    pairs = [one for one in whole if len(one.sides) == 2]
    chosen, rejected = ([_text(one, side) for one in pairs] for side in pairing.SIDES)
    alike = iter(filters.text_reasons(chosen, rejected, config.min_edit))
    for one in whole:
        reason = (_margin_reason(config, one), next(alike)) if len(one.sides) == 2 else ()
        first = next((why for why in reason if why), None)
        if first is None:
            yield _row(config, one)
        else:
            counts[f"dropped_{first}"] += 1


def _keeps(
    config: BuildConfig, batch: Sequence[Found], counts: Counter[str], endings: filters.Endings
) -> Iterator[bool]:
    """Whether each response of the batch takes part: record by record, side by side."""
    candidates = [one.group.candidates[index] for one in batch for index, _ in one.sides.values()]
    text = pa.array([candidate.text for candidate in candidates], pa.string())
    finish = pa.array([candidate.finish_reason for candidate in candidates], pa.string())
    endings.add(finish)
    for code in filters.codes(config, text, finish, pa.array([True] * len(text)), None).tolist():
        if code:
            counts[f"left_out_{filters.REASONS[code]}"] += 1
        yield not code


def _text(one: Found, side: str) -> str:
    return one.group.candidates[one.sides[side][0]].text


def _margin_reason(config: BuildConfig, one: Found) -> str | None:
    chosen, rejected = (one.sides[side][1] for side in pairing.SIDES)
    if chosen is None or rejected is None:
        return None
    least = config.min_margin if config.min_margin > 0 else -float("inf")
    return filters.margin_reason(chosen - rejected, least, config.max_margin)


def _row(config: BuildConfig, one: Found) -> dict[str, Any]:
    kept = tuple(one.sides)
    if len(kept) == 2:
        kept = pairing.kept_sides(config.seed, one.record_id, config.pairing_ratio)
    split = pairing.split_of(config.seed, one.group.prompt.id, config.test_fraction)
    return pairing.record_of(one.record_id, one.group, {side: one.sides[side] for side in kept}, split)
