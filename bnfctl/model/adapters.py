"""LoRA (arXiv 2106.09685) through peft: adapters put into a transformers model in place, turned off, merged, saved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bnfctl.errors import UsageError

_BASE, _A, _B = ".base_layer.", ".lora_A.default.", ".lora_B.default."


@dataclass(frozen=True)
class Lora:
    """What the adapters are."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Names of linear modules, or all-linear: those of the body, without the head."""

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / self.rank

    def config(self) -> Any:
        """The same for peft.  No dropout: the policy starts as its reference, and a resumed run repeats."""
        from peft import LoraConfig

        targets = "all-linear" if self.targets == ("all-linear",) else list(self.targets)
        alpha: Any = self.alpha  # peft declares an int, and takes any number
        return LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none",
                          task_type="CAUSAL_LM")  # fmt: skip


def add_adapters(model: Any, lora: Lora, seed: int) -> None:
    """Freeze the model and give it adapters that change nothing yet (B = 0), in float32, the same on every rank.

    Raises UsageError where no module has the name of a target, or one is the head's or the embeddings'.
    """
    from peft import inject_adapter_in_model

    model.requires_grad_(False)
    try:
        inject_adapter_in_model(lora.config(), model)
    except ValueError as error:
        raise UsageError(str(error).splitlines()[0], where="--lora-targets", hint="--lora-targets all-linear") from None
    added = {id(layer) for layer in _lora_layers(model)}
    if added & {id(model.get_output_embeddings()), id(model.get_input_embeddings())}:
        what = "adapters of the embeddings or of the output matrix are not trained here"
        raise UsageError(what, where="--lora-targets", hint="--lora-targets all-linear")
    draw = torch.Generator().manual_seed(seed)
    for layer in _lora_layers(model):
        for matrices, fresh in ((layer.lora_A, True), (layer.lora_B, False)):
            linear = matrices["default"]
            if linear.weight.is_meta:
                linear.to_empty(device="cpu")
            linear.float()
            bound = 1 / math.sqrt(linear.in_features)  # kaiming_uniform with a = sqrt(5), as peft draws it
            values = torch.empty(linear.weight.shape).uniform_(-bound, bound, generator=draw) if fresh else None
            with torch.no_grad():
                linear.weight.zero_() if values is None else linear.weight.copy_(values)


def _lora_layers(model: Any) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    return (module for module in model.modules() if isinstance(module, LoraLayer))


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """The base model, as long as this lasts."""
    # Not peft's own switch: it also changes what requires gradients, which FSDP2 and the optimizer rely on.
    found = list(_lora_layers(model))
    for layer in found:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in found:
            layer._disable_adapters = False


def merged(model: Any, state: dict[str, Tensor], scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict with adapters as one of the base model: W + scale * B A in float32, rounded once, base's names.

    Empties `state` as it goes, so that two whole models are never in memory.
    """
    turned = {name for name, module in model.named_modules() if getattr(module, "fan_in_fan_out", False)}
    out: dict[str, Tensor] = {}
    for name in [name for name in state if _A not in name and _B not in name]:
        value = state.pop(name)
        if _BASE in name and name.endswith(".weight"):
            stem = name.removesuffix(f"{_BASE}weight")
            change = scale * (state[f"{stem}{_B}weight"].float() @ state[f"{stem}{_A}weight"].float())
            value = (value.float() + (change.T if stem in turned else change)).to(dtype)  # GPT-2 keeps [in, out]
        out[name.replace(_BASE, ".")] = value
    return out


def save_adapter(state: dict[str, Tensor], lora: Lora, base: str | None, folder: Path, dtype: torch.dtype) -> None:
    """adapter_model.safetensors and adapter_config.json, as peft and vLLM read them.  base: hub id, where it has one."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {
        f"base_model.model.{name.replace('.default.', '.')}": value.to(dtype).contiguous()
        for name, value in state.items() if _A in name or _B in name
    }  # fmt: skip
    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = lora.config()
    config.base_model_name_or_path = base
    config.inference_mode = True
    # As it was asked for, not the set that peft made of it, whose order is another in each process.
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
