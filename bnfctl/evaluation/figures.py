"""From rows to figures: means with intervals, gains over a base, and every model against every other."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bnfctl.artifact import Artifact
from bnfctl.data.records import Reward
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.evaluation.inputs import AnyTask
from bnfctl.evaluation.rows import NO_ROOM, rows_of
from bnfctl.tasks import Task, paired, statistics
from bnfctl.tasks.judged_rows import from_row
from bnfctl.tasks.judging import Fingerprint, JudgedTask, differing, plain

Rows = Sequence[Mapping[str, Any]]

MOST = 12
"""Models that are compared two by two: beyond, the pairs are too many to read and to correct for."""
_COLUMNS = ("model", "item_id", "response", "grade", "extra", "answers")


def figures(task: AnyTask, rows: Rows, base: Artifact | None, judges: Mapping[str, Fingerprint]) -> dict[str, Any]:
    """The summary of one task: {"version", "models": {model: figures}, "comparisons", "warnings", ...}.

    rows: of this task, of one model or several.  base: its grades on the same items make the gains.  BnfctlError where
    no item of a model is graded.
    """
    mine = _by_model(rows)
    for model, of_model in mine.items():
        if all(row["grade"] is None for row in of_model):
            extra = next((json.loads(row["extra"]) for row in of_model if row["extra"]), None)
            hint = "a larger --limit, or items with known answers"
            if extra is not None:
                hint = f"the first row says: {json.dumps(extra.get('nulls') or extra, ensure_ascii=False)[:200]}"
            raise BnfctlError(
                f"{task.name}: no item of {model} could be graded", where=f"--tasks {task.name}", hint=hint
            )
    result = _judged(task, rows, mine, judges) if isinstance(task, JudgedTask) else _graded(task, mine)
    for model, of_model in mine.items():
        result["models"][model] |= {
            "ungraded": sum(row["grade"] is None for row in of_model),
            NO_ROOM: sum(row["finish_reason"] == NO_ROOM for row in of_model),
            "cut": _mean([row["finish_reason"] == "length" if row["finish_reason"] else None for row in of_model]),
            "tokens": _mean([row["tokens"] for row in of_model]),
            "characters": _mean([len(row["response"]) if row["response"] else None for row in of_model]),
        }
    if base is not None:
        theirs = _only(_by_model(rows_of(base, task.name, _COLUMNS)), base)
        if isinstance(task, JudgedTask):
            judged = {f"{model} (base)": found["judge"] for model, found in _models_of(base, task.name).items()}
            judged |= {model: found["judge"] for model, found in result["models"].items()}
            result["warnings"] = differing(judged)
        for model, of_model in mine.items():
            result["models"][model] |= _gain(task, of_model, theirs)
    if 1 < len(mine) <= MOST:
        pairs = {f"{one} {two}": (one, two) for one, two in itertools.combinations(mine, 2)}
        found = {name: {"first": one, "second": two, **_against(task, mine[one], mine[two])} for name, (one, two) in pairs.items()}  # fmt: skip
        result["comparisons"] = list(_with_holm(found).values())
    return {"version": task.version, **result}


def with_holm(tasks: dict[str, Any]) -> dict[str, Any]:
    """Adds "p_holm" to every gain: p-values of all tasks and models together (Holm 1979)."""
    gains = {
        (name, model): found
        for name, task in tasks.items()
        for model, found in task["models"].items()
        if "gain" in found
    }
    if gains:
        adjusted = paired.holm({json.dumps(key): found["p"] for key, found in gains.items()})
        for key, found in gains.items():
            found["p_holm"] = adjusted[json.dumps(key)]
    return tasks


def _models_of(artifact: Artifact, task: str) -> dict[str, Any]:
    models: dict[str, Any] = artifact.manifest.summary["tasks"][task]["models"]
    return models


def _by_model(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row)
    return found


def _only(by_model: dict[str, list[Mapping[str, Any]]], base: Artifact) -> list[Mapping[str, Any]]:
    if len(by_model) != 1:
        what = f"the base holds {len(by_model)} models"
        raise UsageError(what, where="--base", hint=f"an eval artifact of one model; {base.ref} has others")
    return next(iter(by_model.values()))


def _graded(task: Task, by_model: Mapping[str, Rows]) -> dict[str, Any]:
    models = {}
    for model, rows in by_model.items():
        known = [row for row in rows if row["grade"] is not None]
        grades = [row["grade"] for row in known]
        interval = statistics.wilson(grades) if task.binary else statistics.mean_interval(grades)
        details = [Reward(row["grade"], json.loads(row["extra"] or "{}")) for row in known]
        models[model] = {
            **task.aggregate(details), **dataclasses.asdict(within_0_and_1(interval)),
            "interval": "wilson" if task.binary else "normal",
        }  # fmt: skip
    return {"models": models}


def _judged(
    task: JudgedTask, rows: Rows, by_model: Mapping[str, Rows], judges: Mapping[str, Fingerprint]
) -> dict[str, Any]:
    result = task.aggregate([from_row(row) for row in rows])
    prints = {model: judges[model].as_dict() for model in by_model}
    for model, found in result["models"].items():
        found |= {**task.headline(found), "interval": "bootstrap", "judge": prints[model]}
    return {**result, "warnings": differing(prints)}


def within_0_and_1(estimate: statistics.Estimate) -> statistics.Estimate:
    """Grades are shares: an interval that leaves [0, 1] ends there."""
    return dataclasses.replace(estimate, low=max(0.0, estimate.low), high=min(1.0, estimate.high))


def _gain(task: AnyTask, mine: Rows, theirs: Rows) -> dict[str, Any]:
    found = _against(task, mine, theirs)
    base_mean = found.pop("second_mean")
    del found["first_mean"]
    gain = {"base_mean": base_mean, "paired": found.pop("n"), "gain": found.pop("mean")}
    return {**gain, "gain_low": found.pop("low"), "gain_high": found.pop("high"), **found}


def _against(task: AnyTask, first: Rows, second: Rows) -> dict[str, Any]:
    """first - second on the items that both have a grade for: {n, mean, low, high, p, standard_error, detectable,
    first_mean, second_mean}.

    Judged tasks resample items and make the headline again; others take the mean of the differences.  0/1 grades also
    get McNemar's test.
    """
    one, two = ({row["item_id"]: row for row in rows if row["grade"] is not None} for rows in (first, second))
    both = sorted(one.keys() & two.keys())
    if not both:
        what = f"{task.name}: policy and base share no graded item"
        raise BnfctlError(what, where="--base", hint="use the same --limit for both")
    if isinstance(task, JudgedTask):
        each = [task.statistic([from_row(rows[item]) for item in both]) for rows in (one, two)]
        found = paired.bootstrap_difference(each[0], each[1], len(both))
        means = [statistics.bootstrap(statistic, len(both), 1).estimate().mean for statistic in each]
        return plain({**dataclasses.asdict(found), "first_mean": means[0], "second_mean": means[1]})
    first_grades, second_grades = ([rows[item]["grade"] for item in both] for rows in (one, two))
    result = dataclasses.asdict(paired.difference(first_grades, second_grades))
    if task.binary:
        result["mcnemar"] = dataclasses.asdict(paired.mcnemar(first_grades, second_grades))
    return result | {"first_mean": _mean(first_grades), "second_mean": _mean(second_grades)}


def _with_holm(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    adjusted = paired.holm({name: one["p"] for name, one in found.items()})
    return {name: {**one, "p_holm": adjusted[name]} for name, one in found.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
