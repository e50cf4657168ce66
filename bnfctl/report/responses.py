"""The responses side by side: which items the page shows, and what it says about each.  A bounded sample, as plain data.

Items on whose grades the models differ most come first, for they are what a reader looks for; then the others in order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bnfctl.report.figures_svg import by_base
from bnfctl.report.sources import Run, Sources
from bnfctl.tasks.judging import text_of

ITEMS = 100
"""Of a task at most."""
CHARACTERS = 3_000_000
"""Of all texts together, shared evenly by the tasks: what keeps the page at a few MB."""
LONGEST = 8_000
"""Characters of a text; a longer one is cut, and says so."""
_COLUMNS = ["task", "model", "item_id", "grade"]


@dataclass(frozen=True, eq=False)
class _Model:
    label: str
    index: int | None
    """Of its method's colour; None for a base model."""
    run: Run


def side_by_side(sources: Sources, items: int = ITEMS, characters: int = CHARACTERS) -> dict[str, Any]:
    """{"models": [{"label", "index"}], "tasks": [{"name", "total", "items": [...]}]}, JSON-ready.

    An item: {"id", "prompt": [[role, text]], "responses": [{"model", "text": [text], "grade", "tokens", "finish",
    "judge": [[part, text]], "extra": [text]}]}, responses in the order of the models, which they name by number; behind
    a text that was cut is how many characters were left out.  Raises BnfctlError for a corrupted artifact.
    """
    models = list(_models(sources))
    grades: dict[str, dict[str, dict[int, float | None]]] = {}
    for number, row in _rows(models, _COLUMNS):
        grades.setdefault(row["task"], {}).setdefault(row["item_id"], {}).setdefault(number, _graded(row["grade"]))
    chosen = {task: _chosen(found, items) for task, found in grades.items()}
    texts = _texts(models, chosen)
    room = characters // max(1, len(chosen))
    tasks = []
    for task, ids in chosen.items():
        kept = list(_within(room, [texts[task, name] for name in ids]))
        tasks.append({"name": task, "total": len(grades[task]), "items": kept})
    return {"models": [{"label": model.label, "index": model.index} for model in models], "tasks": tasks}


def _models(sources: Sources) -> Iterator[_Model]:
    indices = {line.method: line.index for _, _, lines in by_base(sources) for line in lines}
    several = len({method.base for method in sources.methods}) > 1
    for method in sources.methods:
        for place, run in enumerate(method.runs):
            label = f"{method.label} ({method.base})" if several and method.base else method.label
            if len(method.runs) > 1:
                label += f", run {place + 1}" if run.seed is None else f", seed {run.seed}"
            yield _Model(label, indices.get(method), run)


def _rows(models: Sequence[_Model], columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the model, row) of every eval, each read once."""
    artifacts = {artifact.ref: artifact for model in models for artifact in model.run.evals}
    named: dict[str, dict[str, int]] = {}
    for number, model in enumerate(models):
        for artifact in model.run.evals:
            named.setdefault(artifact.ref, {}).setdefault(model.run.model, number)
    for ref, artifact in artifacts.items():
        yield from ((named[ref][row["model"]], row) for row in artifact.rows(columns) if row["model"] in named[ref])


def _chosen(grades: dict[str, dict[int, float | None]], items: int) -> list[str]:
    """The ids of a task's items: the largest difference between two models' grades first, equal ones in order."""

    def difference(name: str) -> float:
        known = [grade for grade in grades[name].values() if grade is not None]
        return max(known) - min(known) if known else 0.0

    return sorted(grades, key=difference, reverse=True)[:items]  # sorted() keeps the order of equals


def _texts(models: Sequence[_Model], chosen: dict[str, list[str]]) -> dict[tuple[str, str], dict[str, Any]]:
    wanted = {(task, name) for task, names in chosen.items() for name in names}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    columns = [*_COLUMNS, "prompt", "response", "tokens", "finish_reason", "extra", "answers"]
    for number, row in _rows(models, columns):
        key = (row["task"], row["item_id"])
        if key in wanted:
            prompt = [[message["role"], *_cut(message["content"])] for message in row["prompt"] or ()]
            item = found.setdefault(key, {"id": row["item_id"], "prompt": prompt, "responses": []})
            if all(response["model"] != number for response in item["responses"]):
                item["responses"].append(_response(number, row))
    for item in found.values():
        item["responses"].sort(key=lambda response: response["model"])
    return found


def _response(number: int, row: dict[str, Any]) -> dict[str, Any]:
    made = {
        "model": number, "text": _cut(row["response"] or ""), "grade": _graded(row["grade"]), "tokens": row["tokens"],
        "finish": row["finish_reason"], "judge": [[part, *_cut(text)] for part, text in _judge(row["answers"])],
        "extra": _cut(json.dumps(json.loads(row["extra"]), ensure_ascii=False, indent=1)) if row["extra"] else None,
    }  # fmt: skip
    return {name: value for name, value in made.items() if value not in (None, [])}


def _graded(grade: float | None) -> float | None:
    """A grade that JSON can say; what is no number is none."""
    return grade if grade is not None and math.isfinite(grade) else None


def _cut(text: str) -> list[Any]:
    return [text] if len(text) <= LONGEST else [text[:LONGEST], len(text) - LONGEST]


def _judge(document: str | None) -> Iterator[tuple[str, str]]:
    """(part of the judging, the judge's answer) of the column `answers` (`tasks.judging.Answers` as JSON)."""
    for part, answers in (json.loads(document) if document else {}).items():
        for answer in answers:
            yield part, f"refused: {answer['refused']}" if "refused" in answer else text_of(answer)


def _flat(value: Any) -> Iterator[str]:
    """Every text in a document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _flat(part)


def _within(room: int, items: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """As many items as fit in `room` characters, the first one in any case."""
    for place, item in enumerate(items):
        room -= sum(map(len, _flat(item)))
        if room < 0 and place:
            return
        yield item
