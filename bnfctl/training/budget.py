"""How many tokens a micro-batch may have: tried before step 0, and halved by whatever runs out of memory later."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bnfctl import durable
from bnfctl.config import TrainConfig
from bnfctl.errors import BnfctlError
from bnfctl.footprint import MICRO_TOKENS
from bnfctl.losses import Stats
from bnfctl.training.batches import MicroBatch
from bnfctl.training.memory import is_out_of_memory
from bnfctl.training.objective import backward, forward
from bnfctl.training.setup import Run
from bnfctl.training.world import World

FILE = "scratch/budget.json"
"""In the work folder: what a run that ran out of memory leaves to the one that resumes it."""


def stored(work: Path) -> int | None:
    """The budget that an earlier process of this run found to be small enough."""
    try:
        return int(json.loads((work / FILE).read_text(encoding="utf-8"))["micro_tokens"])
    except FileNotFoundError:
        return None


def first(work: Path, config: TrainConfig, world: World) -> int:
    """What a run starts with: as configured, or less where an earlier process ran out of memory."""
    asked = config.micro_tokens or MICRO_TOKENS[world.device.type]
    left = stored(work)
    if left is None or left >= asked:
        return asked
    world.say(f"{left} tokens per micro-batch, not {asked}: this run was out of memory before ({work / FILE})")
    return left


def set_budget(run: Run, budget: int) -> None:
    """Every split in micro-batches of at most so many tokens."""
    for name, split in run.splits.items():
        run.splits[name] = dataclasses.replace(split, budget=budget)


@contextmanager
def halved_when_full(tokens: int, work: Path, world: World, where: str) -> Iterator[None]:
    """An out-of-memory becomes BnfctlError (exit 1), and the same command then resumes with half of `tokens`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        half = max(1, tokens // 2)
        durable.write_json(work / FILE, {"micro_tokens": half})
        raise BnfctlError(
            f"out of memory {where} on rank {world.rank}: {str(error).splitlines()[0]}",
            hint=f"the same command resumes, with {half} tokens per micro-batch instead of {tokens}",
        ) from error


def probe(run: Run) -> int:
    """Try the largest micro-batch, forward and backward; the budget that fits on all ranks.  Collective.

    It halves down to the longest record alone.  AdamW's moments, which the first step makes, are reserved meanwhile.
    Leaves no gradients behind.  Raises BnfctlError where not even one record fits.  Of a sharded model it tries one
    size only and passes the error on: the other ranks wait for this one inside the model, so the run has to end.
    """
    budget = run.splits["train"].budget
    while True:
        largest = run.splits["train"].largest()
        alone = len(largest.positions) == 1
        fits = _fits(run, largest, catch=alone or not run.sharded)
        full = not fits if run.sharded else run.world.any(not fits)[0]
        if not full:
            return budget
        if alone:
            raise BnfctlError(
                "the longest record does not fit into memory",
                hint="--activation-checkpointing on, a lower --max-length, --lora 16, or more --devices",
            )
        budget //= 2
        set_budget(run, budget)
        run.world.say(f"out of memory: trying {budget} tokens per micro-batch")


def _fits(run: Run, batch: MicroBatch, catch: bool) -> bool:
    """catch: an out-of-memory is an answer, not an error."""
    device = run.policy.device
    trained = sum(_local(p).numel() for p in run.policy.parameters() if p.requires_grad)
    try:
        moments = torch.empty(2 * trained, dtype=torch.float32, device=device)
        moved = batch.to(device)
        like = torch.zeros_like(moved.sequences.target, dtype=torch.float32)
        if "train" in run.referred:
            like = forward(run.policy, moved, None, entropy=False).tokens.log_odds
        backward(run.policy, run.loss, moved, like, Stats(kl=0.0), 1.0, run.loss.needs_entropy)
        del moments
        return True
    except RuntimeError as error:
        if not (catch and is_out_of_memory(error)):
            raise
        return False
    finally:
        run.optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _local(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
