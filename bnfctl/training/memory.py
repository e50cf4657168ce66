"""Out of memory: what it looks like, and what to change where it is the model itself that does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bnfctl import footprint
from bnfctl.config import TrainConfig
from bnfctl.data.chat import read_config
from bnfctl.errors import BnfctlError
from bnfctl.footprint import Machine
from bnfctl.model.head import CHUNK_ELEMENTS
from bnfctl.shape import shape_of
from bnfctl.training.world import World


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's allocator and Python have types for it, torch on a CPU only a text."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def loading(config: TrainConfig, folder: Path, world: World) -> Iterator[None]:
    """Around what smaller micro-batches don't help: an out-of-memory becomes BnfctlError, with what would."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        device = world.device
        memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
        machine = Machine(world.size, memory, device.type, CHUNK_ELEMENTS[device.type])
        what = f"the model does not fit into memory on rank {world.rank}: {str(error).splitlines()[0]}"
        raise BnfctlError(what, where=str(folder), hint=remedy(config, folder, machine)) from error


def remedy(config: TrainConfig, folder: Path, machine: Machine) -> str:
    """What to type, as --dry-run says it; in general terms where its estimate says that the model fits."""
    shape = shape_of(read_config(folder))
    if shape is not None:
        needed = machine.footprint(shape, footprint.resolve(shape, config, machine)).total
        found = footprint.advice(shape, config, machine) if needed > machine.usable else []
        if found:
            return f"try {'; or '.join(found)}"
    return "free the memory that other processes hold; or try --lora 16, --parallel fsdp on more --devices"
