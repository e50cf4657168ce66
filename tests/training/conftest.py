"""A tiny model and preference data for it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from bnfctl.data.records import Record, Side
from tests.model.tiny import VOCABULARY, write_model

torch.set_num_threads(1)  # tiny tensors: a second thread only waits for a core


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


def make_records(n: int, seed: int = 0, pairs: bool = True) -> list[Record]:
    """Ragged random records; without `pairs`, chosen and rejected singles take turns."""
    draw = random.Random(seed)

    def ids(longest: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest))]

    records = []
    for i in range(n):
        sides = (Side(1, ids(9)), Side(-1, ids(9)))
        records.append(Record(f"r{seed}-{i}", ids(6), sides if pairs else (sides[i % 2],)))
    return records
