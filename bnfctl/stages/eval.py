"""eval: grade a model on tasks, and compare it with another on the same items."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from bnfctl import console, pool, samplers, shards, tasks
from bnfctl.artifact import Artifact, Draft, Pinned, Plan, Store
from bnfctl.config import EvalConfig
from bnfctl.data.records import Candidate, Prompt, Reward
from bnfctl.data.sources import pin_data
from bnfctl.errors import BnfctlError, GateError, UsageError, nearest
from bnfctl.machine import resolve_dtype
from bnfctl.model.source import model_dir, pin_model
from bnfctl.options import refuse
from bnfctl.tables import TASKS, load
from bnfctl.tasks import statistics

STAGE, VERSION = "eval", 1

SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("item_id", pa.string()),
        ("prompt", shards.MESSAGES),
        ("response", pa.string()),
        ("tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("grade", pa.float64()),
        ("extra", pa.string()),
    ]
)
"""One row per item of a task, in the task's order."""

_GATE = re.compile(r"\s*([a-z0-9-]+)(?:\.(mean|low|high|gain|gain_low|gain_high))?\s*(>=|<=|>|<)\s*(\S+)\s*")


def plan(config: EvalConfig, store: Store) -> Plan:
    """Resolve the model, the sampler and the base's grades."""
    for gate in config.require:
        _parse_gate(gate, config)
    sampler = samplers.resolve(config.sampler)
    notes = (f"sampler: {sampler}",) if config.sampler == "auto" else ()
    inputs = {"model": pin_model(config.model, store, "MODEL"), **_data(config, store)}
    versions = {name: task.version for name, task in _tasks(config, inputs).items()}
    if config.base is not None:
        base = store.find(config.base, "eval", "--base")
        hint = f"bnfctl eval {base.manifest.config['model']} --tasks {','.join(config.tasks)}"
        for name, version in versions.items():
            graded = base.manifest.summary["tasks"].get(name)
            if graded is None:
                raise UsageError(f"the base has no grades for {name}", where="--base", hint=hint)
            if graded["version"] != version:
                what = f"{name}: the base was graded by version {graded['version']}, this is {version}"
                raise UsageError(what, where="--base", hint=hint)
        inputs["base"] = base.pinned()
    return Plan(
        STAGE,
        VERSION,
        dataclasses.replace(config, sampler=sampler, dtype=resolve_dtype(config.dtype)),
        inputs,
        notes,
        versions,
    )


def _data(config: EvalConfig, store: Store) -> dict[str, Pinned]:
    """The items of the tasks that have some outside this package, and the template, each pinned by its content."""
    found = {}
    for name in config.tasks:
        source = getattr(load(TASKS, name, "task"), "source", None)
        if source is not None and config.data_dir is not None:
            found[f"items-{name}"] = pin_data(str(source.local(Path(config.data_dir))), store, "--data-dir")
        elif source is not None:
            found[f"items-{name}"] = pin_data(source.hub, store, "--tasks", source.split)
    if config.template is not None:
        found["template"] = pin_data(config.template, store, "--template")
    return found


def _tasks(config: EvalConfig, inputs: Mapping[str, Pinned]) -> dict[str, tasks.Task]:
    """The tasks of the config on their pinned data; UsageError for a flag that none of them knows."""
    given = {name: getattr(config, name) for name in ("data_dir", "template", "mathverify", "crux_grader")}
    known = set().union(*map(tasks.takes, config.tasks))
    refuse(config, given.keys() - known, f"changes nothing here: no task of {', '.join(config.tasks)} takes it")
    if config.template is not None:
        given["template"] = Path(config.template)
    made = {}
    for name in config.tasks:
        items = inputs.get(f"items-{name}")
        place = Path(items.path) if items is not None and items.path is not None else None
        options = {**given, "data_dir": place, "pinned": items, "model": config.model}
        made[name] = tasks.make(name, options)
    return made


