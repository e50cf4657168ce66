"""generate: sample n responses to every prompt, or import responses that were made elsewhere."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from bnfctl import console, samplers, shards
from bnfctl.artifact import Draft, Plan, Store
from bnfctl.config import GenerateConfig
from bnfctl.data.candidates import SCHEMA, candidate_rows
from bnfctl.data.chat import tokenizer_digest
from bnfctl.data.records import Prompt
from bnfctl.data.sources import pin_data, read_prompts
from bnfctl.errors import UsageError
from bnfctl.machine import resolve_dtype
from bnfctl.model.source import model_dir, pin_model
from bnfctl.samplers.file import FileSampler

STAGE, VERSION = "generate", 1


def plan(config: GenerateConfig, store: Store) -> Plan:
    """Resolve the sampler, the model and the prompts."""
    sampler = samplers.resolve(config.sampler)
    notes = (f"sampler: {sampler}",) if config.sampler == "auto" else ()
    config = dataclasses.replace(config, sampler=sampler, dtype=resolve_dtype(config.dtype))
    inputs = {"prompts": pin_data(config.prompts, store, "--prompts", config.split)}
    if sampler != "file":
        if config.model is None:
            raise UsageError("model is missing", where="--model", hint="a hub id, a folder, a train artifact or lab")
        inputs["model"] = pin_model(config.model, store)
    return Plan(STAGE, VERSION, config, inputs, notes)


def run(config: GenerateConfig, draft: Draft) -> dict[str, Any]:
    """Write one row per candidate; returns the counts."""
    if config.sampler == "file":
        return _import(config, draft)
    prompts, repeated = read_prompts(
        draft.inputs["prompts"], split=config.split, subset=config.subset, prompt_column=config.prompt_column,
        answer_column=config.answer_column, limit=config.limit,
    )  # fmt: skip
    folder = model_dir(draft.inputs["model"])
    decoding = samplers.Decoding.of(config)
    kept, dropped = samplers.check_prompts(folder, prompts, decoding, config.long_prompts)
    rows = sample_rows(config.sampler, folder, kept, decoding, draft)
    summary = {"prompts": len(kept), "repeated": repeated, "dropped_long": dropped, **_measure(rows)}
    return {**summary, "tokenizer": tokenizer_digest(folder)}


def sample_rows(
    sampler_name: str, folder: Path, prompts: Sequence[Prompt], decoding: samplers.Decoding, draft: Draft
) -> Path:
    """Sample chunk by chunk, saving each; a chunk that an earlier run saved is not sampled again."""
    chunks = [prompts[start : start + decoding.chunk] for start in range(0, len(prompts), decoding.chunk)]
    parts = shards.Parts(draft.scratch / "parts", SCHEMA)
    done = parts.done()
    todo = [index for index in range(len(chunks)) if index not in done]
    if done:
        console.say(f"resuming: {len(done)} of {len(chunks)} chunks are there")
    if todo:
        sampler = samplers.make(sampler_name, folder, decoding)
        draft.provenance["engine"] = sampler.version
        started, tokens = time.monotonic(), 0
        with console.Progress(len(prompts), "prompts", sum(len(chunks[index]) for index in done)) as progress:
            for index in todo:
                candidates = sampler.sample(chunks[index], index)
                parts.write(index, list(candidate_rows(chunks[index], candidates)))
                tokens += sum(len(candidate.token_ids or ()) for candidate in candidates)
                progress.advance(len(chunks[index]))
                console.check_stop()
        draft.provenance["tokens_per_second"] = round(tokens / (time.monotonic() - started), 1)
    parts.publish(draft.path / "rows")
    return draft.path / "rows"


def _import(config: GenerateConfig, draft: Draft) -> dict[str, Any]:
    path = draft.inputs["prompts"].path
    if path is None:
        raise UsageError("the file sampler reads a JSONL file", where="--prompts", hint="give the path of one")
    prompts = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal prompts
        for group in islice(FileSampler(Path(path)).groups(), config.limit):
            prompts += 1
            yield from candidate_rows([group.prompt], group.candidates)

    shards.write_shards(draft.path / "rows", rows(), SCHEMA)
    return {"prompts": prompts, **_measure(draft.path / "rows"), "tokenizer": None}


def _measure(rows: Path) -> dict[str, Any]:
    count = tokens = stopped = 0
    for row in shards.read_rows(rows, ["token_ids", "finish_reason"]):
        count += 1
        tokens += len(row["token_ids"] or ())
        stopped += row["finish_reason"] == "stop"
    share = {"tokens_per_response": round(tokens / count, 1), "cut": count - stopped} if tokens else {}
    return {"candidates": count, **share}
