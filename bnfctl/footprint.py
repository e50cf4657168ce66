"""How much memory one training takes on each GPU, from the model's config.json alone: no torch, no parameters.

The peak is the largest of a few moments of a step.  Each is a sum of what is held then, term by term: what torch's
operations save for their backward, what FSDP2 gathers, what the head works with.  Held against torch's own memory
tracker by tests/test_footprint.py.

Not in the figures: the CUDA context and NCCL's buffers (about 1 GB), fragmentation, padding inside attention.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bnfctl.config import TrainConfig

GB = 10**9
USABLE = 0.92
"""Share of a GPU's memory that a training may plan with; the rest is the CUDA context, NCCL and fragmentation."""
ASSUMED_MEMORY = 80 * GB
"""Of a GPU that nobody can ask: an A100 or H100."""
MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Default of --micro-tokens."""
_NF4 = 0.5 + 4 / 64
"""Bytes a parameter as bitsandbytes stores NF4: half a byte, and a float32 absmax for every block of 64."""
_MOMENTS = {"adamw": 8.0, "adamw-8bit": 2 + 2 * 4 / 256}
"""Bytes a trained parameter: two float32, or two bytes and their float32 absmax for every block of 256."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


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


@dataclass(frozen=True)
class Footprint:
    """Bytes on each GPU at the moment of a step that needs most."""

    parameters: float
    """With the adapters, and a live reference."""
    gradients: float
    optimizer: float
    gathered: float
    """FSDP2: whole parameters of the root and of up to two layers, and gradients not yet reduced."""
    activations: float
    """Kept for the backward, with autocast's narrow copies of the matrices."""
    workspace: float
    """What that moment works with: the head's chunk of logits and gradient, a layer's backward, AdamW's own."""
    moment: str
    """head, forward, backward, reduction or optimizer: which one it is."""

    @property
    def total(self) -> float:
        return sum(value for value in vars(self).values() if not isinstance(value, str))

    def as_text(self) -> str:
        parts = {name: value for name, value in vars(self).items() if not isinstance(value, str)}
        listed = ", ".join(f"{name} {value / GB:.1f}" for name, value in parts.items() if value >= GB / 20)
        return f"{self.total / GB:.1f} GB per GPU ({listed})"


def footprint(shape: Shape, config: TrainConfig, *, device: str = "cuda", chunk: int = 1 << 28) -> Footprint:
    """The peak of a training whose `auto` fields are resolved; chunk: elements of the head's logits (model/head.py)."""
    return max(_Step(shape, config, device, chunk).moments(), key=lambda moment: moment.total)