def run(config: EvalConfig, draft: Draft) -> dict[str, Any]:
    """Write one row per item; returns mean, interval and gain per task."""
    folder = model_dir(draft.inputs["model"])
    runner = _Runner(config, folder, draft)
    found = list(_tasks(config, draft.inputs).values())
    items = {task.name: task.requests(config.limit) for task in found}
    parts = shards.Parts(draft.scratch / "parts", SCHEMA)
    done, first = parts.done(), 0
    with console.Progress(sum(map(len, items.values())), "items") as progress:
        for task in found:
            mine = items[task.name]
            chunks = [mine[start : start + config.chunk] for start in range(0, len(mine), config.chunk)]
            progress.advance(sum(len(chunk) for index, chunk in enumerate(chunks) if first + index in done))
            todo = [(index, chunk) for index, chunk in enumerate(chunks) if first + index not in done]
            if todo:
                for index, rows in runner.grade(task, pool.until_stop(todo)):
                    parts.write(first + index, rows)
                    progress.advance(len(rows))
                console.check_stop()
            first += len(chunks)
    parts.publish(draft.path / "rows")
    base = draft.artifact("base") if "base" in draft.inputs else None
    rows = list(shards.read_rows(draft.path / "rows", ["task", "item_id", "tokens", "grade", "extra"]))
    return {"tasks": {task.name: _aggregate(task, rows, base) for task in found}}


class _Runner:
    """Samplers for the decodings of the tasks; a model is loaded once, when it is first needed."""

    def __init__(self, config: EvalConfig, folder: Path, draft: Draft) -> None:
        self.config, self.folder, self.draft = config, folder, draft
        self._sampler: samplers.Sampler | None = None

    def grade(self, task: tasks.Task, chunks: Iterable[samplers.Chunk]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(index, rows) of each chunk of a task's items."""
        decoding = samplers.Decoding(
            n=1, **dataclasses.asdict(task.decoding), seed=self.config.seed, chunk=self.config.chunk,
            dtype=self.config.dtype, gpu_memory=self.config.gpu_memory, trust_remote_code=self.config.trust_remote_code,
            chat_template_kwargs=self.config.chat_template_kwargs,
        )  # fmt: skip
        if self._sampler is None:
            self._sampler = samplers.make(self.config.sampler, self.folder, decoding)
            self.draft.provenance["engine"] = self._sampler.version
        prompts: dict[int, dict[str, Prompt]] = {}

        def checked() -> Iterator[samplers.Chunk]:
            for index, items in chunks:
                chunk = list(samplers.check_prompts(self.folder, items, decoding, "error", Counter()))
                prompts[index] = {prompt.id: prompt for prompt in chunk}
                yield index, chunk

        for index, candidates in self._sampler.sample(checked(), decoding):
            by_id = prompts.pop(index)
            yield index, [_row(task, by_id[candidate.prompt_id], candidate) for candidate in candidates]


def _row(task: tasks.Task, prompt: Prompt, candidate: Candidate) -> dict[str, Any]:
    graded = task.grade(prompt, candidate.text)
    return {
        "task": task.name,
        "item_id": prompt.id,
        "prompt": list(prompt.messages),
        "response": candidate.text,
        "tokens": len(candidate.token_ids or ()),
        "finish_reason": candidate.finish_reason,
        "grade": graded.value,
        "extra": json.dumps(graded.extra, sort_keys=True, ensure_ascii=False) if graded.extra else None,
    }


def _aggregate(task: tasks.Task, rows: list[dict[str, Any]], base: Artifact | None) -> dict[str, Any]:
    mine = [row for row in rows if row["task"] == task.name]
    grades = {row["item_id"]: row["grade"] for row in mine if row["grade"] is not None}
    if not grades:
        raise BnfctlError(
            f"{task.name}: no item could be graded", hint="bnfctl show of the rows tells what was answered"
        )
    interval = statistics.wilson if task.binary else statistics.mean_interval
    details = [Reward(row["grade"], json.loads(row["extra"] or "{}")) for row in mine if row["grade"] is not None]
    result = {
        "version": task.version,
        "ungraded": len(mine) - len(grades),
        "tokens": round(sum(row["tokens"] for row in mine) / len(mine), 2),
        **task.aggregate(details),
        **dataclasses.asdict(within_0_and_1(interval(list(grades.values())))),
    }
    if base is None:
        return result
    theirs = {r["item_id"]: r["grade"] for r in base.rows(["task", "item_id", "grade"]) if r["task"] == task.name}
    both = [item for item in grades if theirs.get(item) is not None]
    if not both:
        raise BnfctlError(f"{task.name}: policy and base share no graded item", hint="use the same --limit for both")
    gain = statistics.paired_difference([grades[i] for i in both], [theirs[i] for i in both])
    return {
        **result, "base_mean": sum(theirs[i] for i in both) / len(both), "paired": gain.n,
        "gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high,
    }  # fmt: skip


def within_0_and_1(estimate: statistics.Estimate) -> statistics.Estimate:
    """Grades are shares: an interval that leaves [0, 1] ends there."""
    return dataclasses.replace(estimate, low=max(0.0, estimate.low), high=min(1.0, estimate.high))


def _parse_gate(gate: str, config: EvalConfig) -> tuple[str, str, str, float]:
    """(task, figure, comparison, bound) of `task[.figure]>=x`."""
    match = _GATE.fullmatch(gate)
    if match is None:
        raise UsageError(f"not a gate: '{gate}'", where="--require", hint="e.g. lab-chat>=0.5 or lab-chat.gain>=0.15")
    task, figure, comparison, bound = match.groups()
    if task not in config.tasks:
        raise UsageError(
            f"no task '{task}' here{nearest(task, config.tasks)}",
            where="--require",
            hint=f"tasks: {', '.join(config.tasks)}",
        )
    if (figure or "").startswith("gain") and config.base is None:
        raise UsageError("a gain needs --base", where="--require", hint="--base EVAL_ARTIFACT of the base model")
    try:
        value = float(bound)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"'{bound}' is not a number", where="--require", hint="e.g. lab-chat>=0.5")
    return task, figure or "mean", comparison, value


