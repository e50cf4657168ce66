"""A model folder in and out: float32 masters to train, a safetensors folder that transformers and vLLM load.

Dropout is off and there is no KV cache: a policy in training and its reference go through the same code.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnfctl import durable
from bnfctl.data.chat import read_config
from bnfctl.errors import UsageError
from bnfctl.model.head import Head
from bnfctl.model.pretrained import DTYPES, device, load_pretrained, torch_dtype
from bnfctl.model.source import safetensors_header

_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template.*", "additional_chat_templates/*", "generation_config.json", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Files of a model folder that training leaves as they are, byte for byte: the tokenizer keeps its digest."""


@dataclass(frozen=True, eq=False)
class Policy:
    """A causal language model taken apart into body and head, and how it computes."""

    model: Any
    """The transformers model, float32 parameters, in eval mode on its device."""
    body: nn.Module
    head: Head
    compute_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.head.matrix.device

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[S, L, H] final hidden states of right-padded ids [S, L] (mask [S, L]: 1 is a token, 0 is padding)."""
        mixed = self.compute_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.compute_dtype if mixed else torch.bfloat16, enabled=mixed):
            states = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return states.to(self.compute_dtype)


def load_policy(path: Path, *, compute_dtype: str = "auto", trust_remote_code: bool = False) -> Policy:
    """The model in `path` with float32 parameters, on the GPU where there is one.

    compute_dtype: float32, bfloat16 (autocast over float32 masters) or auto: bfloat16 on a GPU, else float32.
    Raises UsageError when the folder is no causal language model that can be trained here.
    """
    from transformers import AutoModelForCausalLM

    # Attention logits with a soft cap are right in the eager implementation only.
    attention = "eager" if read_config(path).get("attn_logit_softcapping") else None
    model = load_pretrained(
        AutoModelForCausalLM, path, torch.float32, trust_remote_code, attn_implementation=attention
    ).to(device())  # in eval mode: dropout off; nothing else of a causal language model depends on it
    body, head = body_and_head(model)
    policy = Policy(model, body, head, torch_dtype(compute_dtype))
    _check_parts(policy, str(path))
    return policy


def body_and_head(model: Any) -> tuple[nn.Module, Head]:
    """The module that gives final hidden states, and the head, of any AutoModelForCausalLM."""
    output = model.get_output_embeddings()
    config = model.config.get_text_config()
    body = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if output is None or body is None or body is model:
        raise UsageError(f"{type(model).__name__} has no separate body and head, so it cannot be trained here")
    return body, Head(output.weight, getattr(output, "bias", None), getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def _check_parts(policy: Policy, where: str) -> None:
    """Refuse an architecture that does more to its logits than the head knows (Cohere and Granite scale them)."""
    vocabulary = policy.head.matrix.shape[0]
    ids = torch.tensor([[1 % vocabulary, 2 % vocabulary, 0]], device=policy.device)
    mixed = policy.compute_dtype != torch.float32
    with torch.autocast(policy.device.type, dtype=policy.compute_dtype if mixed else torch.bfloat16, enabled=mixed):
        expected = policy.model(input_ids=ids, use_cache=False).logits[0].float()
    found = policy.head.logits(policy.hidden(ids, torch.ones_like(ids))[0])
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-6))
    if not error < (0.05 if mixed else 1e-3):
        kind = type(policy.model).__name__
        what = f"{kind} changes its logits in a way that bnfctl does not know (relative error {error:.2g})"
        raise UsageError(what, where=where, hint="Llama, Mistral, Qwen and Gemma models are known to work")


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


def save_policy(model: Any, source_dir: Path, target_dir: Path, save_dtype: str = "auto") -> None:
    """Write the transformers model as a folder of its own; every file is on the disk when this returns.

    save_dtype: float32, bfloat16, float16 or auto, the type of the checkpoint in `source_dir`.
    """
    kind = checkpoint_dtype(source_dir) if save_dtype == "auto" else save_dtype
    if target_dir.exists():
        shutil.rmtree(target_dir)  # left by a crash while saving
    target_dir.mkdir(parents=True)
    with _neutral(model):
        model.save_pretrained(target_dir, state_dict=_cast(model.state_dict(), DTYPES[kind]), max_shard_size="5GB")
    config = json.loads((target_dir / "config.json").read_text(encoding="utf-8"))
    _set_dtype(config, kind)
    (target_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (target_dir / "generation_config.json").unlink(missing_ok=True)
    for pattern in COMPANIONS:
        for file in sorted(source_dir.glob(pattern)):
            if file.is_file():
                copy = target_dir / file.relative_to(source_dir)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    for file in sorted(target_dir.rglob("*")):
        durable.sync_dir(file) if file.is_dir() else durable.sync_file(file)
    durable.sync_dir(target_dir)


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
