"""The shift analysis of a run (paper, section 5.3): responses in, `shifts/*.parquet` and the summary's figures out.

    reference = reference_of(config, store, inputs["model"])         # in plan(): goes into inputs["reference"]
    figures = measure(config, draft, candidates, policy_dir, reference_dir)                          # in run()
    bins({"dpo": dpo.rows(folder="shifts"), "bnf": bnf.rows(folder="shifts")}, "dpo")                # figure 4

The responses are put on disk first, then measured in units of a fixed number of them by `pool`: one process per GPU,
apart from this one, so that its memory is free again afterwards; also apart behind vLLM, which leaves a process with
threads of its own making.

What is bit-equal: a unit starts its own micro-batches and is saved whole, so the rows, and with them the digest, are the
same however often a run was interrupted and however many processes it had.  On a CPU the number of threads decides how
sums are rounded; so a model wide enough for several threads gets one process with all of them, whatever `--devices`
says.  What is equal to rounding (1e-5 of a logit in float32): the same response in another micro-batch, thus with
another `--limit`, other prompts around it or another `--chunk`; and another device.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bnfctl import console, durable, machine, pool, shards
from bnfctl.analysis.distributions import (
    BINS,
    HistogramBin,
    Numbers,
    PairedBin,
    gini,
    histogram_bins,
    mean_over_prompts,
    paired_bins,
    pearson,
    same_tokens,
    spearman,
)
from bnfctl.artifact import Artifact, Draft, Pinned, Store
from bnfctl.config import EvalConfig
from bnfctl.data.records import Candidate
from bnfctl.errors import BnfctlError, UsageError, nearest
from bnfctl.model.source import pin_model
from bnfctl.model.threads import cpu_threads
from bnfctl.options import as_json, from_json

FOLDER = "shifts"
"""Of an eval artifact: rows of `analysis.shifts.SCHEMA`, in the prompts' order."""
UNIT = 32
"""Responses per part, or --chunk where that is less: what a killed run loses at most, and enough parts for many GPUs."""
MEASURES = ("ll", "z1", "z2", "z3", "z4")
SIGNED = ("ll", "z1")

_COLUMNS = [
    "prompt_id", "tokens", "cut", "gini", "gini_corrected", "deviation",
    *(f"{name}_{kind}" for name in MEASURES for kind in ("sum", "mean")),
]  # fmt: skip
_RESPONSES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("token_ids", shards.IDS),
        ("finish_reason", pa.string()),
        ("prompt_ids", shards.IDS),
    ]
)
"""A response while the stage works; its text is in the rows of the artifact."""


def reference_of(config: EvalConfig, store: Store, policy: Pinned) -> Pinned:
    """The model that `policy` is compared with: --reference, else the one that its training started from.

    policy: as `pin_model` gave it.  UsageError where it does not say what it started from, and where that has changed
    since, or is gone.
    """
    if config.reference is not None:
        return pin_model(config.reference, store, "--reference")
    hint = "--reference MODEL: what the policy was trained from"
    if policy.kind != "artifact" or policy.path is None:
        what = f"shifts compare a policy with its reference, and {policy.ref} is no train artifact that names one"
        raise UsageError(what, where="--reference", hint=hint)
    trained = Artifact(Path(policy.path))
    started = Pinned(**trained.manifest.inputs["model"])
    if started.kind == "hub-model":
        return started
    ref = started.ref if started.kind == "lab" else str(trained.input_path("model"))
    try:
        found = pin_model(ref, store, "--reference")
    except UsageError as error:
        what = f"the model that {policy.ref} started from can't be read: {error.what}"
        raise UsageError(what, where="--reference", hint=hint) from None
    if found.digest != started.digest:
        what = f"the model that {policy.ref} started from has changed since: {ref}"
        raise UsageError(what, where="--reference", hint=hint)
    return found


