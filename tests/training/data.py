"""Ragged random preference records, and training on them in this process."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bnfctl.artifact import Pinned, Store
from bnfctl.config import TrainConfig
from bnfctl.data.records import Record, Side
from bnfctl.losses import Loss
from bnfctl.machine import Place
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
    """A model folder, pinned by its path, and a store for reference rows."""
    digest = hashlib.sha256(str(model_dir).encode()).hexdigest()
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
