"""Packing under the attention kernels that need a GPU, against padded sequences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bnfctl.losses import make
from bnfctl.machine import Place
from bnfctl.training import loop, setup
from bnfctl.training.batches import Plan
from bnfctl.training.world import World
from tests.losses.ragged import relative
from tests.model.tiny import write_model
from tests.training.data import make_records, source_of

pytestmark = pytest.mark.gpu

GPU = World(Place(0, 1, 0, 1, "one process"), torch.device("cuda"))


def gradients(folder: Path, work: Path, **fields: object) -> dict[str, torch.Tensor]:
    config = setup.TrainConfig(model="m", lr=0, clip=0, dtype="bfloat16", **fields)  # type: ignore[arg-type]
    records = make_records(6)
    run = setup.prepare(config, make("bnf"), Plan(config, records), [], source_of(folder, work), GPU)
    loop.take_step(run, list(range(6)), 2, True)
    return {name: p.grad for name, p in run.policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"])
def test_packed_equals_padded(attention: str, tmp_path: Path) -> None:
    needed = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(attention)
    if needed:
        pytest.importorskip(needed)
    folder = write_model(tmp_path / "m")
    padded = gradients(folder, tmp_path / "a", layout="padded", attention="sdpa")
    packed = gradients(folder, tmp_path / "b", layout="packed", attention=attention)
    assert set(packed) == set(padded)
    for name, exact in padded.items():
        assert relative(packed[name], exact) < 0.05, name
