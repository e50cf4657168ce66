"""Table 5 of the paper: how long each method's responses are, and whether that is more or less than the base's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from bnfctl.report.evidence import SHIFTS, Evidence, Result, shared_items, title_of
from bnfctl.report.sources import Method
from bnfctl.report.table import DASH, Cell, Table
from bnfctl.tasks.statistics import Array, mean_interval

CAPTION = (
    "Mean length of the responses with its 95 % interval, in tokens of the model's own tokenizer and in characters, on the "
    "items that all rows have. ↑ longer, ↓ shorter than the base's, = the same."
)
OF_TASK = {
    "wildbench": " Wild-Bench's characters are of whole responses, as published.",
    "arena-hard": " Arena-Hard's lengths in the paper are tokens.",
}


def lengths(name: str, title: str, methods: Sequence[Method], evidence: Evidence) -> Table | None:
    """None where no response is known."""
    columns: list[list[Cell]] = []
    names: list[str] = []
    groups: list[tuple[str, int]] = [("", 1)]
    for task in evidence.tasks:
        if task == SHIFTS:
            continue
        results = _results(evidence, task, methods)
        shared = frozenset(shared_items([one for mine in results for one in mine]))
        found = {
            "tokens": [_length(mine, lambda one: one.rows.tokens, shared) for mine in results],
            "characters": [_length(mine, _characters, shared) for mine in results],
        }
        kept = {unit: cells for unit, cells in found.items() if any(cell.value is not None for cell in cells)}
        if kept:
            groups.append((title_of(task), len(kept)))
            names += kept
            columns += [_arrows(cells, methods) if shared else cells for cells in kept.values()]
    if not columns:
        return None
    rows = tuple((Cell(method.label), *cells) for method, *cells in zip(methods, *columns, strict=True))
    caption = CAPTION + "".join(OF_TASK[task] for task in evidence.tasks if task in OF_TASK)
    return Table(name, title, caption, ("Method", *names), rows, groups=tuple(groups))


def _results(evidence: Evidence, task: str, methods: Sequence[Method]) -> list[list[Result]]:
    """The results of each method's runs; lengths are no matter of judges: of several results the last with most items."""
    return [
        [
            max(reversed(results), key=lambda one: len(one.rows.items))
            for run in method.runs
            if (results := [one for one in evidence.of_task(task) if one.run.ref == run.ref])
        ]
        for method in methods
    ]


def _characters(result: Result) -> Array:
    """[K] of all responses; of Wild-Bench's those that are neither empty nor cut, and NaN for the others."""
    if result.task == "wildbench":
        return np.array(
            [row.extra["length"] if row.extra["whole"] else np.nan for row in result.rows.judged], np.float64
        )
    return result.rows.characters


def _length(results: Sequence[Result], of: Callable[[Result], Array], shared: frozenset[str]) -> Cell:
    """Over all runs of a method, on the shared items (on its own where there are none); items count as clusters."""
    pairs = [
        (item, value)
        for result in results
        for item, value in zip(result.rows.items, of(result).tolist(), strict=True)
        if not math.isnan(value) and (item in shared or not shared)
    ]
    if not pairs:
        return Cell(DASH, title="not known")
    items, values = zip(*pairs, strict=True)
    one = mean_interval(values, items)
    title = f"{len(set(items))} items; {'; '.join(result.source for result in results)}"
    return Cell(f"{one.mean:.0f}" if one.mean >= 100 else f"{one.mean:.1f}", one.mean, one.low, one.high, title=title)


def _arrows(cells: Sequence[Cell], methods: Sequence[Method]) -> list[Cell]:
    base = next((cell.value for cell, method in zip(cells, methods, strict=True) if method.is_base), None)
    return [
        cell
        if base is None or cell.value is None or method.is_base
        else replace(cell, text=cell.text + _arrow(cell.value - base))
        for cell, method in zip(cells, methods, strict=True)
    ]


def _arrow(change: float) -> str:
    return " =" if math.isclose(change, 0.0, abs_tol=1e-9) else " ↑" if change > 0 else " ↓"
