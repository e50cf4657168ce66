"""Candidates as rows of Parquet, and back as groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bnfctl import shards
from bnfctl.data.records import Candidate, Group, Prompt

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", shards.MESSAGES),
        ("answer", pa.string()),
        ("sample", pa.int32()),
        ("text", pa.string()),
        ("token_ids", shards.IDS),
        ("finish_reason", pa.string()),
        ("seed", pa.int64()),
        ("prompt_ids", shards.IDS),
        ("source", pa.string()),
    ]
)
"""One row per candidate; the candidates of a prompt follow each other, in sample order."""

_FIELDS = tuple(field.name for field in dataclasses.fields(Candidate))


def candidate_rows(prompts: Sequence[Prompt], candidates: Sequence[Candidate]) -> Iterator[dict[str, Any]]:
    """Rows of SCHEMA; every candidate's prompt must be among `prompts`."""
    by_id = {prompt.id: prompt for prompt in prompts}
    for candidate in candidates:
        prompt = by_id[candidate.prompt_id]
        row = {name: getattr(candidate, name) for name in _FIELDS}  # asdict would copy the ids one by one
        yield {**row, "prompt": list(prompt.messages), "answer": prompt.answer}


def groups(rows: Iterable[dict[str, Any]]) -> Iterator[Group]:
    """The rows of a generate artifact, back as groups."""
    prompt: Prompt | None = None
    candidates: list[Candidate] = []
    for row in rows:
        if prompt is None or row["prompt_id"] != prompt.id:
            if prompt is not None:
                yield Group(prompt, tuple(candidates))
            prompt = Prompt(row["prompt_id"], tuple(row["prompt"]), row["answer"])
            candidates = []
        candidates.append(Candidate(**{name: row[name] for name in _FIELDS}))
    if prompt is not None:
        yield Group(prompt, tuple(candidates))


def prompt_starts(ids: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[P] The first row of each prompt, from the prompt ids of all rows in order."""
    if not len(ids):
        return np.zeros(0, np.int64)
    changes = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy()
    return np.concatenate([[0], np.flatnonzero(changes) + 1])


def whole_prompts(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, cut between prompts: where a prompt lies across two tables, its rows go with the second.

    One chunk a column, so that rows can be taken by number.
    """
    held: pa.Table | None = None
    for table in tables:
        together = table if held is None else pa.concat_tables([held, table])
        starts = prompt_starts(together["prompt_id"])
        last = int(starts[-1]) if len(starts) else 0
        if last:
            yield together.slice(0, last).combine_chunks()
        held = together.slice(last)
    if held is not None and held.num_rows:
        yield held.combine_chunks()
