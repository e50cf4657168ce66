"""score: give every candidate a reward."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from bnfctl import console, scorers, shards
from bnfctl.artifact import Draft, Plan, Store
from bnfctl.config import GenerateConfig, ScoreConfig
from bnfctl.data.candidates import groups
from bnfctl.data.records import Group, Reward
from bnfctl.errors import UsageError
from bnfctl.machine import resolve_dtype
from bnfctl.model.source import model_dir, pin_model
from bnfctl.stages import Prerequisite
from bnfctl.tables import RULES, load

STAGE, VERSION = "score", 1
UNIT = 256
"""Groups per part: what a killed run loses at most."""

SCHEMA = pa.schema(
    [("prompt_id", pa.string()), ("sample", pa.int32()), ("reward", pa.float64()), ("extra", pa.string())]
)
"""One row per candidate, in the order of the generate artifact; extra is JSON, or null."""


def plan(config: ScoreConfig, store: Store) -> Plan | Prerequisite:
    """Resolve the candidates and the reward model; a file of responses is imported first."""
    if config.input.endswith(".jsonl") and store.search(config.input) is None:
        if not Path(config.input).is_file():
            raise UsageError(f"no such file '{config.input}'", where="INPUT", hint="check the path")
        imported = GenerateConfig(prompts=config.input, sampler="file")
        return Prerequisite("generate", imported, "input", f"{config.input} is imported as candidates")
    inputs = {"input": store.find(config.input, "generate", "INPUT").pinned()}
    if config.scorer != "rules":
        if config.model is None:
            hint = scorers.MODEL_HINTS[config.scorer]
            raise UsageError(f"{config.scorer} needs a model", where="--model", hint=hint)
        inputs["model"] = pin_model(config.model, store)
        config = dataclasses.replace(config, dtype=resolve_dtype(config.dtype))
    if config.scorer == "rules" and config.rule == "regex":
        _check_pattern(config.pattern)
    versions = {config.rule: rule_version(config.rule)} if config.scorer == "rules" else {}
    return Plan(STAGE, VERSION, config, inputs, versions=versions)


def run(config: ScoreConfig, draft: Draft) -> dict[str, Any]:
    """Write one row per candidate; returns the counts and the mean reward."""
    source = draft.artifact("input")
    total = source.manifest.summary["prompts"]
    folder = model_dir(draft.inputs["model"]) if "model" in draft.inputs else None
    parts = shards.Parts(draft.scratch / "parts", SCHEMA)
    done = parts.done()
    scorer = scorers.make(config, folder) if len(done) * UNIT < total else None
    if scorer is not None:
        draft.provenance["engine"] = scorer.version
    with console.Progress(total, "prompts") as progress:
        for unit, batch in enumerate(_units(groups(source.rows()))):
            if unit not in done:
                assert scorer is not None
                parts.write(unit, [row for group, rewards in zip(batch, scorer.score(batch), strict=True)
                                   for row in _rows(group, rewards)])  # fmt: skip
                console.check_stop()
            progress.advance(len(batch))
    parts.publish(draft.path / "rows")
    return _measure(shards.read_rows(draft.path / "rows", ["reward"]))


def rule_version(name: str) -> str:
    """The version of the file that a rule is in: another one may give other rewards."""
    return str(sys.modules[load(RULES, name, "rule").__module__].VERSION)


def _check_pattern(pattern: str | None) -> None:
    if pattern is None:
        raise UsageError("the rule regex needs a pattern", where="--pattern", hint="--pattern 'answer: (\\d+)'")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"not a regular expression: {error}", where="--pattern", hint="quote it for the shell"
        ) from None


def _units(found: Iterator[Group]) -> Iterator[list[Group]]:
    while batch := list(islice(found, UNIT)):
        yield batch


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
