"""Checkpoints that are whole or not there: parameters and optimizer state as safetensors, no pickle.

One format for one process, DDP and FSDP.  Every rank writes the rows that it holds and says where in the whole they
begin, so any number of ranks reads them again, each only its own rows.  What all ranks hold alike, rank 0 writes.
Only parameters that are trained are kept; frozen ones come from their model folder.  Training draws no random numbers
(the data order is a hash, dropout is off), so there is no RNG state to keep.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bnfctl import durable
from bnfctl.errors import BnfctlError
from bnfctl.model.sharding import local_rows
from bnfctl.training.world import World

T = TypeVar("T")
FOLDER = "scratch/checkpoints"
"""In the work folder; scratch/ is what a published artifact does not keep."""
_STATE = "state.json"
_FILE_BYTES = 1 << 30
"""Tensors of about this size go into one file: what is copied to the CPU at a time."""
_PARAMETER = ""
"""The slot of the parameter itself; the others are the optimizer's."""


@dataclass(frozen=True)
class State:
    """Where a checkpoint stands."""

    step: int
    """Optimizer steps done."""
    metrics_bytes: int
    """Length of metrics.jsonl at that point."""
    config: dict[str, Any]
    """What the run was asked (the fields of its key): a checkpoint of another run is refused."""
    world: dict[str, Any] = field(default_factory=dict)
    """What wrote it, {"size": ranks, "layout": "whole" | "rows"}, for messages; `save` fills it in."""


class _Rows(NamedTuple):
    """Consecutive rows of one tensor, as a file holds them."""

    file: Any
    """The open safetensors file."""
    key: str
    first: int
    shape: list[int]
    whole: list[int]
    """Shape of the whole tensor."""


def world_of(model: nn.Module, world: World) -> dict[str, Any]:
    """What `State.world` of a checkpoint written now would be."""
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return {"size": world.size, "layout": "rows" if sharded else "whole"}


def save(
    work: Path, state: State, model: nn.Module, optimizer: torch.optim.Optimizer, metrics: Path, world: World, keep: int
) -> None:
    """Write step-NNNNNN/, publish it by a rename, then remove all but the newest `keep`.  Every rank has to call it.

    `work` is on a file system that all ranks share.  Raises on every rank where one of them could not write.
    """
    folder = work / FOLDER
    target = folder / f"step-{state.step:06d}"
    temporary = folder / f".{target.name}.tmp"
    if world.broadcast_json(target.exists()):
        return

    def begin() -> None:
        if world.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write() -> dict[str, int]:
        temporary.mkdir(parents=True, exist_ok=True)
        return _write_rows(temporary, model, optimizer, world)

    def publish() -> None:
        if world.main:
            files = {name: size for part in parts for name, size in part.items()}
            record = {**vars(replace(state, world=world_of(model, world))), "files": files}
            _publish(temporary, target, record, metrics)
            _prune(folder, keep)

    _together(world, begin)
    parts = _together(world, write)
    _together(world, publish)


