"""build: turn scored candidates, or a ready set, into training records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bnfctl import console, shards
from bnfctl.artifact import STAGES, Artifact, Draft, Pinned, Plan, Store
from bnfctl.config import BuildConfig
from bnfctl.data import flags, pairing, ready, scored
from bnfctl.data.imports import read_records
from bnfctl.data.sources import pin_data, read_rows
from bnfctl.errors import BnfctlError, UsageError

STAGE, VERSION = "build", 2


def plan(config: BuildConfig, store: Store) -> Plan:
    """Resolve the scores, or the set that takes their place, and refuse flags that don't go together."""
    named = config.input.split("/")[0] in STAGES and not Path(config.input).exists()
    from_scores = named or store.search(config.input) is not None
    flags.check(config, from_scores)
    if not from_scores:
        pinned = pin_data(config.input, store, "INPUT", config.split)
        if pinned.kind == "lab":
            hint = f"bnfctl generate --prompts {config.input}, score, and build from that"
            raise UsageError("the lab has prompts, no preference set", where="INPUT", hint=hint)
        return Plan(STAGE, VERSION, config, {"input": pinned})
    source = store.find(config.input, "score", "INPUT")
    candidates = _candidates(source)
    scores = {"input": source}
    for number, ref in enumerate(config.also):
        other = _of_the_same(store.find(ref, "score", "--also"), candidates, f"--also {ref}")
        if other.ref in {artifact.ref for artifact in scores.values()}:
            raise UsageError(
                f"{other.ref} is there twice", where=f"--also {ref}", hint="--weights 2,1 counts one twice"
            )
        scores[f"also{number}"] = other
    _check_global(config, scores)
    if config.filter is not None:
        gate = store.find(config.filter, "score", "--filter")
        scores["filter"] = _of_the_same(gate, candidates, f"--filter {config.filter}")
    inputs = {name: artifact.pinned() for name, artifact in scores.items()}
    return Plan(STAGE, VERSION, config, {**inputs, "candidates": candidates.pinned()})


def _candidates(source: Artifact) -> Artifact:
    """What was scored; UsageError where it is no longer what it was then."""
    candidates = Artifact(source.input_path("input"))
    if candidates.manifest.digest != source.manifest.inputs["input"]["digest"]:
        raise UsageError(
            "the candidates were made again since they were scored", where=source.ref,
            hint=f"bnfctl score {candidates.ref}, and build from that",
        )  # fmt: skip
    return candidates


def _of_the_same(other: Artifact, candidates: Artifact, where: str) -> Artifact:
    scored_there = other.manifest.inputs["input"]
    if scored_there["digest"] != candidates.manifest.digest:
        what = f"{other.ref} scores other candidates: {scored_there['ref']}, not {candidates.ref} as INPUT does"
        raise UsageError(
            what, where=where, hint=f"bnfctl score {candidates.ref} --scorer {other.manifest.config['scorer']}"
        )
    return other


def _check_global(config: BuildConfig, scores: dict[str, Artifact]) -> None:
    """UsageError where --scope global would compare rewards that mean nothing across prompts."""
    if config.scope != "global":
        return
    hint = "--scope prompt compares with the prompt's mean reward"
    for artifact in scores.values():
        if scored.scorer_of(artifact) in scored.RELATIVE_SCORERS:
            what = f"the rewards of {scored.scorer_of(artifact)} are relative to the prompt's other responses"
            raise UsageError(
                f"{what}: no threshold fits all prompts", where=f"--scope global, {artifact.ref}", hint=hint
            )
    if config.also and config.combine == "zscore":
        what = "--combine zscore makes rewards relative to the prompt's other responses: no threshold fits all prompts"
        raise UsageError(what, where="--scope global", hint=f"--combine raw, or {hint}")


def run(config: BuildConfig, draft: Draft) -> dict[str, Any]:
    """Write one row per record; returns the counts."""
    counts: Counter[str] = Counter()
    made = (
        _from_scores(config, draft, counts) if _is_scored(draft.inputs["input"]) else _from_set(config, draft, counts)
    )
    shards.write_tables(draft.path / "rows", shards.recut(_counted(made, counts), pairing.SCHEMA))
    if not counts["prompts"] + counts["rows"]:
        raise UsageError("the input is empty", where=draft.inputs["input"].ref, hint="give a set with at least one row")
    if not counts["records"]:
        raise BnfctlError(
            f"no records: {', '.join(f'{name} {number}' for name, number in counts.items() if number)}",
            where=draft.inputs["input"].ref, hint=_why_none(config, draft),
        )  # fmt: skip
    return {**_origin(draft), **{name: number for name, number in counts.items() if number}}


def _is_scored(pinned: Pinned) -> bool:
    return pinned.kind == "artifact"


def _from_scores(config: BuildConfig, draft: Draft, counts: Counter[str]) -> Iterator[pa.Table]:
    scores = [draft.artifact(name) for name in ("input", *(f"also{number}" for number in range(len(config.also))))]
    gate = draft.artifact("filter") if config.filter is not None else None
    candidates = draft.artifact("candidates")
    total = candidates.manifest.summary["prompts"]
    with console.Progress(total if config.limit is None else min(total, config.limit), "prompts") as progress:
        for table in scored.records(config, candidates, scores, gate, counts):
            progress.advance(counts["prompts"] - progress.done)
            console.check_stop()
            yield table


def _from_set(config: BuildConfig, draft: Draft, counts: Counter[str]) -> Iterator[pa.Table]:
    found = read_records(read_rows(draft.inputs["input"], config.split, config.subset), config)
    for table in ready.records(config, found, counts):
        console.check_stop()
        yield table


def _counted(tables: Iterator[pa.Table], counts: Counter[str]) -> Iterator[pa.Table]:
    for table in tables:
        chosen_only, rejected_only = (table[f"{side}_text"].null_count for side in reversed(pairing.SIDES))
        train = pc.sum(pc.equal(table["split"], "train")).as_py() or 0
        counts["records"] += table.num_rows
        counts["train"] += train
        counts["test"] += table.num_rows - train
        counts["pairs"] += table.num_rows - chosen_only - rejected_only
        counts["chosen_only"] += chosen_only
        counts["rejected_only"] += rejected_only
        yield table


def _why_none(config: BuildConfig, draft: Draft) -> str:
    if not _is_scored(draft.inputs["input"]):
        return "the filters leave nothing: start without them"
    if config.choose == "threshold":
        return f"no reward reaches --good or --bad: see bnfctl show {draft.inputs['input'].ref}"
    return f"rewards that are all equal or null give no pairs: see bnfctl show {draft.inputs['input'].ref}"


def _origin(draft: Draft) -> dict[str, Any]:
    """Which model the responses came from, and the tokenizer of their ids; None where they are text only."""
    if "candidates" not in draft.inputs:
        return {"model": None, "tokenizer": None}
    manifest = draft.artifact("candidates").manifest
    return {"model": manifest.inputs.get("model"), "tokenizer": manifest.summary["tokenizer"]}
