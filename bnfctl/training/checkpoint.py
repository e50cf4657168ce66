"""Checkpoints that are whole or not there: parameters and optimizer state as safetensors, no pickle.

Training draws no random numbers (the data order is a hash, dropout is off), so there is no RNG state to keep.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bnfctl import durable
from bnfctl.errors import BnfctlError

FOLDER = "scratch/checkpoints"
"""In the work folder; scratch/ is what a published artifact does not keep."""


@dataclass(frozen=True)
class State:
    """Where a checkpoint stands."""

    step: int
    """Optimizer steps done."""
    metrics_bytes: int
    """Length of metrics.jsonl at that point."""
    config: dict[str, Any]
    """What the run was asked (the fields of its key): a checkpoint of another run is refused."""


def save(work: Path, state: State, model: nn.Module, optimizer: torch.optim.Optimizer, metrics: Path) -> None:
    """Write step-NNNNNN/, publish it by a rename, then remove the older ones."""
    folder = work / FOLDER
    target = folder / f"step-{state.step:06d}"
    if target.exists():
        return
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    durable.sync_file(metrics)
    parameters = dict(model.named_parameters())  # a tied matrix appears once
    save_file({name: _plain(value) for name, value in parameters.items()}, temporary / "model.safetensors")
    moments = {
        f"{name}:{slot}": _plain(value)
        for name, parameter in parameters.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(moments, temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(vars(state), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in sorted(temporary.iterdir()):
        durable.sync_file(file)
    durable.sync_dir(temporary)
    durable.rename(temporary, target)
    for other in folder.iterdir():
        if other != target:
            shutil.rmtree(other)


def restore(work: Path, config: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Load the newest whole checkpoint into model and optimizer; a state at step 0 where there is none.

    Raises BnfctlError when the checkpoint belongs to another configuration.
    """
    folder = work / FOLDER
    for torn in folder.glob(".*.tmp"):
        shutil.rmtree(torn)
    whole = sorted(folder.glob("step-*"))
    if not whole:
        return State(0, 0, config)
    state = State(**json.loads((whole[-1] / "state.json").read_text(encoding="utf-8")))
    if state.config != config:
        hint = f"remove {folder} to start again"
        raise BnfctlError("the checkpoint belongs to another configuration", where=str(whole[-1]), hint=hint)
    parameters = dict(model.named_parameters())
    with torch.no_grad(), safe_open(whole[-1] / "model.safetensors", framework="pt") as file:
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(name))
    with safe_open(whole[-1] / "optimizer.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            name, slot = key.rsplit(":", 1)
            # AdamW keeps its step counter on the CPU.
            device = "cpu" if slot == "step" else parameters[name].device
            optimizer.state[parameters[name]][slot] = file.get_tensor(key).to(device)
    return state


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()
