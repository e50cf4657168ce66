"""ArmoRM-Llama3-8B-v0.1 in plain torch: tiny checkpoints in the published layout, and what they must score.

Nothing here comes from bnfctl, nor from transformers' Llama: names, shapes, dtypes and config files are those of
hf.co/RLHFlow/ArmoRM-Llama3-8B-v0.1, the forward is its modeling_custom.py step by step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

PATTERN = [128009, 128006, 78191, 128007, 271]
"""<|eot_id|><|start_header_id|>assistant<|end_header_id|> and two newlines."""
BOS, EOT, PAD = 128000, 128009, 128256
HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
TURNS = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
)
HEADER_TURN = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
TEMPLATES = {
    "on request": TURNS + "{% if add_generation_prompt %}" + HEADER_TURN + "{% endif %}",
    "never": TURNS,
    "always": TURNS + HEADER_TURN,
}
"""When a Llama-3 template ends with the assistant's header: the early ones did it even without being asked."""
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_checkpoint(path: Path, *, seed: int = 0, template: str = "on request", **tokenizer_options: Any) -> Path:
    """A random checkpoint of two layers, in two shards: bfloat16 trunk, float32 heads, and remote code that must not run."""
    write_tokenizer(path, template=TEMPLATES.get(template, template), **tokenizer_options)
    config = published_config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                              num_key_value_heads=2, max_position_embeddings=512, gating_hidden_dim=24)  # fmt: skip
    write_parameters(path, config, random_parameters(config, seed))
    (path / "modeling_custom.py").write_text("raise RuntimeError('remote code ran')\n", encoding="utf-8")
    return path


def published_config(**sizes: Any) -> dict[str, Any]:
    """config.json as published, with other sizes."""
    return {
        "architectures": ["LlamaForRewardModelWithGating"],
        "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
        "bos_token_id": BOS, "eos_token_id": 128001, "pad_token_id": PAD,
        "gating_hidden_dim": 1024, "gating_n_hidden": 3, "gating_temperature": 10, "num_objectives": 19,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192,
        "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "initializer_range": 0.02, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "torch_dtype": "float32", "transformers_version": "4.40.0", "use_cache": False, "vocab_size": 128257,
        **sizes,
    }  # fmt: skip


