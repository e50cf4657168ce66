"""The training loop: batches in, gradients normalised once per step, checkpoints and metrics out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnfctl import console, durable, options
from bnfctl.config import TrainConfig
from bnfctl.data.records import Record
from bnfctl.errors import BnfctlError
from bnfctl.losses import Stats, make
from bnfctl.training import budget, checkpoint, saving
from bnfctl.training.batches import MicroBatch, Plan, StepData, step_data
from bnfctl.training.checks import check_records
from bnfctl.training.gradients import clip, reduce
from bnfctl.training.metrics import FILE as METRICS_FILE
from bnfctl.training.metrics import MetricsFile, StepSums, line
from bnfctl.training.objective import backward, forward, kl_sum
from bnfctl.training.setup import Run, Source, prepare
from bnfctl.training.speed import SpeedLog
from bnfctl.training.tracking import Trackers
from bnfctl.training.world import World

DRIFT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest mean of 1 - c at step 0, counted in both directions, where policy and reference are the same model."""


def train(
    config: TrainConfig, source: Source, train_set: Sequence[Record], test_set: Sequence[Record], work: Path,
    world: World,
) -> dict[str, Any]:  # fmt: skip
    """Train the model of `source`; leaves model/, metrics.jsonl and log/ in `work`, and says what came out.

    Collective.  Everything in the result but "provenance" is deterministic.  A second call on the same `work` resumes
    from the newest checkpoint, with the same bytes as an undisturbed run.  Raises UsageError for data that the loss
    cannot use, Interrupted after a checkpoint when a stop was requested, BnfctlError when a number stops being finite
    or the policy differs from its reference at step 0.
    """
    loss = make(config.loss, config.loss_arg)
    kept = check_records(config, loss, train_set, test_set, source.folder)
    plan = Plan(config, kept)
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    first = budget.first(work, config, world)
    with budget.halved_when_full(first, work, world, "before step 0"):
        run = prepare(replace(config, micro_tokens=first), loss, plan, test_set, source, world)
        if world.device.type == "cuda":  # a CPU has swap, and no error before it is full
            budget.set_budget(run, budget.probe(run))
    state = checkpoint.restore(work, _asked(config), run.policy.model, run.optimizer, world)
    if state.step:
        same = state.world == checkpoint.world_of(run.policy.model, world)
        world.say(
            f"resuming after step {state.step} of {plan.steps}"
            + ("" if same else "; on other ranks, so within rounding")
        )
    if config.eval_every and not test_set:
        world.say("the test split is empty: no report on it")
    fits = run.splits["train"].budget
    with _journal(run, work, state) as metrics, budget.halved_when_full(fits, work, world, "while training"):
        seconds, tokens = _steps(run, state.step, metrics, work)
    saving.save(run, source, work / "model")
    return {
        "loss": config.loss,
        "steps": plan.steps,
        "records": len(kept),
        "records_left_out": len(train_set) - len(kept),
        "tokens": sum(len(side.ids) for record in kept for side in record.sides if run.splits["train"].keep(side)),
        "parameters": sum(parameter.numel() for parameter in run.policy.model.parameters()),
        "final": metrics.last("train") if metrics else None,
        "test": metrics.last("test") if metrics else None,
        "provenance": {
            **_provenance(run),
            "resumed_from_step": state.step,
            "seconds": round(time.monotonic() - started, 3),
            "trained_tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        },
    }


@contextmanager
def _journal(run: Run, work: Path, state: checkpoint.State) -> Iterator[MetricsFile | None]:
    """metrics.jsonl, and the trackers that get a copy of it; None behind the main rank."""
    if not run.world.main:
        yield None
        return
    name = f"{run.config.loss}-{work.name.removeprefix('train-')}"
    trackers = Trackers(run.config.track, name, work / "log", _asked(run.config), done=state.step)
    try:
        yield MetricsFile(work / METRICS_FILE, state.metrics_bytes, trackers.log)
    finally:
        trackers.finish()
    durable.sync_file(work / METRICS_FILE)


def _provenance(run: Run) -> dict[str, Any]:
    """What computed it: outside the digest."""
    device = run.policy.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ranks": run.world.size,
        "parallel": "fsdp" if run.sharded else "ddp",
        "compute_dtype": str(run.policy.compute_dtype).removeprefix("torch."),
        "attention": run.policy.attention,
        "threads": torch.get_num_threads(),
        "reference": run.reference_refs,
    }


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Of step 0, 1, ..: linear warm-up over the first `warmup` share of the steps, then a cosine down to 0.

    The warm-up counts from 1, so that no step is spent at 0.
    """
    warm = round(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _steps(run: Run, first: int, metrics: MetricsFile | None, work: Path) -> tuple[float, int]:
    """Steps `first`.. to the end; (seconds, trained tokens) of this process."""
    config, total, world = run.config, run.plan.steps, run.world
    begun, tokens, saved = time.monotonic(), 0, time.monotonic()
    speed = SpeedLog(work / "log", run)
    with console.Progress(total, "steps", first, quiet=not world.main) as progress:
        for step, positions in enumerate(run.plan.batches(first), start=first + 1):
            log = step % config.log_every == 0 or step == total
            found = {"step": step, "split": "train", **take_step(run, positions, step, log)}
            tokens += found["tokens"]
            if metrics and log:
                metrics.append(found)
            speed.add(step, positions)
            if run.splits["test"].records and (step % config.eval_every == 0 or step == total):
                report = {"step": step, "split": "test", **evaluate(run)}
                if metrics:
                    metrics.append(report)
            late = 0 < config.save_minutes * 60 <= time.monotonic() - saved
            stop, due = world.any(console.stop_requested(), late)
            due = due or (bool(config.save_every) and step % config.save_every == 0)
            if stop or (due and step < total):
                size = metrics.path.stat().st_size if metrics else 0
                state = checkpoint.State(step, size, _asked(config))
                checkpoint.save(work, state, run.policy.model, run.optimizer, work / METRICS_FILE, world, config.keep)
                saved = time.monotonic()
            world.check_stop(stop)
            progress.advance(note=f"objective {found['objective']:.4g}" if log else "")
    return time.monotonic() - begun, tokens


def take_step(run: Run, positions: list[int], step: int, log: bool) -> dict[str, Any]:
    """One optimizer step (counted from 1); the numbers of its line, without the objective's where not logged."""
    config, loss, work = run.config, run.loss, run.splits["train"]
    data = step_data(work.records, positions, work.keep)
    denominator = loss.denominator(data.label, data.length, data.pair)
    # FSDP2 averages over the ranks; this loop sums.
    scale = (run.world.size if run.sharded else 1) / denominator
    log = log or step == 1
    sums, stats = StepSums(), kl_stats(run, "train", positions, data)
    run.optimizer.zero_grad(set_to_none=True)
    for batch, ref_log_odds in _batches(run, "train", positions):
        done = backward(run.policy, loss, batch, ref_log_odds, stats, scale, log and loss.needs_entropy)
        if log:
            sums.add(done.tokens, loss.value(done.tokens, done.entropy, stats), done.coefficients)
    parameters = [p for p in run.policy.parameters() if p.requires_grad]
    reduce(parameters, run.world, run.sharded)
    norm = clip(parameters, config.clip)
    figures = sums.over_ranks(run.world) if log else {}
    if not (math.isfinite(norm) and math.isfinite(figures.get("value", 0.0))):
        raise BnfctlError(
            f"step {step}: the gradient norm is {norm} and the loss {figures.get('value', math.nan) / denominator}",
            hint="try a lower --lr, a longer --warmup or --dtype float32",
        )
    if step == 1 and "train" in run.referred:
        check_drift(run, *(figures[name] / float(data.length.sum()) for name in ("drift", "gap")))
    lr = learning_rate(config, step - 1, run.plan.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    counts = {"tokens": int(data.length.sum()), "records": len(positions)}
    if not log:
        return counts
    pull = {"coefficient": figures["pull"] / denominator, "grad_norm": norm}
    return {"lr": lr, **line(figures, loss, data, "train" in run.referred), **pull, **counts}


def _batches(run: Run, split: str, positions: Iterable[int]) -> Iterator[tuple[MicroBatch, Tensor | None]]:
    """This rank's micro-batches on the device, each with its reference log-odds [N]."""
    for batch in run.splits[split].micro_batches(positions):
        moved = batch.to(run.policy.device)
        yield moved, run.reference.log_odds(split, moved) if run.reference and split in run.referred else None


def kl_stats(run: Run, split: str, positions: Sequence[int], data: StepData) -> Stats | None:
    """KTO's reference point: the mean over the step's mismatched responses, of all ranks, not below 0."""
    if not run.loss.needs_kl:
        return None
    if f"{split}-kl" not in run.splits:
        return Stats(kl=0.0)
    total = run.world.sum(kl_sum(run.policy, _batches(run, f"{split}-kl", positions)))
    return Stats(kl=max(0.0, float(total) / data.label.numel()))


@torch.no_grad()
def evaluate(run: Run) -> dict[str, Any]:
    """The numbers of a line about the test split, all of its sides."""
    split = run.splits["test"]
    positions = range(len(split.records))
    data = step_data(split.records, positions, split.keep)
    sums, stats = StepSums(), kl_stats(run, "test", positions, data)
    for batch, ref_log_odds in _batches(run, "test", positions):
        done = forward(run.policy, batch, ref_log_odds, run.loss.needs_entropy)
        sums.add(done.tokens, run.loss.value(done.tokens, done.entropy, stats), None)
    return line(sums.over_ranks(run.world), run.loss, data, "test" in run.referred)


def check_drift(run: Run, drift: float, gap: float) -> None:
    """Step 0: the policy is its reference, so any mean of 1 - c, c = min(1, odds / reference odds), is an error.

    gap: the same with the ratio that is below 1, odds / reference odds or its inverse.  Rounding goes both ways, so
    half of it is held to the limit too: log-odds that are all too high leave 1 - c at 0.
    """
    limit = DRIFT.get(run.policy.compute_dtype, DRIFT[torch.bfloat16])
    found = f"mean of 1 - c is {drift:.2g}, in both directions {gap:.2g}"
    run.world.say(f"reference drift at step 0: {found} (limit {limit:g})")
    if not (drift <= limit and gap / 2 <= limit) and not run.config.allow_drift:  # NaN is no drift that passes
        raise BnfctlError(
            f"the policy differs from its reference at step 0: the {found}, above {limit:g}",
            where=", ".join(run.reference_refs) or "--reference live",
            hint="remove that reference (bnfctl rm) and train again; --allow-drift trains on regardless",
        )


def _asked(config: TrainConfig) -> dict[str, Any]:
    """The fields of the run's key, as they come back from JSON (a tuple as a list)."""
    asked: dict[str, Any] = json.loads(options.canonical(options.key_fields(config)))
    return asked
