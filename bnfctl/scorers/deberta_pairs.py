"""PairRM's network: a DeBERTa-v3 body that reads a prompt and two responses, and a head on three marker tokens.

Two published layouts with the same tensors: `llm-blender/PairRM`, whose config.json is LLM-Blender's own RankerConfig
and says nothing of the body, and `llm-blender/PairRM-hf`, whose config.json is one of transformers.
Source: yuchenlin/LLM-Blender, llm_blender/pair_ranker/pairrm.py and config.py (Apache-2.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model

from bnfctl.data.chat import read_config
from bnfctl.errors import UsageError
from bnfctl.model.source import safetensors_header
from bnfctl.model.threads import limit_threads

MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")
"""In front of the prompt, of the better-if-positive response and of the other; the fourth is of training only."""
HINT = "take llm-blender/PairRM or llm-blender/PairRM-hf as published"

_FIXED = {
    "model_type": "deberta-v2", "hidden_act": "gelu", "relative_attention": True, "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm", "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
    "share_att_key": True, "type_vocab_size": 0, "pad_token_id": 0,
}  # fmt: skip
"""What makes a body this kind of body.  Some decide numbers and no shapes, so that a wrong one would go unnoticed."""
BODIES: dict[str, dict[str, Any]] = {
    "microsoft/deberta-v3-large": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "max_position_embeddings": 512, "position_buckets": 256, "layer_norm_eps": 1e-7, "vocab_size": 128005,
        "n_tasks": 1, "source_prefix_id": 128001, "cand1_prefix_id": 128002, "cand2_prefix_id": 128003,
        "cand_prefix_id": 128004,
    }
}  # fmt: skip
"""The sizes that a RankerConfig only names (its `model_name`); those of PairRM-hf's config.json."""
_LENGTHS = {"source_maxlength": 1224, "candidate_maxlength": 412}
_FLOATS = ("F32", "F16", "BF16")
_OLD_BUFFERS = {"pretrained_model.embeddings.position_ids"}
"""Saved by old versions of transformers; holds 0, 1, 2, ..."""


@dataclass(frozen=True)
class Layout:
    """What a checkpoint folder says of itself."""

    sizes: dict[str, Any]
    source_limit: int
    """Tokens of the prompt's segment, with [CLS], marker and [SEP]."""
    total: int
    """Tokens of all three segments."""

    @property
    def markers(self) -> dict[str, int]:
        """Marker -> token id."""
        fields = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id")
        return {marker: self.sizes[field] for marker, field in zip(MARKERS, fields, strict=True)}


