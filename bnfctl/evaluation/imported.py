"""Responses and judgments that were made elsewhere, as rows: nothing is sampled, and only what is not judged is asked.

A file is one of judgments where its rows have `games` (Arena-Hard) or a score (WildBench), else one of responses.  The
responses of a model whose judgments are there give the lengths, and are not judged again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from bnfctl import console
from bnfctl.artifact import Pinned
from bnfctl.config import EvalConfig
from bnfctl.data.records import Reward
from bnfctl.errors import UsageError
from bnfctl.tasks import Task
from bnfctl.tasks.arena_hard import ArenaHard
from bnfctl.tasks.imports import Answered, regrade, rows_in
from bnfctl.tasks.judged_imports import arena_hard_judgments, read_responses, wildbench_scores
from bnfctl.tasks.judging import Fingerprint, Judged, JudgedTask
from bnfctl.tasks.wildbench import WildBench
from bnfctl.tasks.zeroeval import ZeroEvalTask


def files_of(config: EvalConfig, inputs: Mapping[str, Pinned]) -> list[Path]:
    """The files of --responses; of an eval artifact, the folder with its rows."""
    pinned = [inputs[f"responses-{number}"] for number in range(len(config.responses))]
    return [Path(str(one.path)) / "rows" if one.kind == "artifact" else Path(str(one.path)) for one in pinned]


def file_names(config: EvalConfig, inputs: Mapping[str, Pinned]) -> dict[str, str]:
    """What files are called, for the key: models are called so whose rows name none, and parsing may go by the name."""
    names = {name: inputs[name] for name in (f"responses-{number}" for number in range(len(config.responses)))}
    return {f"name of {name}": Path(one.ref).stem for name, one in names.items() if one.kind != "artifact"}


def graded(files: Sequence[Path], task: Task, limit: int | None) -> dict[str, list[tuple[Answered, Reward]]]:
    """The graded responses by model, each in its file's order; `limit` takes the first of each model.

    Files may be parts of one model's responses; where two have the same items, see `_names`.
    """
    read: list[tuple[Path, str, list[tuple[Answered, Reward]]]] = []
    for path in files:
        if isinstance(task, ZeroEvalTask):
            mine = regrade(path, task)
        else:
            mine = {}
            for one in read_responses(path, task):
                mine.setdefault(one.model, []).append((one, task.grade(one.item, one.response)))
        read += [(path, model, rows) for model, rows in mine.items()]
    found: dict[str, list[tuple[Answered, Reward]]] = {}
    names = _names([(path, model, {one.item.id for one, _ in rows}) for path, model, rows in read])
    for name, (_, _, rows) in zip(names, read, strict=True):
        named = [(dataclasses.replace(one, model=name), grade) for one, grade in rows]
        found[name] = [*found.get(name, ()), *named][:limit]
    return found


@dataclass
class Judgments:
    """What the files of a judged task hold."""

    rows: list[Judged] = field(default_factory=list)
    """Judged elsewhere."""
    judges: dict[str, Fingerprint] = field(default_factory=dict)
    """Model -> who judged it."""
    waiting: list[Answered] = field(default_factory=list)
    """Responses without a judgment, by model."""


def judged(files: Sequence[Path], task: JudgedTask, limit: int | None, judge: str) -> Judgments:
    """Everything in the files; judge: who judged, for files that do not tell."""
    responses: dict[str, list[Answered]] = {}
    found = Judgments()
    judgments = [path for path in files if _holds_judgments(path, task.name)]
    items = {item.id: item for item in task.requests(limit)} if limit or len(judgments) < len(files) else None
    read: list[tuple[Path, str, list[Answered]]] = []
    for path in files:
        if path not in judgments:
            mine: dict[str, list[Answered]] = {}
            for one in read_responses(path, task, items):
                mine.setdefault(one.model, []).append(one)
            read += [(path, model, of_model) for model, of_model in mine.items()]
    names = _names([(path, model, {one.item.id for one in of_model}) for path, model, of_model in read])
    for name, (_, _, of_model) in zip(names, read, strict=True):
        responses.setdefault(name, []).extend(dataclasses.replace(one, model=name) for one in of_model)
    for path in judgments:
        rows, who = _read_judgments(path, task, [one for mine in responses.values() for one in mine], judge)
        kept = [row for row in rows if items is None or row.answered.item.id in items]
        for model in dict.fromkeys(row.answered.model for row in kept):
            _new(model, found.judges, path)
            found.judges[model] = who
        found.rows += kept
    found.waiting = [one for model, mine in responses.items() if model not in found.judges for one in mine]
    return found


def _holds_judgments(path: Path, task: str) -> bool:
    row = next((row for _, row in islice(rows_in(path, task), 1)), {})
    return isinstance(row.get("games"), list) or (
        row.get("session_id") is not None and ("score" in row or "parsed_result" in row)
    )


def _read_judgments(
    path: Path, task: JudgedTask, responses: Sequence[Answered], judge: str
) -> tuple[list[Judged], Fingerprint]:
    if isinstance(task, ArenaHard):
        return arena_hard_judgments(path, task, responses)
    if isinstance(task, WildBench):
        return wildbench_scores(path, task, judge)
    raise UsageError(
        f"judgments of {task.name} made elsewhere are not read", where=str(path), hint="give the responses, and a judge"
    )


def _names(read: Sequence[tuple[Path, str, set[str]]]) -> list[str]:
    """What the models of files are called; read: (file, model that it names, items).

    Published files of several models may name the same one: with the same items, each is called as its file.  Parts of
    one model's responses keep its name.  UsageError where two have the same name and items even so.
    """
    names = [model for _, model, _ in read]
    for model in dict.fromkeys(names):
        mine = [number for number, one in enumerate(read) if one[1] == model]
        if sum(len(read[number][2]) for number in mine) > len(set().union(*(read[number][2] for number in mine))):
            for number in mine:
                names[number] = read[number][0].stem
            called = ", ".join(names[number] for number in mine)
            console.say(f"{len(mine)} files have responses of {model} to the same items; called as the files: {called}")
    known: dict[str, set[str]] = {}
    for name, (path, _, items) in zip(names, read, strict=True):
        if known.setdefault(name, set()) & items:
            what = f"two responses of {name} to the same items"
            raise UsageError(what, where=str(path), hint="each file once; files of two models need two names")
        known[name] |= items
    return names


def _new(model: str, known: Mapping[str, Any], path: Path) -> None:
    if model in known:
        raise UsageError(f"{model} is in two files", where=str(path), hint="one file for each model")