def random_parameters(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Every tensor of the published state dict, large enough that each of them moves the score."""
    width, inner, gate = config["hidden_size"], config["intermediate_size"], config["gating_hidden_dim"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    trunk = {"model.embed_tokens.weight": normal(config["vocab_size"], width, scale=1.0)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
                  "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
                  "mlp.down_proj": (width, inner)}  # fmt: skip
        trunk |= {f"{layer}{name}.weight": normal(*s, scale=2 * s[1] ** -0.5) for name, s in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            trunk[f"{layer}{name}.weight"] = 1 + normal(width, scale=0.1)
    trunk["model.norm.weight"] = 1 + normal(width, scale=0.1)
    heads = {
        "regression_layer.weight": normal(19, width, scale=width**-0.5),
        "reward_transform_matrix": torch.eye(19) + normal(19, 19, scale=0.2),
        "gating.logit_scale": torch.tensor([1.3]),
    }
    sizes = [width, *[gate] * config["gating_n_hidden"], 19]
    for i, (size, size_out) in enumerate(pairwise(sizes)):
        heads[f"gating.layers.{i}.weight"] = normal(size_out, size, scale=4 * size**-0.5)
        heads[f"gating.layers.{i}.bias"] = normal(size_out, scale=0.5)
    return {name: tensor.bfloat16() for name, tensor in trunk.items()} | heads


def write_parameters(path: Path, config: dict[str, Any], parameters: dict[str, Tensor]) -> None:
    """config.json and two safetensors shards with their index."""
    names = sorted(parameters)
    half = len(names) // 2
    shards = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for file, part in shards.items():
        save_file({name: parameters[name].contiguous() for name in part}, path / file, metadata={"format": "pt"})
    size = sum(tensor.numel() * tensor.element_size() for tensor in parameters.values())
    places = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_tokenizer(path: Path, *, template: str, adds_bos: bool = False, padding_side: str = "right") -> None:
    """Llama 3's ids where they matter, bytes and unused tokens elsewhere; by default it adds no BOS by itself."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"ĊĊ": 271, "ĊĊĊ": 1432, "assistant": 78191}
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ")]
    for end in range(2, len("assistant") + 1):
        merges.append(("assistant"[: end - 1], "assistant"[end - 1]))
        vocabulary.setdefault("assistant"[:end], 1000 + end)
    special = {BOS: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128006: "<|start_header_id|>",
               128007: "<|end_header_id|>", EOT: "<|eot_id|>", PAD: "[PAD]"}  # fmt: skip
    taken = {number: symbol for symbol, number in vocabulary.items()}
    whole = {taken.get(i) or special.get(i) or f"<unused {i}>": i for i in range(PAD + 1)}
    tokenizer = Tokenizer(models.BPE(vocab=whole, merges=merges, ignore_merges=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if adds_bos:
        bos = ("<|begin_of_text|>", BOS)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B", special_tokens=[bos]
        )
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "[PAD]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True,
                "model_max_length": 4096, "padding_side": padding_side, "chat_template": template, **names}  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (path / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")


def conversation(messages: Sequence[dict[str, str]], response: str) -> str:
    """The text that ArmoRM reads, written out: one BOS, each turn trimmed and closed, no header behind the response."""
    turns = [*messages, {"role": "assistant", "content": response}]
    return "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n{turn['content'].strip()}<|eot_id|>" for turn in turns
    )


class Twin:
    """The whole forward from the files, in one floating type."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self.config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        self.parameters: dict[str, Tensor] = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self.parameters |= {name: opened.get_tensor(name).to(dtype) for name in opened.keys()}  # noqa: SIM118
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))

    def encode(self, messages: Sequence[dict[str, str]], response: str) -> list[int]:
        return list(self.tokenizer.encode(conversation(messages, response), add_special_tokens=False).ids)

    def one(self, ids: list[int]) -> dict[str, Tensor]:
        """A batch of one without padding, as in SimPO's script: score [], rewards [19], gating [19]."""
        return {name: value[0] for name, value in self(torch.tensor([ids])).items()}

    @torch.inference_mode()
    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """score [B], rewards [B, 19], gating [B, 19] of ids [B, L]; mask [B, L] is 0 on the padding of either side."""
        hidden = self._trunk(ids, mask)
        rows = torch.arange(len(ids))
        real = torch.ones_like(ids) if mask is None else mask
        last = (real * torch.arange(ids.shape[1])).argmax(1)
        rewards = hidden[rows, last] @ self.parameters["regression_layer.weight"].T
        gate = hidden[rows, torch.tensor([self._gate_position(row) for row in ids.tolist()])]
        depth = self.config["gating_n_hidden"]
        for i in range(depth + 1):
            gate = linear(
                gate, self.parameters[f"gating.layers.{i}.weight"], self.parameters[f"gating.layers.{i}.bias"]
            )
            gate = gate.relu() if i < depth else gate
        gating = self.parameters["gating.logit_scale"] * (gate / self.config["gating_temperature"]).softmax(1)
        score = (gating * (rewards @ self.parameters["reward_transform_matrix"])).sum(1)
        return {"score": score, "rewards": rewards, "gating": gating}

    def _gate_position(self, ids: list[int]) -> int:
        return max(i for i in range(len(ids)) if ids[i : i + len(PATTERN)] == PATTERN)

    def _trunk(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, H] behind the final norm."""
        batch, length = ids.shape
        positions = torch.arange(length).expand(batch, length)
        attended = None
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            # a place of padding looks at itself, so that no row of the softmax is empty
            attended = (causal & mask.bool()[:, None] | torch.eye(length, dtype=torch.bool))[:, None]
        hidden = self.parameters["model.embed_tokens.weight"][ids]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            attention = self._attention(layer, self._norm(f"{layer}input_layernorm", hidden), positions, attended)
            hidden = hidden + self._linear(f"{layer}self_attn.o_proj", attention)
            normed = self._norm(f"{layer}post_attention_layernorm", hidden)
            inner = silu(self._linear(f"{layer}mlp.gate_proj", normed)) * self._linear(f"{layer}mlp.up_proj", normed)
            hidden = hidden + self._linear(f"{layer}mlp.down_proj", inner)
        return self._norm("model.norm", hidden)

    def _attention(self, layer: str, states: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size = self.config["hidden_size"] // heads
        q, k, v = (
            self._linear(f"{layer}self_attn.{n}_proj", states).unflatten(-1, (-1, size)).transpose(1, 2) for n in "qkv"
        )
        q, k = self._turn(q, positions), self._turn(k, positions)
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return out.transpose(1, 2).flatten(2)

    def _turn(self, states: Tensor, positions: Tensor) -> Tensor:
        """Rotary positions: coordinate i goes with coordinate i + size / 2."""
        size = states.shape[-1]
        speed = 1 / self.config["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
        angle = positions[:, None, :, None].float() * speed
        cosine, sine = angle.cos().to(states.dtype), angle.sin().to(states.dtype)
        first, second = states.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

    def _norm(self, name: str, states: Tensor) -> Tensor:
        scale = (states.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return states * scale * self.parameters[f"{name}.weight"]

    def _linear(self, name: str, states: Tensor) -> Tensor:
        return linear(states, self.parameters[f"{name}.weight"])
