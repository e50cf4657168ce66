"""The training loop: batches in, gradients normalised once per step, checkpoints and metrics out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnfctl import console, durable, options
from bnfctl.config import TrainConfig
from bnfctl.data.records import Record, Side
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.losses import Loss, TokenLogps, make
from bnfctl.model.loading import Policy, load_policy, save_policy
from bnfctl.training import checkpoint, reference
from bnfctl.training.batches import Kept, MicroBatch, Plan, all_sides, micro_batches, step_data
from bnfctl.training.metrics import FILE as METRICS_FILE
from bnfctl.training.metrics import MetricsFile, StepSums


@dataclass(frozen=True, eq=False)
class Run:
    """The parts of one training run."""

    config: TrainConfig
    loss: Loss
    plan: Plan
    test_set: Sequence[Record]
    policy: Policy
    optimizer: torch.optim.Optimizer
    reference: reference.Reference | None
    keep: Kept


def train(
    config: TrainConfig, model_dir: Path, train_set: Sequence[Record], test_set: Sequence[Record], work: Path
) -> dict[str, Any]:
    """Train the model in `model_dir`; leaves model/, metrics.jsonl and log/ in `work`, and says what came out.

    Everything in the result but "provenance" is deterministic.  A second call on the same `work` resumes from the
    newest checkpoint, with the same bytes as an undisturbed run.  Raises UsageError for data that the loss cannot
    use, Interrupted after a checkpoint when a stop was requested, BnfctlError when a number stops being finite.
    """
    loss = make(config.loss, config.loss_arg)
    kept = check_records(config, loss, train_set, test_set)
    plan = Plan(config, kept)
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    run = prepare(config, loss, plan, test_set, model_dir, work)
    state = checkpoint.restore(work, _asked(config), run.policy.model, run.optimizer)
    metrics = MetricsFile(work / METRICS_FILE, state.metrics_bytes)
    if state.step:
        console.say(f"resuming after step {state.step} of {plan.steps}")
    if config.eval_every and not test_set:
        console.say("the test split is empty: no report on it")
    seconds, tokens = _steps(run, state.step, metrics, work)
    save_policy(run.policy.model, model_dir, work / "model", config.save_dtype)
    durable.sync_file(metrics.path)
    return {
        "loss": config.loss,
        "steps": plan.steps,
        "records": len(kept),
        "records_left_out": len(train_set) - len(kept),
        "tokens": sum(len(side.ids) for record in kept for side in record.sides if run.keep(side)),
        "parameters": sum(parameter.numel() for parameter in run.policy.model.parameters()),
        "final": metrics.last("train"),
        "test": metrics.last("test"),
        "provenance": {
            "device": _device_name(run.policy.device),
            "compute_dtype": str(run.policy.compute_dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "resumed_from_step": state.step,
            "seconds": round(time.monotonic() - started, 3),
            "trained_tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        },
    }


def check_records(
    config: TrainConfig, loss: Loss, train_set: Sequence[Record], test_set: Sequence[Record]
) -> list[Record]:
    """The training records that the loss can use; UsageError where it cannot work with the data at all."""
    for record in [*train_set, *(test_set if config.eval_every else [])]:
        if not record.prompt_ids or not record.sides or not all(side.ids for side in record.sides):
            raise UsageError("a record needs a prompt and responses of at least one token", where=f"record {record.id}")
        longest = len(record.prompt_ids) + max(len(side.ids) for side in record.sides)
        if longest > config.max_length:
            what = f"prompt + response has {longest} tokens; --max-length is {config.max_length}"
            raise UsageError(what, where=f"record {record.id}", hint="raise --max-length or drop the record")
        if loss.needs_pairs and sorted(side.label for side in record.sides) != [-1, 1]:
            raise UsageError(
                f"the loss '{config.loss}' needs both sides of every record",
                where=f"record {record.id}",
                hint="use --loss bnf, or build again with --pairing-ratio 1",
            )
    kept = [record for record in train_set if any(side.label in loss.labels for side in record.sides)]
    if not kept:
        wanted = "chosen" if loss.labels == (1,) else "chosen or rejected"
        raise UsageError(
            f"the loss '{config.loss}' finds no {wanted} response in the training split",
            where="--data",
            hint="check what the build stage kept: bnfctl show",
        )
    if len(kept) < len(train_set):
        console.say(f"{len(train_set) - len(kept)} records have no response for the loss '{config.loss}': left out")
    return kept


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Of step 0, 1, ..: linear warm-up over the first `warmup` share of the steps, then a cosine down to 0.

    The warm-up counts from 1, so that no step is spent at 0.
    """
    warm = round(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def adamw(config: TrainConfig, policy: Policy) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms and biases do not."""
    parameters = list(policy.model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def prepare(
    config: TrainConfig, loss: Loss, plan: Plan, test_set: Sequence[Record], model_dir: Path, work: Path
) -> Run:
    """Model, optimizer and reference, as they are before step 0."""

    def keep(side: Side) -> bool:
        return side.label in loss.labels

    policy = load_policy(model_dir, compute_dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    reported = test_set if config.eval_every else []
    stored = None
    # A report on the test split has margins, which need the reference whatever the loss.
    if loss.needs_reference or reported:
        stored = reference.prepare(policy, plan, keep, reported, work)
    return Run(config, loss, plan, reported, policy, adamw(config, policy), stored, keep)


def _steps(run: Run, first: int, metrics: MetricsFile, work: Path) -> tuple[float, int]:
    """Steps `first`.. to the end; (seconds, trained tokens) of this process."""
    config, total = run.config, run.plan.steps
    begun, tokens = time.monotonic(), 0
    (work / "log").mkdir(parents=True, exist_ok=True)
    with console.Progress(total, "steps", first) as progress:
        for step, positions in enumerate(run.plan.batches(first), start=first + 1):
            tick = time.monotonic()
            log = step % config.log_every == 0 or step == total
            line = {"step": step, "split": "train", **take_step(run, positions, step, log)}
            tokens += line["tokens"]
            if log:
                metrics.append(line)
                _log_speed(work, step, time.monotonic() - tick, line["tokens"])
            if run.test_set and (step % config.eval_every == 0 or step == total):
                metrics.append({"step": step, "split": "test", **evaluate(run)})
            stop = console.stop_requested()
            if stop or (config.save_every and step % config.save_every == 0 and step < total):
                state = checkpoint.State(step, metrics.path.stat().st_size, _asked(config))
                checkpoint.save(work, state, run.policy.model, run.optimizer, metrics.path)
            console.check_stop()
            progress.advance(note=f"objective {line['objective']:.4g}" if log else "")
    return time.monotonic() - begun, tokens


def take_step(run: Run, positions: list[int], step: int, log: bool) -> dict[str, Any]:
    """One optimizer step (counted from 1); the numbers of its line, without the objective's where not logged."""
    config, loss, records = run.config, run.loss, run.plan.records
    data = step_data(records, positions, run.keep)
    denominator = loss.denominator(data.label, data.length, data.pair)
    sums, total = StepSums(), 0.0
    run.optimizer.zero_grad(set_to_none=True)
    stored = run.reference.train if run.reference else None
    for batch in micro_batches(records, positions, run.keep, config.micro_tokens):
        tokens, entropy = forward(run, batch, stored, log)
        coefficients = gradient(loss, tokens)
        tokens.logp.backward(coefficients / denominator)
        total += float(loss.total(tokens).detach())
        if log:
            sums.add(tokens, loss.value(tokens, entropy), coefficients)
    parameters = [p for p in run.policy.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not (math.isfinite(float(norm)) and math.isfinite(total)):
        raise BnfctlError(
            f"step {step}: the gradient norm is {float(norm)} and the loss {total / denominator}",
            hint="try a lower --lr, a longer --warmup or --dtype float32",
        )
    if config.clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.clip, norm)
    lr = learning_rate(config, step - 1, run.plan.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    counts = {"tokens": int(data.length.sum()), "records": len(positions)}
    if not log:
        return counts
    pull = {"coefficient": sums.pull / denominator, "grad_norm": float(norm)}
    return {"lr": lr, **sums.line(loss, denominator), **pull, **counts}


def forward(
    run: Run, batch: MicroBatch, stored: reference.LogOdds | None, report: bool
) -> tuple[TokenLogps, Tensor | None]:
    """The policy on one micro-batch: its tokens, and their entropy [N] where the loss's value needs it."""
    policy = run.policy
    moved = batch.to(policy.device)
    hidden = policy.hidden(moved.input_ids, moved.attention_mask).flatten(0, 1).index_select(0, moved.predictor)
    result = policy.head(hidden, moved.target, entropy=report and run.loss.needs_entropy)
    tokens = TokenLogps(
        logp=result.logp,
        log_odds=result.log_odds,
        ref_log_odds=None if stored is None else stored.take(batch.positions).to(policy.device),
        segment=moved.segment,
        label=moved.label,
        length=moved.length,
        pair=moved.pair,
    )
    return tokens, result.entropy


def gradient(loss: Loss, tokens: TokenLogps) -> Tensor:
    """[N] d total / d logp: in closed form for a separable loss, else by autograd over the tokens alone."""
    if loss.separable:
        return loss.coefficients(tokens).detach()
    leaf = tokens.logp.detach().requires_grad_()
    total = loss.total(TokenLogps(**{**vars(tokens), "logp": leaf}))
    return torch.autograd.grad(total, leaf)[0]


@torch.no_grad()
def evaluate(run: Run) -> dict[str, Any]:
    """The numbers of a line about the test split, all of its sides."""
    positions = range(len(run.test_set))
    sums = StepSums()
    stored = run.reference.test if run.reference else None
    for batch in micro_batches(run.test_set, positions, all_sides, run.config.micro_tokens):
        tokens, entropy = forward(run, batch, stored, True)
        sums.add(tokens, run.loss.value(tokens, entropy), None)
    data = step_data(run.test_set, positions, all_sides)
    return sums.line(run.loss, run.loss.denominator(data.label, data.length, data.pair))


def _asked(config: TrainConfig) -> dict[str, Any]:
    """The fields of the run's key, as they come back from JSON (a tuple as a list)."""
    asked: dict[str, Any] = json.loads(options.canonical(options.key_fields(config)))
    return asked


def _log_speed(work: Path, step: int, seconds: float, tokens: int) -> None:
    line: dict[str, Any] = {"step": step, "seconds": round(seconds, 4), "trained_tokens_per_second": tokens / seconds}
    if torch.cuda.is_available():
        line["gpu_memory_peak_bytes"] = torch.cuda.max_memory_allocated()
    with open(work / "log" / "speed.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
