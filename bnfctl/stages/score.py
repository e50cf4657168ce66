"""score: give every candidate a reward."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from bnfctl import console, machine, pool, scorers, shards
from bnfctl.artifact import Artifact, Draft, Pinned, Plan, Store
from bnfctl.config import ABOUT_SERVERS, GenerateConfig, ScoreConfig
from bnfctl.data.candidates import groups
from bnfctl.data.files import FILE_ENDINGS
from bnfctl.data.records import Group, Reward
from bnfctl.errors import UsageError
from bnfctl.model.source import model_dir, pin_model
from bnfctl.model.threads import cpu_threads
from bnfctl.options import as_json, from_json, refuse
from bnfctl.scorers import verdicts
from bnfctl.scorers.rules import compiled, version_of
from bnfctl.scorers.thinking import WithoutThinking
from bnfctl.stages import Prerequisite, name_served

STAGE, VERSION = "score", 1
UNIT = 256
"""Groups per part: what a killed run loses at most."""

_MODEL = ("model", "dtype", "batch_tokens")
_CHAT = (*_MODEL, "max_length")
_JUDGE = ("judge_mode", "judge_prompt", "judge_tokens", "judge_temperature")
_USED: dict[str, tuple[str, ...]] = {
    "rules": ("rule", "pattern"),
    "reward-model": (*_CHAT, "engine", "gpu_memory", "trust_remote_code"),
    "pairrm": _MODEL,
    "armorm": _CHAT,
    "judge": (*_JUDGE, *ABOUT_SERVERS),
}
"""The fields that a scorer has a use for, beside those that all have."""
_OF_SOME = {name for names in _USED.values() for name in names}

SCHEMA = pa.schema(
    [("prompt_id", pa.string()), ("sample", pa.int32()), ("reward", pa.float64()), ("extra", pa.string())]
)
"""One row per candidate, in the order of the generate artifact; extra is JSON, or null."""


def plan(config: ScoreConfig, store: Store) -> Plan | Prerequisite:
    """Resolve the candidates and what scores them; a file or folder of responses is imported first."""
    data = store.search(config.input) is None and _looks_like_data(config.input)
    if data and not Path(config.input).expanduser().exists():
        raise UsageError(f"no such file '{config.input}'", where="INPUT", hint="check the path")
    # before the import, which may take long: a wrong flag is told at once, and by a dry run
    resolved, inputs, versions = _resolve(config, store)
    if data:
        imported = GenerateConfig(prompts=config.input, sampler="file")
        return Prerequisite("generate", imported, "input", f"{config.input} is imported as candidates")
    inputs["input"] = store.find(config.input, "generate", "INPUT").pinned()
    return Plan(STAGE, VERSION, resolved, inputs, versions=versions)


def _resolve(config: ScoreConfig, store: Store) -> tuple[ScoreConfig, dict[str, Pinned], dict[str, str]]:
    """What scores: the config without `auto`, the inputs beside the candidates, versions; UsageError as in `plan`."""
    inputs: dict[str, Pinned] = {}
    versions = {}
    refuse(config, sorted(_OF_SOME.difference(_USED[config.scorer])), f"is of no use to --scorer {config.scorer}")
    if config.scorer == "rules":
        if config.rule == "regex":
            compiled(config.pattern)
        else:
            refuse(config, ["pattern"], f"is for --rule regex, not {config.rule}")
        versions[config.rule] = version_of(config.rule)
    elif config.scorer == "judge":
        if config.judge_prompt is not None:
            inputs["judge_prompt"] = _pin_text(config.judge_prompt, store)
        config, unknown = _resolve_judge(config)
        inputs |= unknown
        versions["judge"] = verdicts.VERSION
    else:
        if config.model is None:
            hint = scorers.MODEL_HINTS[config.scorer]
            raise UsageError(f"{config.scorer} needs a model", where="--model", hint=hint)
        inputs["model"] = pin_model(config.model, store)
        config = dataclasses.replace(config, dtype=machine.resolve_dtype(config.dtype))
    _processes(config)
    return config, inputs, versions


def _looks_like_data(ref: str) -> bool:
    path = Path(ref).expanduser()
    return path.suffix.lower() in FILE_ENDINGS or path.exists()


def _pin_text(path: str, store: Store) -> Pinned:
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise UsageError(f"no such file '{path}'", where="--judge-prompt", hint="check the path")
    return Pinned("file", str(file), store.digests.file(file), str(file))


def _resolve_judge(config: ScoreConfig) -> tuple[ScoreConfig, dict[str, Pinned]]:
    """As name_served: without a name the servers are asked for their only model."""
    if not config.server:
        raise UsageError("server is missing", where="--server", hint="--server http://host:8000/v1, for each server")
    from bnfctl.scorers import judge

    judge.check(config)
    return name_served(config)


def _processes(config: ScoreConfig) -> int:
    """How many processes score; UsageError where `--devices` asks for what is not there."""
    if config.scorer == "judge":
        if config.devices not in (None, 1):
            hint = "--concurrency says how many requests are in flight"
            raise UsageError("a judge is asked by one process", where="--devices", hint=hint)
        return 1
    if config.scorer == "rules":
        return config.devices or 1  # of no use to a GPU
    return pool.processes(config.devices)


def run(config: ScoreConfig, draft: Draft) -> dict[str, Any]:
    """Write one row per candidate; returns the counts and the mean reward."""
    source = draft.artifact("input")
    total = source.manifest.summary["prompts"]
    folder = model_dir(draft.inputs["model"]) if "model" in draft.inputs else None
    parts = shards.Parts(draft.scratch / "parts", SCHEMA)
    done = parts.done()
    bounds = _bounds(row["prompt_id"] for row in source.rows(["prompt_id"]))
    todo = [unit for unit in range(len(bounds) - 1) if unit not in done]
    workers = max(1, min(_processes(config), len(todo)))
    request = {"config": as_json(config), "scratch": str(draft.scratch), "input": str(source.path), "bounds": bounds,
               "model": str(folder) if folder else None}  # fmt: skip
    job = pool.Job(
        "bnfctl.stages.score:Scoring", request, draft.path / "log", workers,
        threads=max(1, cpu_threads(folder) // workers) if folder else 1,
        apart=config.scorer == "reward-model" and config.engine == "vllm" and machine.visible_gpus() > 0,
    )  # fmt: skip
    with console.Progress(total, "prompts", min(total, len(done) * UNIT)) as progress:
        for one in pool.run(job, todo) if todo else ():
            draft.provenance.update(one.provenance)
            progress.advance(one.records)
    parts.publish(draft.path / "rows")
    summary = _measure(shards.read_rows(draft.path / "rows", ["reward"]))
    null, count = summary["null_rewards"], summary["candidates"]
    if null == count:
        console.say('warning: no candidate has a reward; bnfctl show --rows 5 says why, under "extra"')
    elif null:
        console.say(f'{null} of {count} candidates have no reward; bnfctl show --rows says why, under "extra"')
    return summary


def _bounds(ids: Iterable[str]) -> list[int]:
    """The first row of every unit, and the end of the last one: a unit is UNIT whole groups."""
    starts, row = [], -1
    groups_before = 0
    previous: str | None = None
    for row, prompt in enumerate(ids):
        if prompt != previous:
            if groups_before % UNIT == 0:
                starts.append(row)
            groups_before, previous = groups_before + 1, prompt
    return [*starts, row + 1]


class Scoring:
    """Scores units of groups and saves each: in this process, or in a worker of its own."""

    def __init__(self, request: dict[str, Any]) -> None:
        config = from_json(ScoreConfig, request["config"])
        self.judge = config.scorer == "judge"
        scratch = Path(request["scratch"])
        self.bounds = request["bounds"]
        self.parts = shards.Parts(scratch / "parts", SCHEMA)
        self.rows = shards.Slices(Artifact(Path(request["input"])).shards())  # hashed here, once
        folder = Path(request["model"]) if request["model"] else None
        self.scorer = scorers.make(config, folder, scratch / "answers.sqlite")

    @property
    def provenance(self) -> dict[str, Any]:
        """Of the scorer; a judge also says how much it was asked."""
        inner = self.scorer.scorer if isinstance(self.scorer, WithoutThinking) else self.scorer
        usage = getattr(inner, "usage", None)
        return {"engine": self.scorer.version, **({"usage": usage} if usage else {})}

    def run(self, units: Iterable[int]) -> Iterator[tuple[int, int, int]]:
        """(unit, its groups, 0) of each unit that is saved.

        Most scorers get a unit at a time, so that what is scored together, and so the last bit of a reward, does not
        depend on where a run was resumed.  A judge gets all as one stream: nobody waits for the end of a unit.
        """
        for together in [units] if self.judge else ([unit] for unit in units):
            yield from self._score(together)

    def _score(self, units: Iterable[int]) -> Iterator[tuple[int, int, int]]:
        pulled: deque[tuple[int, list[Group]]] = deque()

        def stream() -> Iterator[Group]:
            for unit in units:
                batch = list(groups(self.rows.read(self.bounds[unit], self.bounds[unit + 1])))
                pulled.append((unit, batch))
                yield from batch

        rewards = iter(self.scorer.score(stream()))
        for first in rewards:
            unit, batch = pulled.popleft()
            of_groups = [first, *islice(rewards, len(batch) - 1)]
            rows = [row for group, of_group in zip(batch, of_groups, strict=True) for row in _rows(group, of_group)]
            self.parts.write(unit, rows)
            yield unit, len(batch), 0


def _rows(group: Group, rewards: list[Reward]) -> Iterator[dict[str, Any]]:
    for candidate, reward in zip(group.candidates, rewards, strict=True):
        extra = json.dumps(reward.extra, sort_keys=True, ensure_ascii=False) if reward.extra else None
        yield {"prompt_id": group.prompt.id, "sample": candidate.sample, "reward": reward.value, "extra": extra}


def _measure(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    count, null, total = 0, 0, 0.0
    for row in rows:
        count += 1
        null += row["reward"] is None
        total += row["reward"] or 0.0
    mean = round(total / (count - null), 6) if count > null else None
    return {"candidates": count, "null_rewards": null, "mean_reward": mean}
