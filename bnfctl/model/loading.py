"""A model folder in and out: float32 masters to train, a safetensors folder that transformers and vLLM load."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnfctl import console, durable
from bnfctl.data.chat import read_config
from bnfctl.errors import UsageError
from bnfctl.model.attention import NAME as ROWS
from bnfctl.model.attention import register
from bnfctl.model.policy import Policy, packs
from bnfctl.model.pretrained import DTYPES, load_pretrained
from bnfctl.model.source import safetensors_header

_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template.*", "additional_chat_templates/*", "generation_config.json", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Files of a model folder that training leaves as they are, byte for byte: the tokenizer keeps its digest."""


def load_model(
    path: Path, dtype: torch.dtype, attention: str, trust_remote_code: bool, device: torch.device,
    quantization: Any = None,
) -> Any:  # fmt: skip
    """The causal language model in `path` with parameters of this type, in eval mode: dropout off, on the CPU.

    quantization: a transformers config; then its linears are quantized, and it is on `device`.
    Raises UsageError when the folder is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    more = {"quantization_config": quantization, "device_map": {"": device}} if quantization else {}
    return load_pretrained(AutoModelForCausalLM, path, dtype, trust_remote_code, attn_implementation=attention, **more)


def padded_attention(path: Path, attention: str = "auto") -> str:
    """The implementation that a model is loaded with: what was asked for, else eager for a soft cap, else sdpa."""
    if attention != "auto":
        return attention
    # transformers' sdpa leaves a soft cap on attention logits out.
    return "eager" if read_config(path).get("attn_logit_softcapping") else "sdpa"


def choose_packing(policy: Policy, layout: str, attention: str, longest: int, where: str) -> bool:
    """Whether the policy packs from here on; its attention is switched to what packing needs.

    layout: packed, padded, or auto: packed where the model keeps packed documents apart (`policy.packs` asks it).
    longest: tokens of the longest sequence to come.
    Raises UsageError for packed where it does not.
    """
    if layout == "padded" or (attention == "eager" and layout == "auto"):
        return False
    register()
    before = policy.attention
    if attention != "eager" and packs(policy, ROWS if attention in ("auto", "sdpa") else attention, before, longest):
        return True
    what = f"{type(policy.model).__name__} with {before} attention does not keep packed documents apart"
    if layout == "packed":
        raise UsageError(what, where=where, hint="--layout padded")
    console.say(f"{what}: sequences are padded, in micro-batches of like length")
    return False


def stored_dtypes(folder: Path) -> set[str]:
    """As what the floating numbers of the folder's safetensors are stored."""
    headers = [safetensors_header(file) for file in folder.glob("*.safetensors")]
    kinds = {entry["dtype"] for header in headers for entry in header.values()}
    return {_SAFETENSORS_DTYPES.get(kind, kind) for kind in kinds if kind[0] in "FB"}


def checkpoint_dtype(folder: Path) -> str:
    """float32, bfloat16 or float16: what most numbers of the folder's checkpoint are stored as."""
    sizes: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        for entry in safetensors_header(file).values():
            if entry["dtype"] in _SAFETENSORS_DTYPES:
                sizes[_SAFETENSORS_DTYPES[entry["dtype"]]] += prod(entry["shape"])
    if sizes:
        return sizes.most_common(1)[0][0]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return stored if stored in DTYPES else "float32"


def save_model(model: Any, state: dict[str, Tensor], source_dir: Path, target_dir: Path, dtype: str) -> None:
    """Write a transformers model with these parameters as a folder of its own, durably.

    state: whole tensors by name.  dtype: float32, bfloat16 or float16.
    """
    empty(target_dir)
    with _neutral(model):
        model.save_pretrained(target_dir, state_dict=_cast(state, DTYPES[dtype]), max_shard_size="5GB")
    config = json.loads((target_dir / "config.json").read_text(encoding="utf-8"))
    _set_dtype(config, dtype)
    (target_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (target_dir / "generation_config.json").unlink(missing_ok=True)
    copy_companions(source_dir, target_dir)
    durable.sync_tree(target_dir)


def empty(folder: Path) -> None:
    """A new folder in the place of what a crash while saving left."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def copy_companions(source_dir: Path, target_dir: Path) -> None:
    """Tokenizer, chat template, generation config: byte for byte."""
    for pattern in COMPANIONS:
        for file in sorted(source_dir.glob(pattern)):
            if file.is_file():
                copy = target_dir / file.relative_to(source_dir)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating tensors as `dtype`; tensors that share memory (a tied head) still share it, so one is written."""
    seen: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    out = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            place = (tensor.data_ptr(), tuple(tensor.shape))
            tensor = seen.setdefault(place, tensor.detach().to(dtype))
        out[name] = tensor
    return out


def _set_dtype(config: dict[str, Any], kind: str) -> None:
    config["dtype"] = kind
    config.pop("torch_dtype", None)
    for part in config.values():
        if isinstance(part, dict) and "dtype" in part:
            part["dtype"] = kind


@contextmanager
def _neutral(model: Any) -> Iterator[None]:
    """While saving: a generation config that passes validation; afterwards everything as it was.

    Some hub models carry one that `save_pretrained` refuses; the source's own file is copied instead.
    """
    from transformers import GenerationConfig

    kept, dtype = model.generation_config, model.config.dtype
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config, model.config.dtype = kept, dtype
