"""eval: grade responses on tasks, a model's own or those in files, and compare models on the same items."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import chain
from typing import Any

from bnfctl import machine, pool, samplers, shards
from bnfctl.artifact import Draft, Pinned, Plan, Store
from bnfctl.config import EvalConfig
from bnfctl.errors import UsageError
from bnfctl.evaluation import gates, imported, shifting
from bnfctl.evaluation.asking import NO_ENGINE, Asker, calls_ahead
from bnfctl.evaluation.figures import figures, with_holm
from bnfctl.evaluation.inputs import SHIFTS, AnyTask, hints_for, make_tasks, name_of, pin_files, pin_items
from bnfctl.evaluation.inputs import check as check_flags
from bnfctl.evaluation.rows import SCHEMA, text_of
from bnfctl.evaluation.sampling import candidates_of, sample
from bnfctl.evaluation.shown import headline_of, table_of
from bnfctl.model.source import model_dir, pin_model
from bnfctl.model.vllm import check_server
from bnfctl.options import refuse
from bnfctl.stages import name_served
from bnfctl.tasks.imports import Answered
from bnfctl.tasks.judged_rows import to_row
from bnfctl.tasks.judging import Fingerprint, Judged, JudgedTask
from bnfctl.tasks.judging import estimate as estimate_calls

__all__ = ["STAGE", "VERSION", "check", "headline_of", "judging", "plan", "run", "table_of"]

STAGE, VERSION = "eval", 2
check = gates.check


def plan(config: EvalConfig, store: Store) -> Plan:
    """Resolve the model, the sampler, the data, the judge and the base's grades."""
    check_flags(config)
    for gate in config.require:
        gates.parse(gate, config)
    sampler = samplers.resolve(config.sampler) if config.model is not None else "hf"
    if sampler != "vllm" and config.judge is None:
        refuse(config, ["tensor_parallel"], f"is for --sampler vllm and --judge, not {sampler}")
    pool.processes(config.devices, config.tensor_parallel)
    notes = (f"sampler: {sampler}",) if config.sampler == "auto" and config.model is not None else ()
    inputs = {"model": pin_model(config.model, store, "MODEL")} if config.model is not None else {}
    inputs |= {**pin_items(config, store), **pin_files(config, store)}
    if config.judge is not None:
        check_server("--judge", NO_ENGINE)
    if SHIFTS in config.tasks:
        inputs["reference"] = shifting.reference_of(config, store, inputs["model"])
    versions = {name: task.version for name, task in make_tasks(config, inputs).items()}
    if config.base is not None:
        inputs["base"] = _base(config, store, versions)
    versions |= imported.file_names(config, inputs)
    if config.server:
        config, unknown = name_served(config)
        inputs |= unknown
    return Plan(
        STAGE, VERSION, dataclasses.replace(config, sampler=sampler, dtype=machine.resolve_dtype(config.dtype)), inputs,
        notes, versions, hints_for(config),
    )  # fmt: skip


def _base(config: EvalConfig, store: Store, versions: dict[str, str]) -> Pinned:
    """The base's grades; UsageError where there are none of the same tasks."""
    base = store.find(str(config.base), STAGE, "--base")
    made = base.manifest.config
    of = made["model"] or f"--responses {' '.join(made['responses'])}"
    hint = f"bnfctl eval {of} --tasks {','.join(config.tasks)}"
    if base.manifest.stage_version != VERSION:
        raise UsageError("the base was evaluated by an older bnfctl", where="--base", hint=hint)
    for name, version in versions.items():
        if name == SHIFTS:
            continue  # they are against the reference
        graded = base.manifest.summary["tasks"].get(name)
        if graded is None:
            raise UsageError(f"the base has no grades for {name}", where="--base", hint=hint)
        if graded["version"] != version:
            what = f"{name}: the base was graded by version {graded['version']}, this is {version}"
            raise UsageError(what, where="--base", hint=hint)
    return base.pinned()


def judging(planned: Plan, store: Store) -> list[str]:
    """What a judge will be asked, for a dry run; nothing where a task has none, or where its data is not here."""
    config = planned.config
    lines = []
    for name, task in make_tasks(config, planned.inputs).items():
        if isinstance(task, JudgedTask) and all(pinned.digest for pinned in planned.inputs.values()):
            answered = (
                [Answered(item, "x", "", item.where) for item in task.requests(config.limit)] if config.model else []
            )
            if config.responses:
                answered += imported.judged(imported.files_of(config, planned.inputs), task, config.limit, "").waiting
            lines.append(f"{name}: {calls_ahead(estimate_calls(task, answered), config.model is None)}")
    return lines