def restore(
    work: Path, config: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> State:
    """Load the newest whole checkpoint into model and optimizer; a state at step 0 where there is none.

    Every rank has to call it.  The number of ranks and the layout may differ from what wrote the checkpoint.
    Raises BnfctlError, on all ranks alike, for a checkpoint of another configuration or another model.
    """
    folder = work / FOLDER
    found = world.broadcast_json(_newest(folder) if world.main else None)
    if found is None:
        return State(0, 0, config)
    files = found.pop("files")
    state = State(**found)
    chosen = folder / f"step-{state.step:06d}"
    hint = f"remove {folder} to start again"
    if state.config != config:
        raise BnfctlError("the checkpoint belongs to another configuration", where=str(chosen), hint=hint)
    parameters = _trained(model)
    with ExitStack() as stack:
        rows, numbers = _index(stack.enter_context(safe_open(chosen / name, framework="pt")) for name in files)
        problem = _differs(parameters, rows)
        if problem:
            raise BnfctlError(f"the checkpoint is of another model: {problem}", where=str(chosen), hint=hint)
        for (name, slot), pieces in rows.items():
            parameter = parameters[name]
            if slot == _PARAMETER:
                _fill(parameter, pieces)
            else:
                optimizer.state[parameter][slot] = _slot(parameter, slot, pieces, optimizer)
        for name, slots in numbers.items():
            optimizer.state[parameters[name]].update(slots)
    return state


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes; a tied matrix appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _write_rows(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, int]:
    """Write this rank's part, some tensors at a time; name -> size of the files."""
    batch: dict[str, Tensor] = {}
    places: dict[str, list[Any]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    written: dict[str, int] = {}

    def flush() -> None:
        name = f"rank-{world.rank:05d}-{len(written):05d}.safetensors"
        metadata = {"places": json.dumps(places), "numbers": json.dumps(numbers)}
        save_file(batch, folder / name, metadata)
        durable.sync_file(folder / name)
        written[name] = (folder / name).stat().st_size
        for container in (batch, places, numbers):
            container.clear()

    for name, slot, value in _held(_trained(model), optimizer):
        if not isinstance(value, Tensor):
            if world.main:
                numbers.setdefault(name, {})[slot] = value
            continue
        local, first = local_rows(value)
        if not (len(local) if isinstance(value, DTensor) else world.main):
            continue
        if batch and sum(t.nbytes for t in batch.values()) + local.nbytes > _FILE_BYTES:
            flush()
        key = f"{name}:{slot}"
        # Slots may share memory (a table of 8-bit AdamW), which safetensors refuses.
        batch[key] = local.to("cpu", copy=True).contiguous()
        places[key] = [first, list(value.shape)]
    if batch or numbers or world.main:
        flush()
    return written


def _held(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, str, Tensor | float]]:
    """(parameter's name, slot, value) of all that a checkpoint keeps."""
    for name, parameter in parameters.items():
        yield name, _PARAMETER, parameter
        for slot, value in optimizer.state.get(parameter, {}).items():
            yield name, slot, value


def _together(world: World, work: Callable[[], T]) -> list[T]:
    """Every rank's result of `work`; raises on every rank where one fails, since none can go on alone."""
    failure: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except (OSError, SafetensorError, BnfctlError) as error:
        failure = error
    reason = None if failure is None else str(failure) or type(failure).__name__
    outcomes = world.gather_json([reason, result])
    if failure is not None:
        raise failure
    for rank, (reason, _) in enumerate(outcomes):
        if reason is not None:
            raise BnfctlError(f"rank {rank} could not write its part of the checkpoint: {reason}")
    return [result for _, result in outcomes]


def _publish(temporary: Path, target: Path, record: dict[str, Any], metrics: Path) -> None:
    """Make the folder durable and give it its name, once all that the ranks say they wrote is there."""
    absent = _absent(temporary, record["files"])
    if absent:
        hint = "with ranks on several machines, BNFCTL_HOME has to be on a file system that they share"
        raise BnfctlError(f"the checkpoint lacks {absent}, which a rank wrote", where=str(temporary), hint=hint)
    durable.sync_file(metrics)
    (temporary / _STATE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    durable.sync_file(temporary / _STATE)
    durable.sync_dir(temporary)
    durable.rename(temporary, target)


def _prune(folder: Path, keep: int) -> None:
    kept = sorted(folder.glob("step-*"))[-keep:]
    for other in folder.iterdir():
        if other not in kept:
            shutil.rmtree(other)


def _newest(folder: Path) -> dict[str, Any] | None:
    """The record of the newest whole checkpoint; what a crash left behind is removed."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover)
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            record: dict[str, Any] = json.loads((candidate / _STATE).read_text(encoding="utf-8"))
            torn = _absent(candidate, record["files"]) is not None
        except (OSError, ValueError, KeyError):
            torn = True
        if not torn:
            return record
        shutil.rmtree(candidate)  # save would take its name for a checkpoint that is there
    return None


def _absent(folder: Path, files: dict[str, int]) -> str | None:
    """The first file that is missing or cut short."""
    for name, size in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            return name
    return None


def _index(
    files: Iterable[Any],
) -> tuple[dict[tuple[str, str], list[_Rows]], dict[str, dict[str, Any]]]:
    """Where the rows of every (name, slot) are; and the optimizer's plain numbers by name and slot."""
    rows: dict[tuple[str, str], list[_Rows]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for file in files:
        metadata = file.metadata()
        for key, (first, whole) in json.loads(metadata["places"]).items():
            name, slot = key.rsplit(":", 1)
            piece = _Rows(file, key, first, list(file.get_slice(key).get_shape()), whole)
            rows.setdefault((name, slot), []).append(piece)
        for name, slots in json.loads(metadata["numbers"]).items():
            numbers.setdefault(name, {}).update(slots)
    return rows, numbers


def _differs(parameters: dict[str, nn.Parameter], rows: dict[tuple[str, str], list[_Rows]]) -> str | None:
    """How the checkpoint's parameters differ from the model's in name or shape."""
    shapes = {name: pieces[0].whole for (name, slot), pieces in rows.items() if slot == _PARAMETER}
    for name, parameter in parameters.items():
        if name not in shapes:
            return f"it lacks {name}"
        if shapes[name] != list(parameter.shape):
            return f"{name} is {shapes[name]} there and {list(parameter.shape)} here"
    unknown = sorted(shapes.keys() - parameters.keys())
    return f"it has {unknown[0]} besides" if unknown else None


def _slot(parameter: nn.Parameter, slot: str, pieces: list[_Rows], optimizer: torch.optim.Optimizer) -> Tensor:
    """An optimizer slot as the checkpoint has it: cut like its parameter if it is of that shape, else whole."""
    piece = pieces[0]
    if piece.whole == list(parameter.shape) and piece.whole:
        sample = piece.file.get_slice(piece.key)[:0]
        value = torch.zeros_like(parameter.detach(), dtype=sample.dtype)
        _fill(value, pieces)
        return value
    whole: Tensor = piece.file.get_tensor(piece.key)
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    # AdamW counts its steps on the CPU, unless the count is used on the device.
    on_cpu = slot == "step" and not (group.get("fused") or group.get("capturable"))
    return whole.to("cpu" if on_cpu else parameter.device)


@torch.no_grad()
def _fill(value: Tensor, pieces: list[_Rows]) -> None:
    """Copy the rows that this rank holds of `value` out of whichever files have them."""
    local, first = local_rows(value)
    if local.ndim == 0:
        local.copy_(pieces[0].file.get_tensor(pieces[0].key))
        return
    last = first + len(local)
    for piece in pieces:
        begin, end = max(first, piece.first), min(last, piece.first + piece.shape[0])
        if begin < end:
            part = piece.file.get_slice(piece.key)[begin - piece.first : end - piece.first]
            local[begin - first : end - first].copy_(part)
