"""Responses that were made elsewhere, so that a task grades them without a model.

A file holds one row per item: a result file of ZeroEval (JSON: its fields are the item's, `output` is the response), or
rows with an id and a response in JSONL, JSON, Parquet or CSV.  A row may also hold `responses`: [{model, text}, ...].
Rows that carry the item's own columns (question and answer) need no data set; for others, the task's is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfctl import console
from bnfctl.data.records import Prompt, Reward
from bnfctl.errors import UsageError, nearest
from bnfctl.options import fingerprint
from bnfctl.tables import TASKS
from bnfctl.tasks.items import read_file
from bnfctl.tasks.zeroeval import ZeroEvalTask

IDS = ("id", "item_id", "prompt_id", "session_id", "question_id", "uid")
RESPONSES = ("output", "response", "responses", "text")


@dataclass(frozen=True, slots=True)
class Answered:
    """One response with the item that it is for."""

    item: Prompt
    response: str
    model: str
    """Who wrote it: what the row says, else the file's name."""
    where: str


def rows_in(path: Path, task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("where", row) of a file, or of the Parquet files of a folder; rows that name another task are passed over."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UsageError("a folder without Parquet files", where=str(path), hint=f"its files by name: {path}/*.json")
    for file in files:
        for where, row in read_file(file):
            if row.get("task") not in TASKS or row["task"] == task:
                yield where, row


def read_answers(path: Path, task: ZeroEvalTask) -> Iterator[Answered]:
    """The responses of a file, in its order.

    UsageError names the row: no response, an id that is no item's, the same id twice from one model; also for no row.
    """
    seen: dict[tuple[str, str], str] = {}
    items: dict[str, Prompt] = {}
    for index, (where, row) in enumerate(rows_in(path, task.name)):
        item = _own_item(row, index, where, task)
        if item is None:
            known_id(row, where)  # before a data set is fetched
            items = items or {item.id: item for item in task.requests(None)}
            item = known_item(row, where, items, task.name)
        for model, response in responses_in(row, where):
            answered = Answered(item, response, model or path.stem, where)
            earlier = seen.setdefault((answered.model, item.id), where)
            if earlier != where:
                what = f"two responses of {answered.model} to {item.id}"
                raise UsageError(what, where=f"{earlier} and {where}", hint="one row for each item")
            yield answered
    if not seen:
        hint = f"the file is empty, or its rows are of other tasks than {task.name}"
        raise UsageError("no responses", where=str(path), hint=hint)


def regrade(path: Path, task: ZeroEvalTask) -> dict[str, list[tuple[Answered, Reward]]]:
    """The graded responses of a file, by model, each in the file's order."""
    graded: dict[str, list[tuple[Answered, Reward]]] = {}
    for answered in read_answers(path, task):
        # ZeroEval goes by its file's name, which is the model's
        grade = task.grade(answered.item, answered.response, f"{answered.model} {path.stem}")
        graded.setdefault(answered.model, []).append((answered, grade))
    for model, found in graded.items():
        if len(found) != task.source.rows:
            console.say(f"{path}: {len(found)} responses of {model}; {task.name} has {task.source.rows} items")
    return graded


def _own_item(row: dict[str, Any], index: int, where: str, task: ZeroEvalTask) -> Prompt | None:
    """The item that the row itself holds, or None."""
    if not all(any(name in row for name in names) for names in task.columns):
        return None
    # Without an id, the question says which item it is: in every file the same, in whatever order.
    question = [row.get(name) for name in (*task.columns[0], "choices")]
    item_id = id_in(row) or f"question-{fingerprint(question)[:16]}"
    return task.prompt(task.item({**row, "id": item_id}, index, where))


def id_in(row: dict[str, Any]) -> str | None:
    """The item's id in a row of any schema, or None."""
    return next((str(row[name]) for name in IDS if row.get(name) is not None), None)


def known_id(row: dict[str, Any], where: str) -> str:
    """The id in a row; UsageError where it has none."""
    item_id = id_in(row)
    if item_id is None:
        raise UsageError("no id", where=where, hint=f"give each row one in {IDS[0]}; columns here: {', '.join(row)}")
    return item_id


def known_item(row: dict[str, Any], where: str, items: Mapping[str, Prompt], task: str) -> Prompt:
    """The item of that name's task whose id the row has; UsageError where it has none, or another one."""
    item_id = known_id(row, where)
    if item_id not in items:
        raise UsageError(
            f"{task} has no item '{item_id}'{nearest(item_id, items)}", where=where,
            hint="an id of the task's data set",
        )  # fmt: skip
    return items[item_id]


def responses_in(row: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """(model or "", text) of each response in a row."""
    value = next((row[name] for name in RESPONSES if row.get(name) is not None), None)
    model = next((row[name] for name in ("generator", "model") if isinstance(row.get(name), str)), "")
    if isinstance(value, str):
        return [(model, value)]
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return [(model, value[0])]  # of several samples the first one counts, as in ZeroEval and WildBench
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        found = [(one.get("model"), one.get("text")) for one in value]
        if all(isinstance(who, str) and isinstance(text, str) for who, text in found):
            return [(str(who), str(text)) for who, text in found]
    hint = 'a text in "response", a list of texts in "output", or "responses": [{"model": ..., "text": ...}]'
    raise UsageError("no response", where=where, hint=hint)
