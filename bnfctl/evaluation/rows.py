"""The rows of an eval artifact: one per task, model and item."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from bnfctl import shards
from bnfctl.artifact import Artifact
from bnfctl.errors import UsageError

SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("model", pa.string()),
        ("item_id", pa.string()),
        ("prompt", shards.MESSAGES),
        ("response", pa.string()),
        ("tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("grade", pa.float64()),
        ("extra", pa.string()),
        ("answers", pa.string()),
    ]
)
"""Tasks in the order of the config, models in that of the input, items in the task's.

tokens: null where a response was imported.  extra: JSON, what the grader says beside the grade.  answers: JSON, what a
judge said, from which all of its row follows (`tasks.judged_rows`).
"""


NO_ROOM = "no_room"
"""The finish_reason where the prompt fills the model's context: the response is empty."""


def text_of(extra: Mapping[str, Any]) -> str | None:
    """The text of the column: null where there is nothing to say."""
    return json.dumps(extra, sort_keys=True, ensure_ascii=False) if extra else None


def rows_of(artifact: Artifact, task: str, columns: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of one task; UsageError for an artifact of a version that kept other columns."""
    if artifact.manifest.stage_version < 2:
        hint = f"bnfctl rm {artifact.ref}, then evaluate the model again"
        raise UsageError("made by an older bnfctl, whose rows don't say which model", where=artifact.ref, hint=hint)
    wanted = list(dict.fromkeys(["task", *columns]))
    return [row for row in artifact.rows(wanted) if row["task"] == task]
