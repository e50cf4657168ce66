"""How much memory one training takes on each GPU, from the model's config.json alone: no torch, no parameters.

The peak is the largest of a few moments of a step.  Each is a sum of what is held then, term by term: what torch's
operations save for their backward, what FSDP2 gathers, what the head works with.  Held against torch's own memory
tracker by tests/test_footprint.py.

Not in the figures: the CUDA context and NCCL's buffers (about 1 GB), fragmentation, padding inside attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bnfctl.config import TrainConfig
from bnfctl.shape import Shape, shape_of

MB, GB = 10**6, 10**9
USABLE = 0.92
"""Share of a GPU's memory that a training may plan with; the rest is the CUDA context, NCCL and fragmentation."""
ASSUMED_MEMORY = 80 * GB
"""Of a GPU that nobody can ask: an A100 or H100."""
MICRO_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Default of --micro-tokens."""
_NF4 = 0.5 + 4 / 64
"""Bytes a parameter as bitsandbytes stores NF4: half a byte, and a float32 absmax for every block of 64."""
_MOMENTS = {"adamw": 8.0, "adamw-8bit": 2 + 2 * 4 / 256}
"""Bytes a trained parameter: two float32, or two bytes and their float32 absmax for every block of 256."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on each GPU at the moment of a step that needs most."""

    parameters: float
    """With the adapters, and a live reference."""
    gradients: float
    optimizer: float
    gathered: float
    """FSDP2: whole parameters of the root and a layer, the next layer's on their way, and gradients not yet reduced."""
    activations: float
    """Kept for the backward, with autocast's narrow copies of the matrices."""
    workspace: float
    """What that moment works with: the head's chunk of logits and gradient, or a layer's backward."""
    moment: str
    """Which one it is, in words."""

    @property
    def total(self) -> float:
        return sum(value for value in vars(self).values() if not isinstance(value, str))

    def said(self, each: str) -> str:
        """`72.0 GB per GPU: parameters 16.0, ...`: GB, of small models MB; what is less than half a tenth left out."""
        unit, name = (GB, "GB") if self.total >= GB else (MB, "MB")
        named = {part: value for part, value in vars(self).items() if not isinstance(value, str)}
        parts = ", ".join(f"{part} {value / unit:.1f}" for part, value in named.items() if value >= unit / 20)
        return f"{self.total / unit:.1f} {name} per {each}: {parts}"


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
        """Whether products are made on narrow copies of float32 parameters; FSDP2 gathers narrow ones instead."""
        return self.compute == 2 and not self.sharded

    @property
    def masters(self) -> bool:
        """Whether these float32 parameters are the model's own, not adapters beside a frozen base in the compute type."""
        return self.autocast and not self.config.lora

    @property
    def residual(self) -> int:
        """Bytes of a number between layers: the embedding's type."""
        return 4 if self.masters else self.compute

    @property
    def trained(self) -> int:
        config = self.config
        return self.shape.lora_parameters(config.lora, config.lora_targets) if config.lora else self.shape.parameters

    @property
    def trained_linears(self) -> Mapping[str, tuple[int, int]]:
        """The linears of a layer whose input the gradient of trained numbers needs."""
        return self.shape.lora_modules(self.config.lora_targets) if self.config.lora else self.shape.linears

    @property
    def stored(self) -> float:
        """Parameters, whole, with adapters.  A frozen base is loaded in the compute type, but FSDP2's rows are float32."""
        shape, lora = self.shape, bool(self.config.lora)
        size = self.compute if lora and not self.sharded else 4
        if self.config.quantize == "4bit":
            # bitsandbytes quantizes the layers' linear modules; embeddings, norms and head stay what they are loaded as.
            matrices = shape.layers * shape.layer_matrices
            base = _NF4 * matrices + size * (shape.parameters - matrices)
        else:
            base = float(size * shape.parameters)
        live = 4.0 * shape.parameters if self.config.reference == "live" and not lora else 0.0
        return base + live + (4 * self.trained if lora else 0)

    def moments(self) -> Iterator[Footprint]:
        """What is held at each moment that may be the peak."""
        shape, tokens, kept = self.shape, self.tokens, self.kept
        root = self.compute * shape.root_parameters if self.sharded else 0
        group = self.compute * shape.layer_parameters if self.sharded else 0
        # The head runs while the last all-gather's buffer is still held for the overlap with the next one.
        yield self._at("in the head", root + group, kept, self.head_work)
        # A layer and the prefetched next one's all-gather buffer; the head's gradient in the compute type, and the layer
        # before's in float32 as input of its reduce-scatter.  The final norm has let go of what it kept.
        unreduced = 0 if self.config.lora else self.compute * shape.matrix + 4 * shape.layer_parameters
        gathered = root + 2 * group + unreduced if self.sharded else 0
        again = self.layer_kept * tokens + self.copies if self.checkpointed else 0
        still = kept - self._norm(shape.hidden) * tokens
        yield self._at("in the backward", gathered, still, again + self.backward_work)
        if self.sharded and not self.config.lora:
            # Last of all the root: parameters and gradients in the compute type, float32 input of the reduce-scatter.
            whole = 4 * shape.root_parameters
            yield self._at("as the root's gradients are reduced", 2 * root + whole, 0, whole / self.shards)
        # Not the optimizer's step: fused AdamW works in place, and so does bitsandbytes'.

    def _at(self, moment: str, gathered: float, activations: float, workspace: float) -> Footprint:
        trained = self.trained / self.shards
        return Footprint(
            self.stored / self.shards, 4 * trained, _MOMENTS[self.config.optimizer] * trained,
            gathered, activations, workspace, moment,
        )  # fmt: skip

    @property
    def copies(self) -> int:
        """Narrow copies of a layer's float32 matrices, or of its adapters, saved by its products under autocast."""
        lora, linears = self.config.lora, self.trained_linears.values()
        return 2 * sum(lora * (a + b) if lora else a * b for a, b in linears) if self.autocast else 0

    @property
    def widened(self) -> bool:
        """Whether peft makes a float32 copy of what an adapter reads, which autocast narrows again; not on 4-bit bases."""
        return self.autocast and bool(self.config.lora) and self.config.quantize == "none"

    @property
    def kept(self) -> float:
        """Activations kept for the backward at the end of the body."""
        shape = self.shape
        layer = (
            self.residual * shape.hidden * self.tokens
            if self.checkpointed
            else self.layer_kept * self.tokens + self.copies
        )
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
        # What q, k, v, gate and up read: each of them its own narrow copy, else one for each norm.
        trained = self.trained_linears.keys()
        halves = [len({*half} & trained) for half in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))]
        read = size * shape.hidden * sum(halves if self.masters or self.widened else map(bool, halves))
        # Attention keeps query, key, value, result and log-sum-exp; o reads the result put back in order.
        # A CPU has no kernel for grouped heads: keys and values are repeated.
        kv = shape.kv_width if self.device == "cuda" else shape.q_width
        attention = size * ((2 + ("o_proj" in trained)) * shape.q_width + 2 * kv) + 4 * shape.heads
        if shape.softcap and self.config.attention in ("auto", "sdpa", "eager"):
            # Scores in full: tanh's result, the softmax in float32 and its narrow copy, the mask's bool.
            attention += shape.heads * self.config.max_length * (2 * size + 4 + 1)
        # act(gate) keeps gate; the product keeps act(gate) and up; down reads the product.
        mlp = (3 + ("down_proj" in trained)) * size * shape.intermediate
        adapters = size * self.config.lora * len(shape.lora_modules(self.config.lora_targets))
        return norms + read + attention + mlp + adapters

    @property
    def backward_work(self) -> float:
        """The first layer to go backward: gradients of the residual stream, and of the two factors in the MLP.

        Recomputed for down's adapter, it holds more before that: what the adapter reads, as it came and in float32, and
        five of [H]: the gradient, plain and scaled, the residual stream, what the MLP reads, and what down gives.
        """
        shape, size = self.shape, self.compute
        work = self.tokens * (2 * self.residual * shape.hidden + 2 * size * shape.intermediate)
        if self.config.quantize == "4bit":
            # The largest matrix, made whole for its product.
            work += size * max(inputs * outputs for inputs, outputs in shape.linears.values())
        if self.checkpointed and self.widened and "down_proj" in self.trained_linears:
            work = max(work, self.tokens * (5 * size * shape.hidden + (size + 4) * shape.intermediate))
        return work

    @property
    def head_work(self) -> float:
        """The one-pass head: hidden states and their gradient, all tokens trained; [V, H] in float32; a chunk of logits."""
        shape, size = self.shape, self.compute
        n = min(self.tokens, max(1, self.chunk // shape.vocabulary))
        work = 2.0 * size * self.tokens * shape.hidden
        if not self.config.lora:
            # The sum over the chunks, and on a GPU the product that is added to it.
            work += 4 * shape.matrix * (2 if size == 2 else 1)
        if self.masters:
            work += 2 * shape.matrix
        # Logits and softmax in float32, the softmax's narrow copy; three [n, H] in float32.
        return work + n * shape.vocabulary * (8 + (2 if size == 2 else 0)) + 3 * 4 * n * shape.hidden


@dataclass(frozen=True)
class Machine:
    """What a training has to fit."""

    devices: int = 1
    """GPUs, or CPU processes, of the whole training."""
    memory: int | None = None
    """Bytes of one GPU; None: not known."""
    device: str = "cuda"
    chunk: int = 1 << 28
    """CHUNK_ELEMENTS of model/head.py for this kind of device."""

    @property
    def usable(self) -> float:
        """Bytes to plan with.  A CPU's are not counted: what it lacks, it swaps."""
        if self.device == "cpu":
            return float("inf")
        return USABLE * (self.memory or ASSUMED_MEMORY)

    def footprint(self, shape: Shape, config: TrainConfig) -> Footprint:
        return footprint(shape, config, device=self.device, chunk=self.chunk)


def resolve(shape: Shape | None, config: TrainConfig, machine: Machine) -> TrainConfig:
    """The config with what `auto` means here: the fastest of ddp, fsdp and checkpointing that fits, in this order.

    ddp without checkpointing, fsdp without, ddp with, fsdp with; where none fits, the smallest.  A model of unknown
    shape gets what needs least.
    """
    narrow = config.quantize != "none" or config.optimizer != "adamw"
    both = machine.devices > 1 and not narrow  # bitsandbytes' tensors can't be cut into rows
    parallels = [config.parallel] if config.parallel != "auto" else ["ddp", *(["fsdp"] if both else [])]
    again = [config.activation_checkpointing] if config.activation_checkpointing != "auto" else ["off", "on"]
    sized = dataclasses.replace(
        config, devices=machine.devices, micro_tokens=config.micro_tokens or MICRO_TOKENS[machine.device]
    )
    found = [
        dataclasses.replace(sized, parallel=parallel, activation_checkpointing=on)
        for on in again
        for parallel in parallels
    ]
    if shape is None:
        return found[0] if machine.device == "cpu" else found[-1]
    sizes = [machine.footprint(shape, one).total for one in found]
    fitting = [one for one, size in zip(found, sizes, strict=True) if size <= machine.usable]
    return fitting[0] if fitting else found[sizes.index(min(sizes))]


def advice(shape: Shape, config: TrainConfig, machine: Machine) -> list[str]:
    """For a config, as asked, that does not fit: the least changes that make it fit, as flags with the figure it then has.

    At most one of each kind: same results on the same GPUs; more GPUs; another training.  Where nothing fits, the
    smallest there is; nothing for what is that already.
    """
    on: dict[str, Any] = {"activation_checkpointing": "on"}
    budget = config.micro_tokens or MICRO_TOKENS[machine.device]
    fewer: list[dict[str, Any]] = [{"micro_tokens": size} for size in (8192, 4096, 2048) if size < budget]
    least = {**on, **(fewer[-1] if fewer else {})}
    whole = {"parallel": "ddp"} if config.parallel == "fsdp" else {}  # bitsandbytes' tensors can't be cut into rows
    lora: dict[str, Any] = {"lora": config.lora or 16}
    others: list[dict[str, Any]] = []
    if not config.lora:
        others = [{"optimizer": "adamw-8bit", **whole}] if config.optimizer == "adamw" else []
        others.append(lora)
    if config.quantize == "none":
        others.append({**lora, "quantize": "4bit", "lora_save": "adapter", "optimizer": "adamw", **whole})
    spread: list[dict[str, Any]] = []
    if config.quantize == "none" and config.optimizer == "adamw":
        spread = [{"parallel": "fsdp"}] if machine.devices > 1 else []
        spread += [{"parallel": "fsdp", "devices": 2**n} for n in range(1, 9) if 2**n > machine.devices]
    kinds = [
        [on, *fewer, *({**on, **one} for one in fewer)],
        [*spread, *({**on, **one} for one in spread)],
        [{**one, **extra} for extra in ({}, on, least) for one in others],
    ]
    sized = [[_tried(shape, config, change, machine) for change in kind] for kind in kinds]
    found = [next((pair for pair in kind if pair[0] <= machine.usable and pair[1]), None) for kind in sized]
    fitting = [pair for pair in found if pair is not None]
    shown = fitting or sorted(pair for kind in sized for pair in kind if pair[1])[:1]
    return [f"{flags}: {total / GB:.1f} GB" for total, flags in shown]


def _tried(shape: Shape, asked: TrainConfig, change: Mapping[str, Any], machine: Machine) -> tuple[float, str]:
    """(bytes, what to type) for a change; `auto` then means what it means with that change."""
    after = dataclasses.replace(asked, **change)
    wider = dataclasses.replace(machine, devices=change.get("devices", machine.devices))
    return wider.footprint(shape, resolve(shape, after, wider)).total, _flags(asked, after)


def _flags(before: TrainConfig, after: TrainConfig) -> str:
    """What to type to get from one to the other."""
    names = [field.name for field in dataclasses.fields(after)]
    changed = [name for name in names if getattr(before, name) != getattr(after, name)]
    return " ".join(f"--{name.replace('_', '-')} {getattr(after, name)}" for name in changed)


def report(raw: Mapping[str, Any], config: TrainConfig, machine: Machine) -> list[str]:
    """The lines of --dry-run about memory; raw: the model's config.json."""
    shape = shape_of(raw)
    if shape is None:
        return [f"no estimate for a {raw.get('model_type') or 'model'} of this shape: it is not a plain decoder"]
    chosen = resolve(shape, config, machine)
    needed = machine.footprint(shape, chosen)
    each = "GPU" if machine.device == "cuda" else "process"
    many = "" if machine.devices == 1 else f"s ({chosen.parallel})" if each == "GPU" else f"es ({chosen.parallel})"
    lines = [
        needed.said(each),
        f"the peak is {needed.moment}, with {chosen.micro_tokens} tokens per micro-batch, {machine.devices} {each}{many}, "
        f"activation checkpointing {chosen.activation_checkpointing}",
    ]
    if machine.device == "cpu":
        return lines
    size = f"{(machine.memory or ASSUMED_MEMORY) / GB:.1f} GB" + ("" if machine.memory else " (assumed)")
    if needed.total <= machine.usable:
        return [*lines, f"fits a GPU of {size}"]
    return [*lines, f"does not fit a GPU of {size}", *(f"try {one}" for one in advice(shape, config, machine))]