class PairModel(nn.Module):
    """Module names are those of the published tensors; places 0 and 3 of the head are dropout, of training only."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        named = {**_FIXED, **sizes}
        del named["model_type"]  # a constant of the class
        config = DebertaV2Config(**named)
        width = config.hidden_size
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Identity(), nn.Linear(2 * width, width), nn.Tanh(), nn.Identity(), nn.Linear(width, sizes["n_tasks"])
        )

    def forward(self, ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """Logits [B], float32: above 0, the first response is the better one.

        ids, mask: [B, T], padded on the right.  places: [B, 3], where the markers of prompt, first and second are.
        """
        hidden = self.pretrained_model(input_ids=ids, attention_mask=mask).last_hidden_state
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        # the head is float32 whatever the body is: half precision would round the logits into ties
        source, first, second = hidden[rows, places].float().unbind(1)
        left = self.head_layer(torch.cat([source, first], -1))
        right = self.head_layer(torch.cat([source, second], -1))
        logits: Tensor = (left - right).mean(-1)
        return logits


def read_layout(folder: Path) -> Layout:
    """Which of the two layouts `folder` has.  Raises UsageError that names the first field that does not fit."""
    config = read_config(folder)
    where = str(folder / "config.json")
    if "ranker_type" in config:
        _check(config, {"ranker_type": "pairranker", "model_type": "deberta", "reduce_type": "linear"}, where)
        body = config.get("model_name")
        if body not in BODIES:
            raise UsageError(f"model_name is {body!r}, known is {', '.join(BODIES)}", where=where, hint=HINT)
        sizes = {**BODIES[body], "n_tasks": _count(config, "n_tasks", where)}
        lengths = {name: _count(config, name, where, low=4) for name in _LENGTHS}
    else:
        shape = config.get("pos_att_type")
        written = shape.split("|") if isinstance(shape, str) else shape
        _check({**config, "pos_att_type": written}, _FIXED, where)
        names = BODIES["microsoft/deberta-v3-large"]
        sizes = {name: _count(config, name, where) for name in names if name != "layer_norm_eps"}
        sizes["layer_norm_eps"] = _fraction(config, "layer_norm_eps", where)
        lengths = {name: _count({name: default, **config}, name, where, low=4) for name, default in _LENGTHS.items()}
    return Layout(sizes, lengths["source_maxlength"], lengths["source_maxlength"] + 2 * lengths["candidate_maxlength"])


def load_pairs(folder: Path, layout: Layout, dtype: torch.dtype) -> PairModel:
    """The network in eval mode on the CPU: body in `dtype`, head in float32.

    Raises UsageError that names the first tensor that is missing, unexpected, or of another shape or type.
    """
    limit_threads(folder)
    try:
        with torch.device("meta"):
            model = PairModel(layout.sizes)
    except ValueError as error:
        raise UsageError(f"no such body: {error}", where=str(folder / "config.json"), hint=HINT) from None
    file = _parameters(folder)
    _check_tensors({name: list(value.shape) for name, value in model.state_dict().items()}, file)
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot read: {error}", where=str(file), hint="fetch the model again") from None
    cast = {
        name: value.to(torch.float32 if name.startswith("head_layer.") else dtype)
        for name, value in tensors.items()
        if name not in _OLD_BUFFERS
    }
    model.load_state_dict(cast, assign=True)
    positions = torch.arange(layout.sizes["max_position_embeddings"]).expand(1, -1)
    model.pretrained_model.embeddings.register_buffer(
        "position_ids", positions, persistent=False
    )  # no tensor of a file
    return model.eval().requires_grad_(False)


def _parameters(folder: Path) -> Path:
    file = folder / "model.safetensors"
    if file.is_file():
        return file
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    what = f"no model.safetensors, and {others[0]} could run code when it is read" if others else "no model.safetensors"
    raise UsageError(what, where=str(folder), hint="take a revision that has model.safetensors, as llm-blender/PairRM")


def _check_tensors(expected: dict[str, list[int]], file: Path) -> None:
    """Compare names, shapes and types, in the order of the modules."""
    found = safetensors_header(file)
    for name, shape in expected.items():
        if name not in found:
            raise UsageError(f"the checkpoint lacks {name} {shape}", where=str(file), hint=HINT)
        if found[name]["shape"] != shape:
            raise UsageError(f"{name} is {found[name]['shape']}, expected {shape}", where=str(file), hint=HINT)
        if found[name]["dtype"] not in _FLOATS:
            raise UsageError(f"{name} is {found[name]['dtype']}, expected F32", where=str(file), hint=HINT)
    unexpected = next((name for name in found if name not in expected and name not in _OLD_BUFFERS), None)
    if unexpected is not None:
        raise UsageError(f"the checkpoint has an unexpected {unexpected}", where=str(file), hint=HINT)


def _check(config: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    for name, value in expected.items():
        if config.get(name) != value:
            raise UsageError(f"{name} is {config.get(name)!r}, expected {value!r}", where=where, hint=HINT)


def _count(config: dict[str, Any], name: str, where: str, low: int = 1) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UsageError(f"{name} is {value!r}, expected a whole number from {low}", where=where, hint=HINT)
    return value


def _fraction(config: dict[str, Any], name: str, where: str) -> float:
    value = config.get(name)
    if not isinstance(value, float) or not 0 < value < 1:
        raise UsageError(f"{name} is {value!r}, expected a number between 0 and 1", where=where, hint=HINT)
    return value
