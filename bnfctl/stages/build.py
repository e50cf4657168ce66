"""build: turn scored candidates, or a ready preference set, into training records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bnfctl import console, shards
from bnfctl.artifact import STAGES, Artifact, Draft, Plan, Store
from bnfctl.config import BuildConfig
from bnfctl.data import pairing
from bnfctl.data.candidates import groups
from bnfctl.data.preferences import CHOSEN, REJECTED, read_preferences
from bnfctl.data.records import Group
from bnfctl.data.sources import pin_data, read_rows
from bnfctl.errors import BnfctlError, UsageError

STAGE, VERSION = "build", 1


def plan(config: BuildConfig, store: Store) -> Plan:
    """Resolve the scores, or the preference set that takes their place."""
    named = config.input.split("/")[0] in STAGES and not Path(config.input).exists()
    if named or store.search(config.input) is not None:
        source = store.find(config.input, "score", "INPUT")
        candidates = Artifact(source.input_path("input"))
        if candidates.manifest.digest != source.manifest.inputs["input"]["digest"]:
            raise UsageError(
                "the candidates were made again since they were scored", where=source.ref,
                hint=f"bnfctl score {candidates.ref}, and build from that",
            )  # fmt: skip
        return Plan(STAGE, VERSION, config, {"input": source.pinned(), "candidates": candidates.pinned()})
    pinned = pin_data(config.input, store, "INPUT", config.split)
    return Plan(STAGE, VERSION, config, {"input": pinned})


def run(config: BuildConfig, draft: Draft) -> dict[str, Any]:
    """Write one row per record; returns the counts."""
    counts: Counter[str] = Counter()
    scored = draft.inputs["input"].kind == "artifact"
    rows = _from_scores(config, draft, counts) if scored else _from_preferences(config, draft, counts)
    shards.write_shards(draft.path / "rows", _counted(rows, counts), pairing.SCHEMA)
    if not counts["prompts"]:
        raise UsageError("the input is empty", where=draft.inputs["input"].ref, hint="give a set with at least one row")
    if not counts["records"]:
        raise BnfctlError(
            f"no records: {dict(counts) or 'the input is empty'}", where=draft.inputs["input"].ref,
            hint="rewards that are all equal or null give no pairs: see bnfctl show of the scores",
        )  # fmt: skip
    return {**_origin(draft), **counts}


def _from_scores(config: BuildConfig, draft: Draft, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    rewards = draft.artifact("input").rows(["prompt_id", "sample", "reward"])
    total = draft.artifact("candidates").manifest.summary["prompts"]
    with console.Progress(total, "prompts") as progress:
        for group in groups(draft.artifact("candidates").rows()):
            values = []
            for candidate in group.candidates:
                row = next(rewards, {})
                if (row.get("prompt_id"), row.get("sample")) != (group.prompt.id, candidate.sample):
                    raise BnfctlError("scores and candidates do not match", where=group.prompt.id, hint="score again")
                values.append(row["reward"])
            counts["prompts"] += 1
            progress.advance()
            found = pairing.best_and_worst(values, config.min_margin)
            if isinstance(found, str):
                counts[f"dropped_{found}"] += 1
            else:
                sides = {side: (index, values[index]) for side, index in zip(pairing.SIDES, found, strict=True)}
                yield _record(config, group.prompt.id, group, sides)
            if counts["prompts"] == config.limit:
                return


def _from_preferences(config: BuildConfig, draft: Draft, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    for record_id, group in read_preferences(read_rows(draft.inputs["input"], config.split, config.subset)):
        counts["prompts"] += 1
        chosen, rejected = group.candidates
        if chosen.text == rejected.text:
            counts["dropped_identical"] += 1
        else:
            yield _record(config, record_id, group, {"chosen": (CHOSEN, None), "rejected": (REJECTED, None)})
        if counts["prompts"] == config.limit:
            return


def _record(
    config: BuildConfig, record_id: str, group: Group, sides: dict[str, tuple[int, float | None]]
) -> dict[str, Any]:
    prompt_id = group.prompt.id
    kept = pairing.kept_sides(config.seed, prompt_id, config.pairing_ratio)
    split = pairing.split_of(config.seed, prompt_id, config.test_fraction)
    return pairing.record_of(record_id, group, {side: sides[side] for side in kept}, split)


def _counted(rows: Iterator[dict[str, Any]], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    for row in rows:
        there = [side for side in pairing.SIDES if row.get(f"{side}_text") is not None]
        counts["records"] += 1
        counts[row["split"]] += 1
        counts["pairs" if len(there) == 2 else f"{there[0]}_only"] += 1
        yield row


def _origin(draft: Draft) -> dict[str, Any]:
    """Which model the responses came from, and the tokenizer of their ids; None where they are text only."""
    if "candidates" not in draft.inputs:
        return {"model": None, "tokenizer": None}
    manifest = draft.artifact("candidates").manifest
    return {"model": manifest.inputs.get("model"), "tokenizer": manifest.summary["tokenizer"]}
