"""Sampling: the model's responses to the items of tasks, graded where that needs nobody else, by worker processes."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from bnfctl import console, machine, pool, samplers, shards
from bnfctl.artifact import Draft, Pinned
from bnfctl.config import EvalConfig
from bnfctl.data.records import Candidate, Prompt
from bnfctl.evaluation.inputs import SHIFTS, AnyTask, make_tasks
from bnfctl.evaluation.rows import NO_ROOM, text_of
from bnfctl.evaluation.rows import SCHEMA as ROWS
from bnfctl.model.threads import cpu_threads
from bnfctl.options import as_json, canonical, from_json

SCHEMA = pa.schema(
    [
        *(field for field in ROWS if field.name not in ("model", "answers")),
        pa.field("prompt_ids", shards.IDS),
        pa.field("token_ids", shards.IDS),
    ]
)
"""One row per item; ids only for the task whose tokens are looked at again."""


def sample(config: EvalConfig, draft: Draft, names: Sequence[str], folder: Path, part: str) -> shards.Parts:
    """The rows of these tasks by the model in `folder`, in the tasks' order; what an earlier run made stays.

    part: the folder of the draft's scratch that keeps them.
    """
    request = {
        "config": as_json(dataclasses.replace(config, tasks=tuple(names))), "scratch": str(draft.scratch / part),
        "inputs": {name: dataclasses.asdict(pinned) for name, pinned in draft.inputs.items()}, "model": str(folder),
    }  # fmt: skip
    work = _items(canonical(request))
    parts = shards.Parts(draft.scratch / part, SCHEMA)
    done = parts.done()
    todo = [unit for unit in range(len(work.units)) if unit not in done]
    workers = max(1, min(pool.processes(config.devices, config.tensor_parallel), len(todo)))
    job = pool.Job(
        "bnfctl.evaluation.sampling:Sampling", request, draft.path / "log", workers, config.tensor_parallel,
        max(1, cpu_threads(folder) // workers), apart=config.sampler == "vllm" and machine.visible_gpus() > 0,
    )  # fmt: skip
    total = sum(map(len, work.prompts))
    with console.Progress(total, "items", total - sum(len(work.chunk(unit)) for unit in todo)) as progress:
        for one in pool.run(job, todo) if todo else ():
            draft.provenance.update(one.provenance)
            progress.advance(one.records)
    return parts


class _Items:
    """The tasks and their items; a unit of work is a chunk of one task's."""

    def __init__(self, config: EvalConfig, inputs: Mapping[str, Pinned]) -> None:
        self.size = config.chunk
        self.tasks = list(make_tasks(config, inputs).values())
        self.prompts = [task.requests(config.limit) for task in self.tasks]
        sizes = [range(-(-len(prompts) // config.chunk)) for prompts in self.prompts]
        self.units = [(number, index) for number, chunks in enumerate(sizes) for index in chunks]
        """(number of the task, number of the chunk in it)."""

    def chunk(self, unit: int) -> Sequence[Prompt]:
        number, index = self.units[unit]
        return self.prompts[number][index * self.size : (index + 1) * self.size]


@lru_cache(maxsize=2)
def _items(request: bytes) -> _Items:
    """The items of a request to `Sampling`; read once where the work is done in this process."""
    asked = json.loads(request)
    inputs = {name: Pinned(**raw) for name, raw in asked["inputs"].items()}
    return _Items(from_json(EvalConfig, asked["config"]), inputs)


class Sampling:
    """Samples and grades chunks of items and saves each: in this process, or in a worker of its own."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.config = from_json(EvalConfig, request["config"])
        self.folder = Path(request["model"])
        self.items = _items(canonical(request))
        self.parts = shards.Parts(Path(request["scratch"]), SCHEMA)
        self._sampler: samplers.Sampler | None = None

    @property
    def provenance(self) -> dict[str, Any]:
        return {"engine": self._sampler.version} if self._sampler is not None else {}

    def run(self, units: Iterable[int]) -> Iterator[tuple[int, int, int]]:
        """(unit, its items, its tokens) of each unit that is saved; the next task's wait for the last of this one."""
        for number, of_task in groupby(units, lambda unit: self.items.units[unit][0]):
            for unit, rows in self._sample(self.items.tasks[number], of_task):
                self.parts.write(unit, rows)
                yield unit, len(rows), sum(row["tokens"] for row in rows)

    def _sample(self, task: AnyTask, units: Iterable[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        decoding = self._decoding(task)
        if self._sampler is None:  # the model is loaded once, for the decodings of all tasks
            self._sampler = samplers.make(self.config.sampler, self.folder, decoding)
        pulled: dict[int, int] = {}

        def chunks() -> Iterator[samplers.Chunk]:
            for unit in units:
                index = self.items.units[unit][1]
                pulled[index] = unit
                chunk = self.items.chunk(unit)
                yield index, list(samplers.check_prompts(self.folder, chunk, decoding, "drop", Counter()))

        for index, candidates in self._sampler.sample(chunks(), decoding):
            unit = pulled.pop(index)
            found = {candidate.prompt_id: candidate for candidate in candidates}
            chunk = self.items.chunk(unit)
            yield unit, [_row(task, prompt, found.get(prompt.id) or _nothing(prompt)) for prompt in chunk]

    def _decoding(self, task: AnyTask) -> samplers.Decoding:
        config = self.config
        return samplers.Decoding(
            n=1, **dataclasses.asdict(task.decoding), seed=config.seed, chunk=config.chunk, dtype=config.dtype,
            gpu_memory=config.gpu_memory, trust_remote_code=config.trust_remote_code,
            chat_template_kwargs=config.chat_template_kwargs, tensor_parallel=config.tensor_parallel, long_prompts="drop",
        )  # fmt: skip


def _nothing(prompt: Prompt) -> Candidate:
    """The response to a prompt that fills the model's context: empty, as the model can say nothing to it."""
    return Candidate(prompt.id, 0, "", [], NO_ROOM, prompt_ids=[])


def _row(task: AnyTask, prompt: Prompt, candidate: Candidate) -> dict[str, Any]:
    """The row of one response; a judged task's grade comes later."""
    row = {
        "task": task.name,
        "item_id": prompt.id,
        "prompt": list(prompt.messages),
        "response": candidate.text,
        "tokens": len(candidate.token_ids or ()),
        "finish_reason": candidate.finish_reason,
    }
    if task.name == SHIFTS:
        row |= {"prompt_ids": candidate.prompt_ids, "token_ids": candidate.token_ids}
    elif hasattr(task, "grade"):
        graded = task.grade(prompt, candidate.text)
        row |= {"grade": graded.value, "extra": text_of(graded.extra)}
    return row


def candidates_of(rows: Iterable[dict[str, Any]]) -> Iterator[Candidate]:
    """The candidates of rows that kept their ids; there is nothing to measure where there was no room."""
    for row in (row for row in rows if row["finish_reason"] != NO_ROOM):
        yield Candidate(
            prompt_id=row["item_id"], sample=0, text=row["response"], token_ids=row["token_ids"],
            prompt_ids=row["prompt_ids"], finish_reason=row["finish_reason"],
        )  # fmt: skip