def measure(
    config: EvalConfig, draft: Draft, candidates: Iterable[Candidate], policy_dir: Path, reference_dir: Path
) -> dict[str, Any]:
    """Write one row per response into the draft's FOLDER; returns `figures` of them.

    candidates: with token ids, in the prompts' order, the same ones when a run is resumed.  config: dtype, chunk and
    devices, resolved.  Raises as `Shifts` does; Interrupted after a stop, with what is done saved.
    """
    from bnfctl.analysis.shifts import SCHEMA

    count = _spool(candidates, draft.scratch)
    if not count:
        raise UsageError("no responses to measure shifts on", where="--tasks shifts", hint="a larger --limit")
    parts = shards.Parts(draft.scratch / "shift-parts", SCHEMA)
    size = min(config.chunk, UNIT)
    units, done = range(-(-count // size)), parts.done()
    todo = [unit for unit in units if unit not in done]
    threads = cpu_threads(reference_dir)
    workers = pool.processes(config.devices) if threads == 1 or machine.visible_gpus() else 1
    request = {"config": as_json(config), "scratch": str(draft.scratch), "responses": count,
               "policy": str(policy_dir), "reference": str(reference_dir)}  # fmt: skip
    job = pool.Job(
        "bnfctl.evaluation.shifting:Measuring", request, draft.path / "log", max(1, min(workers, len(todo))),
        threads=threads, apart=config.sampler == "vllm" or machine.visible_gpus() > 0,
    )  # fmt: skip
    left = sum(min(size, count - unit * size) for unit in todo)
    with console.Progress(count, "responses", count - left) as progress:
        for one in pool.run(job, todo) if todo else ():
            draft.provenance.update(one.provenance)
            progress.advance(one.records)
    parts.publish(draft.path / FOLDER)
    return figures(draft.path / FOLDER)


def _spool(candidates: Iterable[Candidate], scratch: Path) -> int:
    """Put the responses on disk, once, where every process reads its own; returns how many."""
    mark = scratch / "shift-responses.json"  # written last: an earlier run had got that far
    if not mark.exists():
        rows = ({name: getattr(candidate, name) for name in _RESPONSES.names} for candidate in candidates)
        durable.write_json(mark, {"responses": shards.write_shards(scratch / "shift-responses", rows, _RESPONSES)})
    return int(json.loads(mark.read_text(encoding="utf-8"))["responses"])


class Measuring:
    """Measures units of responses and saves each: in this process, or in a worker of its own."""

    def __init__(self, request: dict[str, Any]) -> None:
        import torch
        import transformers

        from bnfctl.analysis.shifts import SCHEMA, ShiftOptions, Shifts

        config, scratch = from_json(EvalConfig, request["config"]), Path(request["scratch"])
        self.size, self.count = min(config.chunk, UNIT), request["responses"]
        self.parts = shards.Parts(scratch / "shift-parts", SCHEMA)
        self.responses = shards.Slices(sorted((scratch / "shift-responses").glob("*.parquet")))
        self.provenance = {"shifts": f"transformers {transformers.__version__}, torch {torch.__version__}"}
        options = ShiftOptions(dtype=config.dtype, trust_remote_code=config.trust_remote_code)
        with _room():
            self.shifts = Shifts(Path(request["policy"]), Path(request["reference"]), options)

    def run(self, units: Iterable[int]) -> Iterator[tuple[int, int, int]]:
        """(unit, its responses, their tokens) of each unit that is saved."""
        for unit in units:
            start = unit * self.size
            rows = self.responses.read(start, min(start + self.size, self.count))
            with _room():
                made = [shift.row() for shift in self.shifts.measure(Candidate(text="", **row) for row in rows)]
            self.parts.write(unit, made)
            yield unit, len(made), sum(row["tokens"] for row in made)


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """BnfctlError that says what takes the memory, where a GPU has too little of it."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"policy and reference, which share a GPU, don't fit: {str(error).splitlines()[0]}"
        raise BnfctlError(what, where="--tasks shifts", hint="a GPU with more memory, or --dtype bfloat16") from None


def figures(folder: Path) -> dict[str, Any]:
    """What the rows of a folder say together, JSON-ready.

    n, prompts, tokens (mean), total_tokens; {mean, low, high} (normal 95 %, prompts as clusters) of "ll_sum", "ll_mean"
    (per token), z1 to z4 likewise, of the signed ones "..._absolute" too, "gini", "gini_corrected"; gini_pooled over all
    tokens; correlation of z2 with ll, by sum and by mean (null where one of them is constant); deviation of the
    identity, the largest; cut: share that ended by max_tokens, null where nobody knows, and where some did, `uncut`:
    the means of the others alone.
    """
    table = pa.concat_tables(shards.read_table(path, _COLUMNS) for path in sorted(folder.glob("*.parquet")))
    columns = {name: table[name].to_numpy() for name in _COLUMNS if name not in ("prompt_id", "cut")}
    prompts, known = table["prompt_id"].to_pylist(), table["cut"].to_pylist()
    for name in SIGNED:
        columns |= {f"{name}_{kind}_absolute": np.abs(columns[f"{name}_{kind}"]) for kind in ("sum", "mean")}
    deviation, tokens = columns.pop("deviation"), columns.pop("tokens")
    cut = np.array([bool(one) for one in known])
    found: dict[str, Any] = {
        "n": len(prompts), "prompts": len(set(prompts)), "tokens": float(tokens.mean()),
        "total_tokens": int(tokens.sum()), "interval": "normal",
        **{name: _interval(values, prompts) for name, values in sorted(columns.items())},
        "gini_pooled": gini(np.concatenate([np.abs(part) for part in _tokens(folder, "token_z")])),
        "correlation": {kind: _correlation(columns[f"z2_{kind}"], columns[f"ll_{kind}"]) for kind in ("sum", "mean")},
        "deviation": float(deviation.max()),
        "cut": None if None in known else float(cut.mean()),
    }  # fmt: skip
    if 0 < cut.sum() < len(cut):
        means = {name: float(values[~cut].mean()) for name, values in sorted(columns.items())}
        found["uncut"] = {"n": int((~cut).sum()), **means}
    return found


def _interval(values: Numbers, prompts: list[str]) -> dict[str, float]:
    found = mean_over_prompts(values.tolist(), prompts)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _correlation(x: Numbers, y: Numbers) -> dict[str, float | None]:
    return {"pearson": pearson(x, y), "spearman": spearman(x, y)}


def _tokens(folder: Path, column: str) -> Iterator[Numbers]:
    """A column of tokens, a shard at a time, flat and in order."""
    for path in sorted(folder.glob("*.parquet")):
        yield shards.read_table(path, [column])[column].combine_chunks().flatten().to_numpy().astype(np.float64)


@dataclass(frozen=True)
class Bins:
    """Figure 4: token-level log-likelihood shifts of several methods in the decile bins of one of them."""

    baseline: str
    histogram: list[HistogramBin]
    """R2, always: how each method's own tokens fall between the baseline's deciles."""
    paired: list[PairedBin] | None
    """R1: every method's shifts on the tokens of each of the baseline's bins; None unless all were measured on the same
    responses (`--shift-responses reference`, or one file of responses)."""
    why: str | None
    """Why there is no `paired`."""


def bins(policies: Mapping[str, Iterable[Mapping[str, Any]]], baseline: str, count: int = BINS) -> Bins:
    """Bins of "token_ll" of each policy's rows (SCHEMA, at least the columns sequence and token_ll).

    UsageError where `baseline` is none of the policies, or one of them has too few tokens.
    """
    if baseline not in policies:
        where, hint = "the baseline of the bins", f"one of: {', '.join(policies)}"
        raise UsageError(f"no shifts of '{baseline}'{nearest(baseline, policies)}", where=where, hint=hint)
    rows = {
        name: [{"sequence": row["sequence"], "token_ll": np.asarray(row["token_ll"], np.float64)} for row in found]
        for name, found in policies.items()
    }
    shifts = {name: np.concatenate([np.zeros(0), *(row["token_ll"] for row in found)]) for name, found in rows.items()}
    for name, values in shifts.items():
        least = count if name == baseline else 1
        if len(values) < least:
            what = f"{name} has {len(values)} response tokens; its bins need {least}"
            raise UsageError(what, where=f"shifts of {name}", hint="measure shifts on more responses")
    try:
        paired, why = paired_bins(same_tokens(rows), baseline, count), None
    except UsageError as error:
        paired, why = None, error.what
    return Bins(baseline, histogram_bins(shifts, baseline, count), paired, why)
