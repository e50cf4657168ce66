"""Ragged random preference records."""

from __future__ import annotations

import random

from bnfctl.data.records import Record, Side
from tests.model.tiny import VOCABULARY


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