def check(config: EvalConfig, artifact: Artifact) -> None:
    """Apply the gates to a published result; GateError says what fell short and by how much."""
    short = []
    for gate in config.require:
        task, figure, comparison, bound = _parse_gate(gate, config)
        value = artifact.manifest.summary["tasks"][task][figure]
        holds = {">=": value >= bound, "<=": value <= bound, ">": value > bound, "<": value < bound}[comparison]
        if not holds:
            short.append(f"{task}.{figure} is {value:.4f}, not {comparison} {bound:g}")
    if short:
        raise GateError("; ".join(short), where=artifact.ref, hint=f"bnfctl show {artifact.ref} has all figures")


def table_of(artifact: Artifact) -> str:
    """The result as a table for people: mean, interval, gain."""
    results, rows = artifact.manifest.summary["tasks"], []
    compared = ["base", "gain", "95 % of the gain"] if any("gain" in r for r in results.values()) else []
    unanswered = ["no answer"] if any("no_answer" in r for r in results.values()) else []
    for name, r in results.items():
        cells = [name, r["n"], f"{r['mean']:.3f}", f"[{r['low']:.3f}, {r['high']:.3f}]"]
        if "gain" in r:
            cells += [f"{r['base_mean']:.3f}", f"{r['gain']:+.3f}", f"[{r['gain_low']:+.3f}, {r['gain_high']:+.3f}]"]
        elif compared:
            cells += ["", "", ""]
        rows.append([*cells, r["tokens"], *(f"{r['no_answer']:.1%}" if "no_answer" in r else "" for _ in unanswered)])
    columns = ["task", "n", "mean", "95 %", *compared, "tokens", *unanswered]
    return console.table(artifact.manifest.config["model"], columns, rows, right=range(1, len(columns)))
