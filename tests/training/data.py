"""Ragged random preference records, and training on them in this process."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bnfctl.artifact import Pinned, Store
from bnfctl.config import TrainConfig
from bnfctl.data.records import Record, Side
from bnfctl.digests import DigestCache
from bnfctl.losses import Loss, make
from bnfctl.machine import Place
from bnfctl.model.policy import Policy
from bnfctl.model.sharding import local_rows
from bnfctl.training import loop, setup
from bnfctl.training.batches import Plan
from bnfctl.training.world import World
from tests.model.tiny import VOCABULARY

ALONE = World(Place(0, 1, 0, 1, "one process"), torch.device("cpu"))


def make_records(n: int, seed: int = 0, pairs: bool = True) -> list[Record]:
    """Prompts of 1 to 6 tokens, responses of 1 to 9; without `pairs`, chosen and rejected singles take turns."""
    draw = random.Random(seed)

    def ids(longest: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest))]

    records = []
    for i in range(n):
        sides = (Side(1, ids(9)), Side(-1, ids(9)))
        records.append(Record(f"r{seed}-{i}", ids(6), sides if pairs else (sides[i % 2],)))
    return records


def source_of(model_dir: Path, home: Path) -> setup.Source:
    """A model folder, pinned by its content, and a store for reference rows."""
    digest = DigestCache(None).folder(model_dir)
    return setup.Source(model_dir, Pinned("folder", str(model_dir), digest, str(model_dir)), Store(home))


def train(
    config: TrainConfig, model_dir: Path, train_set: Sequence[Record], test_set: Sequence[Record], work: Path,
    home: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`loop.train` in this process, with a store of its own."""
    return loop.train(config, source_of(model_dir, home or work / "home"), train_set, test_set, work, ALONE)


def prepare(
    config: TrainConfig, loss: Loss, records: Sequence[Record], test_set: Sequence[Record], model_dir: Path, work: Path
) -> setup.Run:
    """`setup.prepare` in this process."""
    return setup.prepare(config, loss, Plan(config, records), test_set, source_of(model_dir, work / "home"), ALONE)


def at_reference(model_dir: Path, work: Path, records: Sequence[Record], **fields: Any) -> setup.Run:
    """A run as it is before its first step."""
    config = TrainConfig(**{"model": "m", **fields})
    return prepare(config, make(config.loss, config.loss_arg), records, [], model_dir, work)


def moved_run(
    model_dir: Path, work: Path, records: Sequence[Record], seed: int = 0, home: Path | None = None,
    world: World = ALONE, **fields: Any,
) -> tuple[setup.Run, Any]:  # fmt: skip
    """A run whose policy has left the reference, and (without adapters, in one process) the reference in float64."""
    config = TrainConfig(**{"model": "m", "clip": 0, "lr": 0, **fields})
    source = source_of(model_dir, home or work / "home")
    run = setup.prepare(config, make(config.loss, config.loss_arg), Plan(config, records), [], source, world)
    before = None if run.sharded else copy.deepcopy(run.policy.model).double()
    if before is not None:
        before.set_attn_implementation("eager")
    move(run.policy, seed)
    return run, before


@torch.no_grad()
def move(policy: Policy, seed: int = 0) -> None:
    """The same noise on every parameter that is trained, however many ranks hold it."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            local, first = local_rows(parameter)
            local += 0.02 * torch.randn(parameter.shape, generator=draw)[first : first + len(local)]


def gradients(run: setup.Run, positions: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(whole gradients by name, the line) of a step.  Not the first: the policy is no longer its reference."""
    line = loop.take_step(run, list(positions), 2, log=True)
    grads = {name: p.grad for name, p in run.policy.model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in grads.items()}, line
