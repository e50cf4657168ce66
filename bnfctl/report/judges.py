"""Who judged, and how far that can be trusted: null verdicts, position bias, and what two judges say of the same responses."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from bnfctl.report.evidence import Evidence, Result, title_of
from bnfctl.report.sources import Run
from bnfctl.report.table import DASH, Cell, Table, number, printable
from bnfctl.tasks.agreement import cohen_kappa, position_bias
from bnfctl.tasks.arena_hard import battles_of
from bnfctl.tasks.battles import VERDICTS, outcome
from bnfctl.tasks.wildbench_scores import CHOICES


def judges(evidence: Evidence) -> Table | None:
    """A row for each model and judge; None where nobody judged."""
    rows = [
        _row(result, evidence)
        for task in evidence.tasks
        for result in evidence.of_task(task)
        if result.judge is not None
    ]
    if not rows:
        return None
    columns = ("Benchmark", "Model", "Judge", "Server", "Answered as", "Prompt", "Temperature", "Fingerprint",
               "Responses", "Null (%)", "Why", "Flipped (%)", "Changed (%)", "First shown wins (%)")  # fmt: skip
    caption = (
        "Fingerprint: of the protocol, the judge's prompt, model, server and parameters; figures of different ones do not "
        "compare. Null: share of the questions without a verdict that could be read. Position bias, of two games about one "
        "response with the sides swapped: flipped, each response won once; changed, the outcome differs at all; first shown "
        "wins, of the games that were no tie (50 % is no bias)."
    )
    return Table("judges", "Judges", caption, columns, tuple(rows))


def _row(result: Result, evidence: Evidence) -> tuple[Cell, ...]:
    judge, title = dict(result.judge or {}), result.source
    nulls = Counter(reason for row in result.rows.judged for reason in row.extra["nulls"].values())
    asked = sum(_questions(row.extra) for row in result.rows.judged)
    bias = position_bias(battles_of(result.rows.judged)) if result.task == "arena-hard" else None
    temperature = judge["parameters"].get("temperature")
    shares = [None] * 3 if bias is None else [bias.flipped, bias.changed, bias.first]
    why = "one game per response" if bias is None else title
    return (
        Cell(title_of(result.task), title=title), Cell(_model(result.run, evidence), title=title),
        *(Cell(printable(said) or DASH) for said in (judge["served_model"], judge["server"], ", ".join(judge["answered_as"]))),
        Cell(judge["prompt"] or DASH),
        Cell(DASH if temperature is None else f"{temperature:g}"), Cell(judge["digest"], title=judge["protocol"]),
        number(len(result.rows.judged), 0, title), _percent(nulls.total() / asked if asked else None, title),
        Cell(_most(nulls) or DASH, title=title), *(_percent(share, why) for share in shares),
    )  # fmt: skip


def _model(run: Run, evidence: Evidence) -> str:
    """Its title; with the base's name where there are several bases."""
    return f"{run.base}: {run.title}" if len(evidence.sources.bases) > 1 and run.base else run.title


def _questions(extra: Mapping[str, Any]) -> int:
    """How many questions a response has: two games, one per reference, or one score."""
    return len(extra["verdicts"]) if "verdicts" in extra else len(extra["games"]) if "games" in extra else 1


def _most(nulls: Counter[str]) -> str:
    return ", ".join(f"{reason[:60]} {count}" for reason, count in nulls.most_common(3))


def _percent(share: float | None, title: str) -> Cell:
    return number(None if share is None else 100 * share, 1, title)


def agreement(evidence: Evidence) -> Table | None:
    """What different judges say of the same responses; None where no two judged the same ones."""
    rows: list[tuple[Cell, ...]] = []
    for task in evidence.tasks:
        for first, second in itertools.combinations(evidence.of_task(task), 2):
            if (
                first.run is second.run
                and first.judge
                and second.judge
                and first.judge["digest"] != second.judge["digest"]
            ):
                rows += _compared(first, second, evidence)
    if not rows:
        return None
    columns = ("Benchmark", "Model", "First judge", "Second judge", "Verdicts", "Equal (%)", "Same winner (%)", "Kappa",
               "Weighted kappa", "First mean", "Second mean")  # fmt: skip
    caption = (
        "Verdicts that both judges gave on the same responses. Kappa: agreement beyond chance (Cohen), 0 is chance and 1 is "
        "full; weighted: a miss counts by how many places it is off. Same winner: the same side of a tie, for games; means: of "
        "each judge's grades on these responses."
    )
    return Table("agreement", "Agreement of judges", caption, columns, tuple(rows))


def _compared(first: Result, second: Result, evidence: Evidence) -> Iterator[tuple[Cell, ...]]:
    texts = [_texts(result) for result in (first, second)]
    same = {item for item, text in texts[0].items() if text and texts[1].get(item) == text}
    labels = [_labels(result, same) for result in (first, second)]
    both = [key for key in labels[0] if key in labels[1]]
    if not both:
        return
    mine, theirs = ([one[key] for key in both] for one in labels)
    order = _order(first.task, {*mine, *theirs})
    title = f"{first.source}; {second.source}"
    equal = sum(a == b for a, b in zip(mine, theirs, strict=True)) / len(both)
    winners = None
    if first.task == "arena-hard":
        games = [(outcome(a, 1)[0], outcome(b, 1)[0]) for a, b in zip(mine, theirs, strict=True)]
        winners = sum(a == b for a, b in games) / len(both)
    means = [_mean(result, same) for result in (first, second)]
    yield (
        Cell(title_of(first.task), title=title), Cell(_model(first.run, evidence), title=title),
        *(Cell(f"{one.judge['served_model']}, {one.judge['digest']}", title=one.artifact.ref) for one in (first, second) if one.judge),
        number(len(both), 0, title), _percent(equal, title), _percent(winners, "scores have no winner"),
        number(cohen_kappa(mine, theirs, order), 3, title), number(cohen_kappa(mine, theirs, order, "linear"), 3, title),
        *(number(mean, 3, title) for mean in means),
    )  # fmt: skip


def _texts(result: Result) -> dict[str, str]:
    """item -> response; read only where two judges are compared."""
    name = result.run.name_in(result.artifact)
    rows = result.artifact.rows(["task", "model", "item_id", "response"])
    return {row["item_id"]: row["response"] for row in rows if row["task"] == result.task and row["model"] == name}


def _labels(result: Result, items: set[str]) -> dict[tuple[str, str], str]:
    """(item, question) -> the verdict, as one of `_order`."""
    found: dict[tuple[str, str], str] = {}
    for row in result.rows.judged:
        item = row.answered.item.id
        if item not in items:
            continue
        if "verdicts" in row.extra:
            given = {str(game): verdict for game, verdict in enumerate(row.extra["verdicts"], 1)}
        elif "games" in row.extra:
            given = {reference: game["choice"] for reference, game in row.extra["games"].items()}
        else:
            given = {"score": None if row.value is None else f"{row.value:g}"}
        found |= {(item, question): verdict for question, verdict in given.items() if verdict is not None}
    return found


def _order(task: str, labels: set[str]) -> tuple[str, ...]:
    if task == "arena-hard":
        return VERDICTS
    return tuple(CHOICES) if task == "wildbench-pairs" else tuple(sorted(labels, key=float))


def _mean(result: Result, items: set[str]) -> float | None:
    values = [row.value for row in result.rows.judged if row.answered.item.id in items and row.value is not None]
    return fmean(values) if values else None
