"""The sizes of a decoder, from its config.json alone: what its parameters and its memory follow from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of a mixture of experts."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like decoder: what its parameters and activations follow from."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    softcap: bool
    """Gemma-2's cap on attention scores."""

    @property
    def gemma(self) -> bool:
        return self.family.startswith("gemma")

    @property
    def norms(self) -> int:
        """Norms of [H] in a layer: Gemma 2 and 3 have one before and one after each half."""
        return 4 if self.family.startswith(("gemma2", "gemma3")) else 2

    @property
    def qk_norms(self) -> bool:
        """Whether each head's query and key are normalised."""
        return self.family.startswith(("qwen3", "gemma3"))

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear modules of a layer: name -> (inputs, outputs)."""
        return {
            "q_proj": (self.hidden, self.q_width),
            "k_proj": (self.hidden, self.kv_width),
            "v_proj": (self.hidden, self.kv_width),
            "o_proj": (self.q_width, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer_matrices(self) -> int:
        """Parameters in the matrices of a layer."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def layer_parameters(self) -> int:
        biases = self.qkv_bias * (self.q_width + 2 * self.kv_width) + self.o_bias * self.hidden
        biases += self.mlp_bias * (2 * self.intermediate + self.hidden)
        return self.layer_matrices + biases + self.norms * self.hidden + self.qk_norms * 2 * self.head_dim

    @property
    def matrix(self) -> int:
        """Numbers in the output matrix [V, H]."""
        return self.vocabulary * self.hidden

    @property
    def root_parameters(self) -> int:
        """Embeddings, head and final norm: what FSDP2 gathers with the root."""
        return self.matrix * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.root_parameters

    def lora_parameters(self, rank: int, targets: tuple[str, ...]) -> int:
        return self.layers * sum(rank * (a + b) for a, b in self.lora_modules(targets).values())

    def lora_modules(self, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
        """The linears of a layer that get adapters."""
        return {name: size for name, size in self.linears.items() if "all-linear" in targets or name in targets}


def shape_of(raw: Mapping[str, Any]) -> Shape | None:
    """The sizes in a config.json; None for a model that is no plain decoder (mixture of experts, state space, ..)."""
    inner = raw.get("text_config")
    text: Mapping[str, Any] = {**raw, **inner} if isinstance(inner, Mapping) else raw
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    sizes = [text.get(name) for name in needed]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or any(text.get(name) for name in _EXPERTS):
        return None
    hidden, layers, heads, intermediate, vocabulary = (int(size) for size in sizes if size is not None)
    family = str(text.get("model_type") or "")
    attention_bias = bool(text.get("attention_bias", False))
    return Shape(
        family, hidden, layers, heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or hidden // heads),
        intermediate=intermediate, vocabulary=vocabulary,
        # A config.json leaves out what is its class's default: Gemma ties, the others do not.
        tied=bool(text.get("tie_word_embeddings", family.startswith("gemma"))),
        qkv_bias=attention_bias or family.startswith("qwen2"), o_bias=attention_bias,
        mlp_bias=bool(text.get("mlp_bias", False)), softcap=bool(text.get("attn_logit_softcapping")),
    )  # fmt: skip
