"""The figures of a table's models, one `Measure` for each column: with intervals, and as statistics that can be resampled.

All models of a measure are compared on the items that all of them have.  Judgments of different judges, or of different
versions of a protocol, are measures of their own: nothing is ranked or subtracted across them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from bnfctl.report import judged_measures
from bnfctl.report.evidence import SHIFTS, Evidence, Result, shared_items, title_of
from bnfctl.report.measure import Measure, Scene
from bnfctl.report.sources import Run
from bnfctl.tasks import statistics
from bnfctl.tasks.judging import differing
from bnfctl.tasks.statistics import Array, Estimate

_MAKERS: dict[str, Callable[[Scene], list[Measure]]] = {
    "wildbench": judged_measures.wildbench, "wildbench-pairs": judged_measures.pairs,
    "arena-hard": judged_measures.arena_hard,
}  # fmt: skip
"""Of tasks whose figure is no mean of grades."""


def measures_of(evidence: Evidence, runs: Sequence[Run]) -> tuple[list[Measure], list[str]]:
    """Every figure of these runs, in the paper's order, and what a reader must know before comparing them."""
    found: list[Measure] = []
    warnings: list[str] = []
    for task in evidence.tasks:
        protocols = evidence.protocols(task, runs)
        if task == SHIFTS or not protocols:
            continue
        warnings += _differences(task, protocols) + _twice(task, evidence, protocols)
        fullest = max(protocols.values(), key=len)
        for heading, protocol in zip(_headings(task, protocols), protocols, strict=True):
            results = protocols[protocol]
            scene = Scene(evidence, task, heading, protocol, results, shared_items(list(results.values())))
            warnings += _uneven(scene)
            make = _MAKERS.get(task, graded)
            made = make(scene) if scene.items else _apart(scene, make)
            # Of several judges one counts in the average rank, or the task would count twice.
            found += made if results is fullest else [replace(one, counted=False) for one in made]
    return found, warnings


def _differences(task: str, protocols: Mapping[bytes, Mapping[str, Result]]) -> list[str]:
    results = [result for mine in protocols.values() for result in mine.values()]
    lines = []
    versions: dict[str, list[str]] = {}
    for result in results:
        versions.setdefault(str(result.table.get("version")), []).append(_who(result))
    if len(versions) > 1:
        each = "; ".join(f"{version} ({', '.join(who)})" for version, who in versions.items())
        lines.append(f"different versions of the protocol: these figures do not compare: {each}")
    judges = {_who(result): result.judge for result in results if result.judge is not None}
    return [f"{title_of(task)}: {line}" for line in [*lines, *differing(judges)]]


def _twice(task: str, evidence: Evidence, protocols: Mapping[bytes, Mapping[str, Result]]) -> list[str]:
    """Lines about runs that were evaluated twice alike, with other grades: one of the two is shown."""
    lines = []
    for protocol, mine in protocols.items():
        for ref, taken in mine.items():
            others = [
                one.artifact.ref
                for one in evidence.of_task(task)
                if one.run.ref == ref and one.protocol == protocol and one is not taken and not _alike(one, taken)
            ]
            if others:
                also = ", ".join(others)
                lines.append(f"{title_of(task)}: {taken.run.title} is shown from {taken.artifact.ref}; also in {also}")
    return lines


def _alike(one: Result, other: Result) -> bool:
    """Whether two evals gave the same grades, as the same eval with and without a base does."""
    same = one.rows.items == other.rows.items
    return same and bool(np.array_equal(one.rows.grades, other.rows.grades, equal_nan=True))


def _who(result: Result) -> str:
    return f"{result.run.title} in {result.artifact.ref}"


def _headings(task: str, protocols: Mapping[bytes, Mapping[str, Result]]) -> list[str]:
    """The task's title; where there are several protocols, with what tells them apart."""
    if len(protocols) == 1:
        return [title_of(task)]
    firsts = [next(iter(mine.values())) for mine in protocols.values()]
    for told in (
        [f"judge {one.judge['served_model']}" if one.judge else "no judge" for one in firsts],
        [str(one.table.get("version")) for one in firsts],
        [f"judge {one.judge['served_model']}, {one.judge['digest']}" if one.judge else "no judge" for one in firsts],
    ):
        if len(set(told)) == len(told):
            return [f"{title_of(task)} ({one})" for one in told]
    return [f"{title_of(task)} (protocol {number})" for number in range(1, len(protocols) + 1)]


def _uneven(scene: Scene) -> list[str]:
    sizes = {_who(result): len(result.rows.items) for result in scene.results.values()}
    if all(size == len(scene.items) for size in sizes.values()):
        return []
    each = ", ".join(f"{who} {size}" for who, size in sizes.items())
    if not scene.items:
        return [f"{scene.heading}: the models have no item in common, so nothing is ranked or compared ({each} items)"]
    return [f"{scene.heading}: different items ({each}); the figures here are of the {len(scene.items)} that all have"]


def _apart(scene: Scene, make: Callable[[Scene], list[Measure]]) -> list[Measure]:
    """Figures of each run on its own items, side by side without a statistic over all of them."""
    merged: dict[str, Measure] = {}
    for ref, result in scene.results.items():
        for one in make(replace(scene, results={ref: result}, items=result.rows.items)):
            known = merged.get(
                one.name, replace(one, estimates={}, why={}, statistic=None, grades=None, resampled=None)
            )
            merged[one.name] = replace(
                known, estimates={**known.estimates, **one.estimates}, why={**known.why, **one.why},
                sources=scene.sources,
            )  # fmt: skip
    return list(merged.values())


def graded(scene: Scene) -> list[Measure]:
    """The mean grade in percent, of tasks with a grade in [0, 1] for each item."""
    grades = np.stack([_grades_of(result, scene.items) for result in scene.results.values()])
    binary = all(result.figures.get("interval") == "wilson" for result in scene.results.values())
    estimates, why = {}, {}
    for ref, mine in zip(scene.results, grades, strict=True):
        known = mine[~np.isnan(mine)].tolist()
        if not known:
            why[ref] = "no item could be graded"
            continue
        one = statistics.wilson(known) if binary else statistics.mean_interval(known)
        low, high = max(0.0, one.low), min(1.0, one.high)
        estimates[ref] = Estimate(one.n, 100 * one.mean, 100 * low, 100 * high)
    kept = 100 * grades[[ref in estimates for ref in scene.results]]
    known_ones = ~np.isnan(kept)
    statistic = statistics.ratio(np.where(known_ones, kept, 0.0).T, known_ones.T.astype(np.float64))
    return [
        Measure(
            scene.task, scene.heading, "Acc (%)" if binary else "Grade (%)", estimates, statistic, len(scene.items),
            scene.heading, scene.sources, why, grades=kept, interval="wilson" if binary else "normal", share=True,
            draws=scene.evidence.draws,
        )
    ] if estimates else []  # fmt: skip


def _grades_of(result: Result, items: Sequence[str]) -> Array:
    if tuple(items) == result.rows.items:
        return result.rows.grades
    place = {item: number for number, item in enumerate(result.rows.items)}
    return result.rows.grades[[place[item] for item in items]]
