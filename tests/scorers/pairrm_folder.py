"""Tiny random PairRM checkpoints: the files, names, types and token ids of both published repositories."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bnfctl.scorers import deberta_pairs
from bnfctl.scorers.deberta_pairs import MARKERS

LARGE = "microsoft/deberta-v3-large"
PUBLISHED = deberta_pairs.BODIES[LARGE]
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32, "position_buckets": 8,
}  # fmt: skip
RANKER: dict[str, Any] = {
    "ranker_type": "pairranker", "model_type": "deberta", "model_name": LARGE, "cache_dir": None,
    "load_checkpoint": None, "source_maxlength": 1224, "candidate_maxlength": 412, "n_tasks": 1, "num_pos": 5,
    "num_neg": 5, "sub_sampling_mode": "all_pair", "sub_sampling_ratio": 0.4, "loss_type": "instructgpt",
    "reduce_type": "linear", "inference_mode": "bubble", "drop_out": 0.05, "fp16": True,
}  # fmt: skip
HF: dict[str, Any] = {
    "architectures": ["DebertaV2PairRM"], "attention_probs_dropout_prob": 0.1, "cand1_prefix_id": 128002,
    "cand2_prefix_id": 128003, "cand_prefix_id": 128004, "drop_out": 0.05, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-07, "max_relative_positions": -1,
    "model_type": "deberta-v2", "n_tasks": 1, "norm_rel_ebd": "layer_norm", "pad_token_id": 0,
    "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "relative_attention": True,
    "share_att_key": True, "source_prefix_id": 128001, "torch_dtype": "float32", "transformers_version": "4.35.2",
    "type_vocab_size": 0, "vocab_size": 128005, **TINY,
}  # fmt: skip
LAYOUTS = {"PairRM": RANKER, "PairRM-hf": HF}


def published_tensors(h: int, inner: int, layers: int, buckets: int, tasks: int = 1) -> dict[str, list[int]]:
    """Name -> shape, as both repositories have them."""
    square = {"weight": [h, h], "bias": [h]}
    norm = {"weight": [h], "bias": [h]}
    parts: dict[str, dict[str, list[int]]] = {
        "pretrained_model.embeddings.word_embeddings": {"weight": [128005, h]},
        "pretrained_model.embeddings.LayerNorm": norm,
        "pretrained_model.encoder.rel_embeddings": {"weight": [2 * buckets, h]},
        "pretrained_model.encoder.LayerNorm": norm,
        "head_layer.1": {"weight": [h, 2 * h], "bias": [h]},
        "head_layer.4": {"weight": [tasks, h], "bias": [tasks]},
    }
    for number in range(layers):
        layer = f"pretrained_model.encoder.layer.{number}."
        parts |= {
            f"{layer}attention.self.query_proj": square,
            f"{layer}attention.self.key_proj": square,
            f"{layer}attention.self.value_proj": square,
            f"{layer}attention.output.dense": square,
            f"{layer}attention.output.LayerNorm": norm,
            f"{layer}intermediate.dense": {"weight": [inner, h], "bias": [inner]},
            f"{layer}output.dense": {"weight": [h, inner], "bias": [h]},
            f"{layer}output.LayerNorm": norm,
        }
    return {f"{part}.{name}": shape for part, names in parts.items() for name, shape in names.items()}


@cache
def tokenizer_json() -> str:
    """A SentencePiece unigram of 128,000 pieces, with the ids of DeBERTa-v3 and the tokens that LLM-Blender added."""
    base = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    starts = [f"▁{letter}" for letter in "abcdefghijklmnopqrst"]
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEIKLMPSU0123456789<>|[]().,:!?'"
    words = [*starts, *letters, "▁hello", "▁you", "ing", "▁I", "▁the"]
    filler = [f"▁filler{number}" for number in range(128_000 - len(base) - len(words))]
    vocabulary = [(piece, 0.0) for piece in base]
    vocabulary += [(piece, -3.0 - number / 7) for number, piece in enumerate(words)]
    vocabulary += [(piece, -20.0) for piece in filler]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        # SentencePiece's own normalization, as the published file has it, also makes spaces of line ends
        [
            normalizers.Strip(),
            normalizers.NFKC(),
            normalizers.Replace(Regex("[\n\r\t]"), " "),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace("▁", prepend_scheme="always")])
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in [*base, "[MASK]"]])
    tokenizer.add_tokens([AddedToken(marker, normalized=True, special=False) for marker in MARKERS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    tokenizer.enable_truncation(7)  # state of whoever saved it last, which must not matter
    tokenizer.enable_padding(length=9)
    return tokenizer.to_str()


@cache
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = published_tensors(TINY["hidden_size"], TINY["intermediate_size"], 2, TINY["position_buckets"])
    made = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    return {name: value + 1 if "LayerNorm.weight" in name else value for name, value in made.items()}


class Maker:
    """Writes folders with the files of a layout; a RankerConfig names its body only, so a tiny one takes its place."""

    def __init__(self, parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parent = parent
        monkeypatch.setitem(deberta_pairs.BODIES, LARGE, {**PUBLISHED, **TINY})

    def __call__(
        self, layout: str = "PairRM", change: Mapping[str, torch.Tensor | None] | None = None, **config: Any
    ) -> Path:
        """`config` and `change` (name -> tensor, or None to leave it out) alter what was published."""
        folder = self.parent / f"{layout}{len(list(self.parent.iterdir()))}"
        folder.mkdir()
        settings = {name: value for name, value in {**LAYOUTS[layout], **config}.items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(settings))
        if layout == "PairRM":
            (folder / "ranker_config.json").write_text(json.dumps(settings))
        added = dict(zip(["[MASK]", *MARKERS], range(128_000, 128_005), strict=True))
        (folder / "added_tokens.json").write_text(json.dumps(added))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "DebertaV2Tokenizer"}))
        (folder / "training_args.bin").write_bytes(b"never read")
        (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
        parameters = {name: value for name, value in {**tensors(), **(change or {})}.items() if value is not None}
        save_file(parameters, folder / "model.safetensors", {"format": "pt"})
        return folder