@dataclass(frozen=True)
class _Step:
    """One micro-batch that is not the first of its run: gradients and moments are there.  All in bytes."""

    shape: Shape
    config: TrainConfig
    device: str
    chunk: int

    @property
    def tokens(self) -> int:
        return self.config.micro_tokens or MICRO_TOKENS[self.device]

    @property
    def sharded(self) -> bool:
        return self.config.parallel == "fsdp" and (self.config.devices or 1) > 1

    @property
    def shards(self) -> int:
        return (self.config.devices or 1) if self.sharded else 1

    @property
    def checkpointed(self) -> bool:
        return self.config.activation_checkpointing == "on"

    @property
    def compute(self) -> int:
        """Bytes of a number in the compute type."""
        return 2 if self.config.dtype in ("bfloat16", "float16") else 4

    @property
    def autocast(self) -> bool:
        """Whether products are made on narrow copies of float32 masters; FSDP2 gathers narrow parameters instead."""
        return self.compute == 2 and not self.sharded

    @property
    def residual(self) -> int:
        """Bytes of a number between layers: the embedding's type, narrow only where FSDP2 gathered it so."""
        return 4 if self.autocast else self.compute

    @property
    def trained(self) -> int:
        config = self.config
        return self.shape.lora_parameters(config.lora, config.lora_targets) if config.lora else self.shape.parameters

    @property
    def stored(self) -> float:
        """Parameters, whole, with adapters."""
        shape, lora = self.shape, bool(self.config.lora)
        if self.config.quantize == "4bit":
            # bitsandbytes quantizes the layers' linear modules; embeddings, norms and head stay in 16 bits.
            matrices = shape.layers * shape.layer_matrices
            base = _NF4 * matrices + 2 * (shape.parameters - matrices)
        else:
            base = 4.0 * shape.parameters
        live = 4.0 * shape.parameters if self.config.reference == "live" and not lora else 0.0
        return base + live + (4 * self.trained if lora else 0)

    def moments(self) -> Iterator[Footprint]:
        """What is held at each moment that may be the peak."""
        shape, tokens, kept = self.shape, self.tokens, self.kept
        wide, narrow = 4 * shape.layer_parameters, self.compute * shape.layer_parameters
        root = self.compute * shape.root_parameters if self.sharded else 0
        group = narrow if self.sharded else 0
        # The head runs while the last all-gather's buffer is still held for the overlap with the next one.
        yield self._at("head", root + group, kept, self.head_work)
        if self.autocast and self.checkpointed and not self.config.lora:
            # Autocast caches every narrow copy until its region ends, at the end of the body.
            yield self._at("forward", 0, kept + 2 * shape.layers * shape.layer_matrices, 0)
        # A layer, the prefetched next one and its all-gather buffer; gradients of the head and of the layer in the
        # compute type, the layer's float32 input of the reduce-scatter, and the one of the layer before.
        unreduced = 0 if self.config.lora else self.compute * shape.matrix
        layer_grads = 0 if self.config.lora else narrow
        gathered = root + 3 * group + unreduced + (layer_grads + wide if not self.config.lora else 0)
        again = self.layer_kept * tokens + self.copies if self.checkpointed else 0
        yield self._at("backward", gathered if self.sharded else 0, kept, again + self.backward_work)
        if self.sharded and not self.config.lora:
            # Last of all the root: parameters and gradients in the compute type, float32 input of the reduce-scatter.
            yield self._at("reduction", 2 * root + 4 * shape.root_parameters, 0, 4 * shape.root_parameters / self.shards)
        yield self._at("optimizer", 0, 0, 4 * self.trained / self.shards if self.device == "cuda" else 0)

    def _at(self, moment: str, gathered: float, activations: float, workspace: float) -> Footprint:
        trained = self.trained / self.shards
        return Footprint(
            self.stored / self.shards, 4 * trained, _MOMENTS[self.config.optimizer] * trained,
            gathered, activations, workspace, moment,
        )  # fmt: skip

    @property
    def copies(self) -> int:
        """Narrow copies of a layer's matrices, saved by its products under autocast."""
        return 2 * self.shape.layer_matrices if self.autocast and self.config.quantize == "none" else 0

    @property
    def kept(self) -> float:
        """Activations kept for the backward at the end of the body."""
        shape = self.shape
        layer = self.residual * shape.hidden * self.tokens if self.checkpointed else self.layer_kept * self.tokens + self.copies
        return shape.layers * layer + self._norm(shape.hidden) * self.tokens

    def _norm(self, width: int) -> int:
        """Bytes a token that an RMSNorm keeps: its float32 input (x * x, x * rsqrt), 1 / rms, and the normalised x.

        The normalised x is there for the gradient of the norm's own parameters, in the type of x; Gemma's is float32.
        """
        normalised = 0 if self.config.lora else (4 if self.shape.gemma else self.residual) * width
        return 4 * width + 4 + normalised

    @property
    def layer_kept(self) -> float:
        """Bytes a token that a decoder layer keeps."""
        shape, size = self.shape, self.compute
        norms = shape.norms * self._norm(shape.hidden)
        if shape.qk_norms:
            norms += self._norm(shape.q_width) + self._norm(shape.kv_width)
        # What q, k, v, gate and up read: under autocast each of them its own narrow copy, else one for each norm.
        read = (5 if self.autocast else 2) * size * shape.hidden
        # Attention keeps query, key, value, result and log-sum-exp; o_proj reads the result put back in order.
        # A CPU has no kernel for grouped heads: keys and values are repeated.
        kv = shape.kv_width if self.device == "cuda" else shape.q_width
        attention = size * (3 * shape.q_width + 2 * kv) + 4 * shape.heads
        if shape.softcap and self.config.attention in ("auto", "sdpa", "eager"):
            # Scores in full: tanh's result, the softmax in float32 and its narrow copy, the mask's bool.
            attention += shape.heads * self.config.max_length * (2 * size + 4 + 1)
        # act(gate) keeps gate; the product keeps act(gate) and up; down reads the product.
        mlp = 4 * size * shape.intermediate
        adapters = size * self.config.lora * len(shape.lora_modules(self.config.lora_targets))
        return norms + read + attention + mlp + adapters

    @property
    def backward_work(self) -> float:
        """The first layer to go backward: gradients of the residual stream, and of the two factors in the MLP."""
        shape = self.shape
        return self.tokens * (2 * self.residual * shape.hidden + 2 * self.compute * shape.intermediate)

    @property
    def head_work(self) -> float:
        """The one-pass head: hidden states and their gradient, all tokens trained; [V, H] in float32; a chunk of logits."""
        shape, size = self.shape, self.compute
        n = min(self.tokens, max(1, self.chunk // shape.vocabulary))
        work = 2.0 * size * self.tokens * shape.hidden
        if not self.config.lora:
            # The sum over the chunks, and on a GPU the product that is added to it.
            work += 4 * shape.matrix * (2 if size == 2 else 1)
        if self.autocast:
            work += 2 * shape.matrix
        # Logits and softmax in float32, the softmax's narrow copy; three [n, H] in float32.
        return work + n * shape.vocabulary * (8 + (2 if size == 2 else 0)) + 3 * 4 * n * shape.hidden
