"""generate: sample n responses to every prompt, or import responses that were made elsewhere."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from bnfctl import console, durable, machine, pool, samplers, shards
from bnfctl.artifact import Draft, Plan, Store
from bnfctl.config import ABOUT_SERVERS, GenerateConfig
from bnfctl.data.candidates import SCHEMA, candidate_rows
from bnfctl.data.chat import tokenizer_digest
from bnfctl.data.records import Prompt
from bnfctl.data.sources import pin_data, read_prompts
from bnfctl.errors import UsageError
from bnfctl.model.source import model_dir, pin_model
from bnfctl.model.threads import cpu_threads
from bnfctl.options import as_json, from_json, refuse
from bnfctl.samplers.file import FileSampler
from bnfctl.stages import name_served
from bnfctl.tables import SAMPLERS, load

STAGE, VERSION = "generate", 1
ENGINES = ("vllm", "hf")
"""The samplers that load the model here: on every GPU one."""

_SAMPLED = ("model", "n", "temperature", "top_p", "max_tokens", "seed", "long_prompts", "dtype", "chat_template_kwargs",
            "chunk", "sort", "shuffle_seed")  # fmt: skip

_SPOOL = pa.schema(
    [("id", pa.string()), ("messages", shards.MESSAGES), ("answer", pa.string()), ("where", pa.string())]
)
"""A prompt while the stage works: on disk, so that any process reads its own and none holds them all."""


def plan(config: GenerateConfig, store: Store) -> Plan:
    """Resolve the sampler, the model and the prompts."""
    sampler = samplers.resolve(config.sampler)
    notes = (f"sampler: {sampler}",) if config.sampler == "auto" else ()
    config = dataclasses.replace(config, sampler=sampler)
    _check_flags(config)
    if sampler in ENGINES:  # a server computes as it likes, and a file is as it is
        config = dataclasses.replace(config, dtype=machine.resolve_dtype(config.dtype))
    inputs = {"prompts": pin_data(config.prompts, store, "--prompts", config.split)}
    if sampler == "server":
        config, unknown = name_served(config)
        inputs |= unknown
    if config.model is not None and sampler != "file":
        inputs["model"] = pin_model(config.model, store)
    return Plan(STAGE, VERSION, config, inputs, notes)


def _check_flags(config: GenerateConfig) -> None:
    engine = config.sampler in ENGINES
    if config.sampler != "server":
        refuse(config, ABOUT_SERVERS, f"is for --sampler server, not {config.sampler}")
    if config.sampler == "file":
        refuse(config, _SAMPLED, "is for sampling; --sampler file reads responses that exist")
    if engine and config.model is None:
        raise UsageError("model is missing", where="--model", hint="a hub id, a folder, a train artifact or lab")
    if config.sampler == "server" and not config.server:
        raise UsageError("server is missing", where="--server", hint="--server http://host:8000/v1, for each server")
    if config.tensor_parallel > 1 and config.sampler != "vllm":
        raise UsageError(f"{config.sampler} has no --tensor-parallel", where="--tensor-parallel", hint="--sampler vllm")
    if engine:
        pool.processes(config.devices, config.tensor_parallel)
    elif config.devices not in (None, 1):
        hint = "--concurrency says how many requests are in flight" if config.sampler == "server" else "leave it out"
        raise UsageError(f"the {config.sampler} sampler is one process", where="--devices", hint=hint)


def run(config: GenerateConfig, draft: Draft) -> dict[str, Any]:
    """Write one row per candidate; returns the counts, and how long and how different the responses are."""
    if config.sampler == "file":
        return _import(config, draft)
    folder = model_dir(draft.inputs["model"]) if "model" in draft.inputs else None
    counts = _spool(config, draft, folder)
    _sample(config, draft, folder, counts["prompts"])
    shards.Parts(draft.scratch / "parts", SCHEMA).publish(draft.path / "rows")
    measured = _measure(draft.path / "rows")
    kept = measured.pop("prompts")
    if not kept:
        hint = "a model with a longer context, or shorter prompts; a server may also have refused what they ask"
        raise UsageError("no prompt got a response", where="--prompts", hint=hint)
    without = counts["prompts"] - kept  # an engine or a server with a smaller context, or one that refused them
    counts = {**counts, "prompts": kept, **({"without_response": without} if without else {})}
    _report(measured, draft.provenance)
    return {**counts, **measured, "tokenizer": tokenizer_digest(folder) if folder else None}


def _spool(config: GenerateConfig, draft: Draft, folder: Path | None) -> dict[str, int]:
    """Check all prompts and put them on disk, before anything is loaded; returns how many there are."""
    mark = draft.scratch / "prompts.json"  # written last: an earlier run had got that far
    if mark.exists():
        return dict(json.loads(mark.read_text(encoding="utf-8")))
    counts: Counter[str] = Counter()
    prompts: Iterable[Prompt] = read_prompts(draft.inputs["prompts"], config, counts)
    if folder is not None:
        decoding = samplers.Decoding.of(config)
        prompts = samplers.check_prompts(folder, prompts, decoding, config.long_prompts, counts)
    rows = (dataclasses.asdict(prompt) for prompt in prompts)
    kept = shards.write_shards(draft.scratch / "prompts", rows, _SPOOL)
    made = {"prompts": kept, "repeated": counts["repeated"], "dropped_long": counts["dropped_long"], **counts}
    durable.write_json(mark, made)
    return made


def _sample(config: GenerateConfig, draft: Draft, folder: Path | None, prompts: int) -> None:
    """Sample chunk by chunk, saving each; a chunk that an earlier run saved is not sampled again."""
    done = shards.Parts(draft.scratch / "parts", SCHEMA).done()
    chunks = -(-prompts // config.chunk)
    todo = [index for index in range(chunks) if index not in done]
    if done:
        console.say(f"resuming: {len(done)} of {chunks} chunks are there")
    workers = pool.processes(config.devices, config.tensor_parallel) if config.sampler in ENGINES else 1
    workers = max(1, min(workers, len(todo)))
    request = {"config": as_json(config), "scratch": str(draft.scratch), "prompts": prompts,
               "model": str(folder) if folder else None}  # fmt: skip
    job = pool.Job(
        "bnfctl.stages.generate:Sampling", request, draft.path / "log", workers, config.tensor_parallel,
        max(1, cpu_threads(folder) // workers) if folder else 1,
        apart=config.sampler == "vllm" and machine.visible_gpus() > 0,
    )  # fmt: skip
    started, tokens = 0.0, 0
    left = sum(_size(index, config.chunk, prompts) for index in todo)
    bar = console.Progress(prompts, "prompts", prompts - left)

    def units() -> Iterator[int]:
        nonlocal started
        started = time.monotonic()  # the engine is loaded
        bar.restart()
        yield from todo

    with bar:
        for one in pool.run(job, units()) if todo else ():
            tokens += one.tokens
            draft.provenance.update(one.provenance)
            bar.advance(one.records)
    if tokens:
        draft.provenance["tokens_per_second"] = round(tokens / (time.monotonic() - started), 1)


def _size(index: int, chunk: int, prompts: int) -> int:
    return min(chunk, prompts - index * chunk)


class Sampling:
    """Samples chunks of the spooled prompts and saves each: in this process, or in a worker of its own."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.config = config = from_json(GenerateConfig, request["config"])
        scratch, folder = Path(request["scratch"]), request["model"] and Path(request["model"])
        self.count = request["prompts"]
        self.parts = shards.Parts(scratch / "parts", SCHEMA)
        self.prompts = shards.Slices(sorted((scratch / "prompts").glob("*.parquet")))
        if config.sampler == "server":
            self.sampler: samplers.Sampler = load(SAMPLERS, "server", "sampler")(
                config, folder, scratch / "answers.sqlite"
            )
        else:
            self.sampler = samplers.make(config.sampler, folder, samplers.Decoding.of(config))

    @property
    def provenance(self) -> dict[str, Any]:
        """Of the sampler; that of a server also says how much it was asked."""
        usage = getattr(self.sampler, "usage", None)
        return {"engine": self.sampler.version, **({"usage": usage} if usage else {})}

    def run(self, units: Iterable[int]) -> Iterator[tuple[int, int, int]]:
        """(chunk, its prompts, its tokens) of each chunk that is saved."""
        pulled: dict[int, list[Prompt]] = {}

        def chunks() -> Iterator[samplers.Chunk]:
            for index in units:
                pulled[index] = self._chunk(index)
                yield index, pulled[index]

        for index, candidates in self.sampler.sample(chunks()):
            prompts = pulled.pop(index)
            self.parts.write(index, list(candidate_rows(prompts, candidates)))
            yield index, len(prompts), sum(len(candidate.token_ids or ()) for candidate in candidates)

    def _chunk(self, index: int) -> list[Prompt]:
        start = index * self.config.chunk
        rows = self.prompts.read(start, start + _size(index, self.config.chunk, self.count))
        return [Prompt(**{**row, "messages": tuple(row["messages"])}) for row in rows]


