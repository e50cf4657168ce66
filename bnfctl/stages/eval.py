"""eval: grade a model on tasks, and compare it with another on the same items."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from bnfctl import console, machine, pool, samplers, shards, tasks
from bnfctl.artifact import Artifact, Draft, Pinned, Plan, Store
from bnfctl.config import EvalConfig
from bnfctl.data.records import Candidate, Prompt, Reward
from bnfctl.data.sources import pin_data
from bnfctl.errors import BnfctlError, GateError, UsageError, nearest
from bnfctl.model.source import model_dir, pin_model
from bnfctl.model.threads import cpu_threads
from bnfctl.options import as_json, canonical, from_json, refuse
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
    if sampler != "vllm":
        refuse(config, ["tensor_parallel"], f"is for --sampler vllm, not {sampler}")
    pool.processes(config.devices, config.tensor_parallel)
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
        dataclasses.replace(config, sampler=sampler, dtype=machine.resolve_dtype(config.dtype)),
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
    request = {"config": as_json(config), "scratch": str(draft.scratch), "model": str(folder),
               "inputs": {name: dataclasses.asdict(pinned) for name, pinned in draft.inputs.items()}}  # fmt: skip
    work = _items(canonical(request))
    parts = shards.Parts(draft.scratch / "parts", SCHEMA)
    done = parts.done()
    todo = [unit for unit in range(len(work.units)) if unit not in done]
    workers = max(1, min(pool.processes(config.devices, config.tensor_parallel), len(todo)))
    job = pool.Job(
        "bnfctl.stages.eval:Grading", request, draft.path / "log", workers, config.tensor_parallel,
        max(1, cpu_threads(folder) // workers), apart=config.sampler == "vllm" and machine.visible_gpus() > 0,
    )  # fmt: skip
    total = sum(map(len, work.prompts))
    with console.Progress(total, "items", total - sum(len(work.chunk(unit)) for unit in todo)) as progress:
        for one in pool.run(job, todo) if todo else ():
            draft.provenance.update(one.provenance)
            progress.advance(one.records)
    parts.publish(draft.path / "rows")
    base = draft.artifact("base") if "base" in draft.inputs else None
    rows = list(shards.read_rows(draft.path / "rows", ["task", "item_id", "tokens", "grade", "extra"]))
    return {"tasks": {task.name: _aggregate(task, rows, base) for task in work.tasks}}


class _Items:
    """The tasks and their items; a unit of work is a chunk of one task's."""

    def __init__(self, config: EvalConfig, inputs: Mapping[str, Pinned]) -> None:
        self.size = config.chunk
        self.tasks = list(_tasks(config, inputs).values())
        self.prompts = [task.requests(config.limit) for task in self.tasks]
        sizes = [range(-(-len(prompts) // config.chunk)) for prompts in self.prompts]
        self.units = [(number, index) for number, chunks in enumerate(sizes) for index in chunks]
        """(number of the task, number of the chunk in it)."""

    def chunk(self, unit: int) -> Sequence[Prompt]:
        number, index = self.units[unit]
        return self.prompts[number][index * self.size : (index + 1) * self.size]


@lru_cache(maxsize=1)
def _items(request: bytes) -> _Items:
    """The items of a request to `Grading`; read once where the work is done in this process."""
    asked = json.loads(request)
    inputs = {name: Pinned(**raw) for name, raw in asked["inputs"].items()}
    return _Items(from_json(EvalConfig, asked["config"]), inputs)


class Grading:
    """Samples and grades chunks of items and saves each: in this process, or in a worker of its own."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.config = from_json(EvalConfig, request["config"])
        self.folder = Path(request["model"])
        self.items = _items(canonical(request))
        self.parts = shards.Parts(Path(request["scratch"]) / "parts", SCHEMA)
        self._sampler: samplers.Sampler | None = None

    @property
    def provenance(self) -> dict[str, Any]:
        return {"engine": self._sampler.version} if self._sampler is not None else {}

    def run(self, units: Iterable[int]) -> Iterator[tuple[int, int, int]]:
        """(unit, its items, its tokens) of each unit that is saved; the next task's wait for the last of this one."""
        for number, of_task in groupby(units, lambda unit: self.items.units[unit][0]):
            for unit, rows in self._grade(self.items.tasks[number], of_task):
                self.parts.write(unit, rows)
                yield unit, len(rows), sum(row["tokens"] for row in rows)

    def _grade(self, task: tasks.Task, units: Iterable[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        decoding = self._decoding(task)
        if self._sampler is None:  # the model is loaded once, for the decodings of all tasks
            self._sampler = samplers.make(self.config.sampler, self.folder, decoding)
        pulled: dict[int, tuple[int, dict[str, Prompt]]] = {}

        def chunks() -> Iterator[samplers.Chunk]:
            for unit in units:
                chunk = samplers.check_prompts(self.folder, self.items.chunk(unit), decoding, "error", Counter())
                by_id = {prompt.id: prompt for prompt in chunk}
                index = self.items.units[unit][1]
                pulled[index] = unit, by_id
                yield index, list(by_id.values())

        for index, candidates in self._sampler.sample(chunks(), decoding):
            unit, by_id = pulled.pop(index)
            yield unit, [_row(task, by_id[candidate.prompt_id], candidate) for candidate in candidates]

    def _decoding(self, task: tasks.Task) -> samplers.Decoding:
        config = self.config
        return samplers.Decoding(
            n=1, **dataclasses.asdict(task.decoding), seed=config.seed, chunk=config.chunk, dtype=config.dtype,
            gpu_memory=config.gpu_memory, trust_remote_code=config.trust_remote_code,
            chat_template_kwargs=config.chat_template_kwargs, tensor_parallel=config.tensor_parallel,
        )  # fmt: skip


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
        hint = "a larger --limit, or items with known answers"
        raise BnfctlError(f"{task.name}: no item could be graded", where=f"--tasks {task.name}", hint=hint)
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
        what = f"{task.name}: policy and base share no graded item"
        raise BnfctlError(what, where="--base", hint="use the same --limit for both")
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