def run(config: EvalConfig, draft: Draft) -> dict[str, Any]:
    """Write one row per task, model and item; returns every model's figures by task."""
    work = make_tasks(config, draft.inputs)
    sampled = _sampled(config, draft) if config.model is not None else {}
    judges: dict[str, dict[str, Fingerprint]] = {name: {} for name in work}
    rows: list[dict[str, Any]] = []
    with Asker(config, draft) as asker:
        for name, task in work.items():
            mine = sampled.get(name, [])
            if isinstance(task, JudgedTask):
                rows += _judged(config, draft, task, mine, asker, judges[name])
            else:
                rows += [*mine, *_graded(config, draft, task, {row["model"] for row in mine})]
    shards.write_shards(draft.path / "rows", rows, SCHEMA)
    base = draft.artifact("base") if "base" in draft.inputs else None
    results = {
        name: figures(task, [row for row in rows if row["task"] == name], base, judges[name])
        for name, task in work.items() if name != SHIFTS
    }  # fmt: skip
    models = list(dict.fromkeys(row["model"] for row in rows))
    if SHIFTS in work:
        results[SHIFTS] = _shifts(config, draft, models[0], work[SHIFTS].version)
    return {"models": models, "tasks": with_holm(results)}


def _sampled(config: EvalConfig, draft: Draft) -> dict[str, list[dict[str, Any]]]:
    """The rows of the model's own responses, by task."""
    folder, name = model_dir(draft.inputs["model"]), name_of(draft.inputs["model"])
    names = [task for task in config.tasks if task != SHIFTS or config.shift_responses == "policy"]
    parts = [sample(config, draft, names, folder, "parts")] if names else []
    if len(names) < len(config.tasks):
        parts.append(sample(config, draft, [SHIFTS], model_dir(draft.inputs["reference"]), "reference-parts"))
    found: dict[str, list[dict[str, Any]]] = {}
    for row in chain.from_iterable(shards.read_rows(part.folder) for part in parts):
        kept = {column.name: row.get(column.name) for column in SCHEMA}
        found.setdefault(row["task"], []).append({**kept, "model": name})
    return found


def _graded(config: EvalConfig, draft: Draft, task: AnyTask, own: set[str]) -> Iterator[dict[str, Any]]:
    """The rows of responses that were made elsewhere; own: the model that is evaluated beside them."""
    assert not isinstance(task, JudgedTask)
    files = imported.files_of(config, draft.inputs)
    for model, found in imported.graded(files, task, config.limit).items() if files else ():
        _apart({model}, own)
        for answered, grade in found:
            yield {
                "task": task.name, "model": model, "item_id": answered.item.id, "prompt": list(answered.item.messages),
                "response": answered.response, "tokens": None, "finish_reason": None, "grade": grade.value, "extra": text_of(grade.extra),
            }  # fmt: skip


def _apart(in_files: set[str], own: set[str]) -> None:
    """UsageError where the model that is evaluated is in a file too."""
    for model in in_files & own:
        raise UsageError(f"{model} is the model and in a file", where="--responses", hint="give it once")


def _judged(
    config: EvalConfig, draft: Draft, task: JudgedTask, sampled: list[dict[str, Any]], asker: Asker,
    judges: dict[str, Fingerprint],
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of a judged task; fills `judges`, model -> who judged it."""
    files = imported.files_of(config, draft.inputs)
    found = imported.judged(files, task, config.limit, config.served_model or "") if files else imported.Judgments()
    items = {item.id: item for item in task.requests(config.limit)} if sampled else {}
    own = {row["item_id"]: row for row in sampled}
    waiting = [Answered(items[row["item_id"]], row["response"], row["model"], row["item_id"]) for row in sampled]
    _apart({*found.judges, *(one.model for one in found.waiting)}, {one.model for one in waiting})
    waiting += found.waiting
    judged: list[Judged] = []
    if waiting:
        judged, who = asker.ask(task, waiting)
        judges |= dict.fromkeys((one.model for one in waiting), who)
    judges |= found.judges
    rows = [to_row(task.name, one) for one in [*judged, *found.rows]]
    model = sampled[0]["model"] if sampled else None
    for row in rows:
        if row["model"] == model:
            row |= {column: own[row["item_id"]][column] for column in ("tokens", "finish_reason")}
    return rows


def _shifts(config: EvalConfig, draft: Draft, model: str, version: str) -> dict[str, Any]:
    """The figures of the shifts, whose rows go into a folder of their own."""
    policy, reference = (draft.inputs[name] for name in ("model", "reference"))
    part = "parts" if config.shift_responses == "policy" else "reference-parts"
    rows = (row for row in shards.read_rows(draft.scratch / part) if row["task"] == SHIFTS)
    found = shifting.measure(config, draft, candidates_of(rows), model_dir(policy), model_dir(reference))
    return {
        "version": version,
        "reference": name_of(reference),
        "responses": config.shift_responses,
        "models": {model: found},
    }