def _import(config: GenerateConfig, draft: Draft) -> dict[str, Any]:
    path = draft.inputs["prompts"].path
    if path is None:
        raise UsageError("the file sampler reads a file or folder", where="--prompts", hint="give the path of one")
    prompts = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal prompts
        for group in islice(FileSampler(Path(path), config).groups(), config.limit):
            prompts += 1
            yield from candidate_rows([group.prompt], group.candidates)

    candidates = shards.write_shards(draft.path / "rows", rows(), SCHEMA)
    return {"prompts": prompts, "candidates": candidates, "tokenizer": None}


def _measure(rows: Path) -> dict[str, Any]:
    """How many responses, how long, how many cut off, how many prompts got the same one each time; one pass."""
    count = tokens = cut = 0
    lengths: Counter[int] = Counter()
    several = same = prompts = 0
    texts: set[str] = set()
    size, prompt = 0, None
    for row in shards.read_rows(rows, ["prompt_id", "text", "token_ids", "finish_reason"]):
        if row["prompt_id"] != prompt:
            several, same = several + (size > 1), same + (size > 1 and len(texts) == 1)
            prompt, size, texts, prompts = row["prompt_id"], 0, set(), prompts + 1
        count, size = count + 1, size + 1
        texts.add(row["text"])
        cut += row["finish_reason"] == "length"
        if row["token_ids"] is not None:
            tokens += len(row["token_ids"])
            lengths[1 << (len(row["token_ids"]).bit_length() - 1) if row["token_ids"] else 0] += 1
    several, same = several + (size > 1), same + (size > 1 and len(texts) == 1)
    known = {
        "tokens_per_response": round(tokens / count, 1),
        # least length of the bin: the responses of 64 to 127 tokens are under "64"
        "lengths": {str(least): lengths[least] for least in sorted(lengths)},
    } if tokens else {}  # fmt: skip
    if not count:
        return {"prompts": 0, "candidates": 0}
    all_same = round(same / several, 4) if several else None
    return {"prompts": prompts, "candidates": count, **known, "cut": cut, "cut_share": round(cut / count, 4),
            "all_same_share": all_same}  # fmt: skip


def _report(measured: dict[str, Any], provenance: dict[str, Any]) -> None:
    """What a person wants to know before going on: on stderr."""
    rate = provenance.get("tokens_per_second")
    mean = measured.get("tokens_per_response")
    told = [f"{measured['candidates']} responses", f"{mean} tokens each" if mean is not None else "",
            f"{rate:,.0f} tokens/s" if rate else "", f"{measured['cut_share']:.1%} cut at --max-tokens"]  # fmt: skip
    if measured["all_same_share"] is not None:
        told.append(f"{measured['all_same_share']:.1%} of the prompts got the same response each time")
    console.say("; ".join(part for part in told if part))
    if lengths := measured.get("lengths"):
        bins = "  ".join(f"{least}+: {number}" for least, number in lengths.items())
        console.say(f"responses by tokens: {bins}")
