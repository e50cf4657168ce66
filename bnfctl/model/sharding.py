"""FSDP2: a policy cut into rows over the ranks, filled from disk row by row, and put together again to be saved.

Every decoder layer is a unit of its own; the policy, as the root, holds the rest: embeddings, final norm and
output matrix, tied or not.  Parameters stay float32 masters, and gradients are reduced in float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from bnfctl.errors import UsageError
from bnfctl.model.policy import Policy
from bnfctl.model.source import safetensors_header
from bnfctl.model.threads import limit_threads

_WHOLE_LOAD = "--parallel ddp, or one device, loads it whole"
_STALE = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Buffers that old checkpoints hold and models of today compute."""
_COMPARED_ROWS = 8192


def empty_policy_model(path: Path, *, attention: str | None = None, trust_remote_code: bool = False) -> Any:
    """The causal language model of `path` without its numbers: parameters on meta, buffers real, eval mode.

    Ties are kept, parameters are float32.  Raises UsageError when transformers cannot build it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    limit_threads(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
        # The meta device would make the buffers (rotary frequencies) empty too, and no checkpoint holds those.
        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"cannot build the model: {reason}", where=str(path), hint="check its config.json") from error
    model.tie_weights()  # each registration made a parameter of its own
    return model.eval()


def layers(model: Any) -> list[nn.Module]:
    """The decoder layers: the longest list of modules in the body, lists within lists (experts) left out."""
    body = model.get_decoder() if hasattr(model, "get_decoder") else model
    found: list[nn.ModuleList] = []
    outer: list[str] = []
    for name, module in body.named_modules():  # parents come before their children
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{above}.") for above in outer):
            outer.append(name)
            found.append(module)
    if not found:
        raise UsageError(f"{type(model).__name__} has no list of layers, so it cannot be sharded", hint=_WHOLE_LOAD)
    return max(map(list, found), key=len)


def shard(policy: Policy, world_size: int, device_type: str) -> None:
    """Cut the parameters, in place, into rows of dim 0 over all ranks; meta parameters stay on meta.

    The root is resharded after its forward too.  FSDP2 would keep it whole for the backward, but where none follows
    (an evaluation) the model would then show a plain copy, which no longer is what the optimizer holds.
    """
    mixed = policy.compute_dtype != torch.float32
    precision = (
        MixedPrecisionPolicy(param_dtype=policy.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if mixed
        else MixedPrecisionPolicy(cast_forward_inputs=False)
    )
    mesh = init_device_mesh(device_type, (world_size,))
    for module in (*layers(policy.model), policy):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision)


def load_rows(policy: Policy, folder: Path, device: torch.device) -> None:
    """Fill the parameters that are on meta from the safetensors in `folder`; a rank reads the rows that it holds.

    Works after `shard`, and for a whole policy too, whose rows are all of them.

    Numbers of any stored type become float32.  Everything else (buffers, adapters) moves to `device` unchanged.
    Raises UsageError, on all ranks alike and before anything is read, where names or shapes do not match one to
    one: transformers renames and merges what some checkpoints hold while it loads them whole.
    """
    stored = _stored(folder)
    sources = _sources(policy.model, stored, folder)
    policy._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t.to(device))
    policy.model.tie_weights()  # plain parameters are made anew one by one; rows are not
    targets = _entries(policy.model)
    with torch.no_grad(), ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for name, source in sources.items():
            file = stored[source][0]
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(file, framework="pt"))
            local, first = local_rows(targets[name])
            if local.ndim == 0:
                local.copy_(opened[file].get_tensor(source))
            elif len(local):
                local.copy_(opened[file].get_slice(source)[first : first + len(local)])


def local_rows(value: Tensor) -> tuple[Tensor, int]:
    """(the part that this rank holds, sharing memory; the whole's row at which it begins): all of a plain tensor."""
    if not isinstance(value, DTensor):
        return value.detach(), 0
    with torch.no_grad():
        local = value.to_local()
    # fully_shard cuts as torch.chunk does: full chunks first, the last ranks may hold none.
    rows = -(-value.shape[0] // value.device_mesh.size())
    first = min(value.device_mesh.get_local_rank() * rows, value.shape[0])
    assert len(local) == min(rows, value.shape[0] - first), "sharded otherwise than by rows over one mesh"
    return local, first


@torch.no_grad()
def full_state(model: Any, main: bool) -> dict[str, Tensor]:
    """The state dict with whole tensors on the CPU, on the main rank; {} elsewhere.  Every rank has to call it.

    One tensor at a time is whole on a device.  Names that share a parameter (a tied head) share its tensor.
    """
    state: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in done:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            done[id(value)] = whole.detach().cpu() if main else torch.empty(0)
        state[name] = done[id(value)]
    return state if main else {}


def _stored(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Name -> (file, its header entry) of the folder's checkpoint, the files that transformers would take."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError("no safetensors to read rows from", where=str(folder), hint=_WHOLE_LOAD)
    stored = {}
    for file in files:
        if not file.is_file():
            raise UsageError(f"the checkpoint lacks its file {file.name}", where=str(folder), hint="fetch it again")
        stored.update({name: (file, entry) for name, entry in safetensors_header(file).items()})
    return stored


def _entries(model: Any) -> dict[str, Tensor]:
    """Every name of the state dict, with the live parameter or buffer behind it."""
    return dict(model.state_dict(keep_vars=True))


def _sources(model: Any, stored: dict[str, tuple[Path, dict[str, Any]]], folder: Path) -> dict[str, str]:
    """Name in the model -> name in the checkpoint, once per tensor to fill; UsageError unless it is one to one."""
    aliases: dict[int, list[str]] = {}
    entries = _entries(model)
    for name, value in entries.items():
        if value.device.type == "meta" or not isinstance(value, nn.Parameter):
            aliases.setdefault(id(value), []).append(name)
    sources, lacking, used = {}, [], set()
    for names in aliases.values():
        found = [name for name in names if _checkpoint_name(name) in stored]
        if not found:
            lacking.append(names[0])
            continue
        source = _checkpoint_name(found[0])
        used |= {_checkpoint_name(name) for name in found}
        for other in found[1:]:
            if not _equal(stored, source, _checkpoint_name(other)):
                what = f"{source} and {other} are tied, but the checkpoint holds different numbers for them"
                raise UsageError(what, where=str(folder), hint=_WHOLE_LOAD)
        shape = list(entries[found[0]].shape)
        if stored[source][1]["shape"] != shape:
            what = f"{source} is {stored[source][1]['shape']} in the checkpoint and {shape} in the model"
            raise UsageError(what, where=str(folder), hint="config.json and the safetensors are of different models")
        sources[found[0]] = source
    ignored = re.compile("|".join(f"({pattern})" for pattern in (*_STALE, *_ignored_patterns(model))))
    unknown = [name for name in stored if name not in used and not ignored.search(name)]
    if lacking or unknown:
        differences = (f"lacks {_some(lacking)}", f"holds {_some(unknown)} besides")
        told = " and ".join(text for text, names in zip(differences, (lacking, unknown), strict=True) if names)
        what = f"cannot read rows: the checkpoint {told}"
        raise UsageError(what, where=str(folder), hint=_WHOLE_LOAD)
    return sources


def _checkpoint_name(name: str) -> str:
    """The checkpoint's name of a parameter, which peft may have wrapped."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _ignored_patterns(model: Any) -> Iterable[str]:
    return getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()


def _equal(stored: dict[str, tuple[Path, dict[str, Any]]], one: str, other: str) -> bool:
    """Whether two stored tensors hold the same numbers, compared some rows at a time."""
    if stored[one][1]["shape"] != stored[other][1]["shape"]:
        return False
    rows = stored[one][1]["shape"][0]
    try:
        with safe_open(stored[one][0], framework="pt") as first, safe_open(stored[other][0], framework="pt") as second:
            a, b = first.get_slice(one), second.get_slice(other)
            cuts = [slice(at, min(at + _COMPARED_ROWS, rows)) for at in range(0, rows, _COMPARED_ROWS)]
            return all(torch.equal(a[cut], b[cut]) for cut in cuts)
    except SafetensorError as error:
        raise UsageError(f"cannot read the checkpoint: {error}", where=str(stored[one][0])) from error


def _some(names: list[str]) -> str:
    return "".join(names[:1]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
