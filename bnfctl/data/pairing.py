"""Records: their columns, their split and their masks.  Plain functions of (seed, id), so order never matters."""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow as pa

from bnfctl import shards
from bnfctl.data.records import Group

SIDES = ("chosen", "rejected")

SCHEMA = pa.schema(
    [
        ("record_id", pa.string()),
        ("prompt_id", pa.string()),
        ("split", pa.string()),
        ("prompt", shards.MESSAGES),
        ("prompt_ids", shards.IDS),
    ]
    + [
        (f"{side}_{name}", kind)
        for side in SIDES
        for name, kind in (
            ("text", pa.string()),
            ("ids", shards.IDS),
            ("finish", pa.string()),
            ("reward", pa.float64()),
        )
    ]
)
"""One row per record; a masked side is null in all its columns."""


def uniform(seed: int, purpose: str, identity: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: 53 bits of SHA-256."""
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{identity}".encode("utf-8", "replace")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def split_of(seed: int, prompt_id: str, test_fraction: float) -> str:
    """ "train" or "test", for all records of a prompt."""
    return "test" if uniform(seed, "split", prompt_id) < test_fraction else "train"


def kept_sides(seed: int, record_id: str, pairing_ratio: float) -> tuple[str, ...]:
    """Both sides of a pair with probability `pairing_ratio`, else one of them (paper, section 5.2).

    Whether a side is lost and which one are separate hashes, the second independent of the ratio: so what is
    kept at 25 % is a subset of what is kept at 50 %.
    """
    if uniform(seed, "keep both", record_id) < pairing_ratio:
        return SIDES
    return SIDES[:1] if uniform(seed, "which side", record_id) < 0.5 else SIDES[1:]


def record_of(record_id: str, group: Group, sides: dict[str, tuple[int, float | None]], split: str) -> dict[str, Any]:
    """A row of SCHEMA; `sides` maps "chosen" / "rejected" to (index in the group, reward)."""
    row: dict[str, Any] = {
        "record_id": record_id,
        "prompt_id": group.prompt.id,
        "split": split,
        "prompt": list(group.prompt.messages),
        "prompt_ids": group.candidates[0].prompt_ids,
    }
    for side, (index, reward) in sides.items():
        candidate = group.candidates[index]
        row[f"{side}_text"] = candidate.text
        row[f"{side}_ids"] = candidate.token_ids
        row[f"{side}_finish"] = candidate.finish_reason
        row[f"{side}_reward"] = reward
    return row
