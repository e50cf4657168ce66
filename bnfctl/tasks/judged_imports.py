"""Judged tasks on files made elsewhere: responses that wait for a judge, and judgments that are there already.

Responses: Arena-Hard's in both schemas, WildBench's outputs, plain rows with an id and a response.  Judgments:
Arena-Hard's in both schemas, WildBench's score files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from bnfctl import console
from bnfctl.client.texts import said
from bnfctl.data.records import Prompt
from bnfctl.errors import UsageError
from bnfctl.tasks.arena_hard import PARTS, ArenaHard, read_verdict
from bnfctl.tasks.arena_hard_files import read_judgments
from bnfctl.tasks.imports import Answered, known_item, responses_in, rows_in
from bnfctl.tasks.judging import Fingerprint, Judged, elsewhere, text_of
from bnfctl.tasks.wildbench import WildBench


class HasItems(Protocol):
    """What reading the responses of a file needs of a task; `responses_of`, where it has one, reads rows of its schema."""

    name: str

    def requests(self, limit: int | None) -> Sequence[Prompt]: ...


def read_responses(path: Path, task: HasItems, items: Mapping[str, Prompt] | None = None) -> Iterator[Answered]:
    """The responses of a file, in its order; a model is what its row says, else the file's name.

    items: those to take where not all are; rows of others are passed over.  UsageError names the row: no response, an id
    that is no item's, the same id twice from one model; also for a file without any.
    """
    known = {item.id: item for item in task.requests(None)}
    wanted = known if items is None else items
    seen: dict[tuple[str, str], str] = {}
    read = getattr(task, "responses_of", responses_in)
    for where, row in rows_in(path, task.name):
        # WildBench's rows have an `id` of their own beside the session's.
        own = {"id": row["session_id"]} if row.get("session_id") is not None else {}
        item = known_item({**row, **own}, where, known, task.name)
        for model, response in read(row, where):
            answered = Answered(item, response, model or path.stem, where)
            earlier = seen.setdefault((answered.model, item.id), where)
            if earlier != where:
                what = f"two responses of {answered.model} to {item.id}"
                raise UsageError(what, where=f"{earlier} and {where}", hint="one row for each item")
            if item.id in wanted:
                yield answered
    if not seen:
        hint = f"the file is empty, or its rows are of other tasks than {task.name}"
        raise UsageError("no responses", where=str(path), hint=hint)
    published = getattr(task, "source", None)
    expected = published.rows if published is not None else len(known)
    for model in dict.fromkeys(model for model, _ in seen):
        count = sum(one == model for one, _ in seen)
        if count != expected:
            console.say(f"{path}: {count} responses of {model}; {task.name} has {expected} items")


def arena_hard_judgments(
    path: Path, task: ArenaHard, responses: Iterable[Answered] = ()
) -> tuple[list[Judged], Fingerprint]:
    """The rows of a file of judgments, and who judged.  The file's scores stand; where our reading of the same text finds
    another one, that is said.

    responses: those that were judged; without them there is no length control.
    """
    texts = {(one.model, one.item.id): one for one in responses}
    rows, judges, other = [], set(), 0
    seen: set[tuple[str, str]] = set()
    for item_id, model, row in read_judgments(path):
        where = f"{path}: {item_id}"
        item = known_item({"id": item_id}, where, task.items, task.name)
        if (model, item_id) in seen:
            raise UsageError(f"two judgments of {model} on {item_id}", where=str(path), hint="one row for each")
        seen.add((model, item_id))
        answered = texts.get((model, item_id), Answered(item, "", model, where))
        judged = task.imported(answered, row["games"], (model, item_id) in texts)
        judges.add(row["judge"])
        rows.append(judged)
        other += differences(judged, task)
    if not rows:
        raise UsageError("no judgments", where=str(path), hint="the file is empty")
    if other:
        console.say(f"{path}: {other} scores are not what the verdicts of {task.generation} say; the file's are taken")
    return rows, elsewhere(task, judges)


def differences(row: Judged, task: ArenaHard) -> int:
    """Games of an imported row whose text, where there is one, reads otherwise than its verdict."""
    texts = [said(text_of(row.answers[part][0])) for part in PARTS]
    return sum(
        bool(text) and read_verdict(text, task.generation)[0] != verdict
        for text, verdict in zip(texts, row.extra["verdicts"], strict=True)
    )


def wildbench_scores(path: Path, task: WildBench, judge: str = "") -> tuple[list[Judged], Fingerprint]:
    """The rows of a score file, and who judged: the file does not tell, so the caller may."""
    return task.imported(path), elsewhere(task, [judge])
