"""The rows of judged tasks as an eval artifact keeps them, and back: stored answers need no second call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bnfctl.data.records import Prompt
from bnfctl.tasks.imports import Answered
from bnfctl.tasks.judging import Judged


def to_row(task: str, judged: Judged) -> dict[str, Any]:
    """The columns of a row that a judgment decides; tokens and finish_reason are the sampler's to fill in."""
    return {
        "task": task,
        "model": judged.answered.model,
        "item_id": judged.answered.item.id,
        "prompt": list(judged.answered.item.messages),
        "response": judged.answered.response,
        "tokens": None,
        "finish_reason": None,
        "grade": judged.value,
        "extra": _text(judged.extra),
        "answers": _text(judged.answers),
    }


def from_row(row: Mapping[str, Any]) -> Judged:
    """What `to_row` was made from; the prompt and the response may be left out of the row."""
    item = Prompt(row["item_id"], tuple(row.get("prompt") or ()))
    answered = Answered(item, row.get("response") or "", row["model"], f"{row['task']}, {row['item_id']}")
    return Judged(answered, json.loads(row["answers"]), row["grade"], json.loads(row["extra"]))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
