"""Candidates as rows of Parquet, and back as groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

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


def candidate_rows(prompts: Sequence[Prompt], candidates: Sequence[Candidate]) -> Iterator[dict[str, Any]]:
    """Rows of SCHEMA; every candidate's prompt must be among `prompts`."""
    by_id = {prompt.id: prompt for prompt in prompts}
    for candidate in candidates:
        prompt = by_id[candidate.prompt_id]
        row = dataclasses.asdict(candidate)
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
        candidates.append(Candidate(**{f.name: row[f.name] for f in dataclasses.fields(Candidate)}))
    if prompt is not None:
        yield Group(prompt, tuple(candidates))
