"""The parts of a training run, as they are before its first step."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from bnfctl import footprint
from bnfctl.artifact import Pinned, Store
from bnfctl.config import ReferenceConfig, TrainConfig
from bnfctl.data.chat import context_length, read_config
from bnfctl.data.records import Record, Side
from bnfctl.losses import Loss
from bnfctl.model.adapters import Lora, add_adapters, without_adapters
from bnfctl.model.head import CHUNK_ELEMENTS
from bnfctl.model.loading import choose_packing, load_model, padded_attention, stored_dtypes
from bnfctl.model.policy import Policy, check_parts, set_attention
from bnfctl.model.pretrained import torch_dtype
from bnfctl.model.sharding import empty_policy_model, layers, load_rows, shard
from bnfctl.model.threads import keep_freed_memory
from bnfctl.shape import shape_of
from bnfctl.training import reference
from bnfctl.training.batches import Kept, Layout, Plan, Work, all_sides
from bnfctl.training.checks import check_parameters, check_positions, longest_sequence
from bnfctl.training.memory import loading
from bnfctl.training.objective import partners
from bnfctl.training.world import World


@dataclass(frozen=True)
class Source:
    """The model that training starts from, and where its reference rows are kept."""

    folder: Path
    pinned: Pinned
    store: Store


@dataclass(frozen=True, eq=False)
class Run:
    """The parts of one training run."""

    config: TrainConfig
    loss: Loss
    plan: Plan
    policy: Policy
    optimizer: torch.optim.Optimizer
    splits: dict[str, Work]
    """train, test (all sides; empty where no report is wanted), and for KTO train-kl, test-kl."""
    reference: reference.Reference | None
    referred: frozenset[str]
    """The splits that the reference knows."""
    reference_refs: list[str]
    """The artifacts with its cached rows."""
    world: World
    sharded: bool


def prepare(
    config: TrainConfig, loss: Loss, plan: Plan, test_set: Sequence[Record], source: Source, world: World
) -> Run:
    """Model, optimizer and reference.  Collective."""
    if world.device.type == "cpu":
        keep_freed_memory()
    config = resolve(config, source.folder, world)
    sharded = config.parallel == "fsdp" and world.size > 1
    with loading(config, source.folder, world):
        policy = load(config, source.folder, world, sharded)
    tested = test_set if config.eval_every else []
    limit = min(config.max_length, context_length(source.folder) or config.max_length)
    longest = longest_sequence([*plan.records, *tested], limit if loss.needs_kl else 0)
    check_positions(source.folder, longest)
    packed = choose_packing(policy, config.layout, config.attention, longest, str(source.folder))
    rows = packed and policy.attends_rows
    layout = Layout(packed, rows, rows and config.share_prompt)
    assert config.micro_tokens is not None  # resolved
    splits = make_splits(loss, plan, tested, layout, config.micro_tokens, limit, world)
    stored: reference.Reference | None = None
    refs: list[str] = []
    # A report on the test split has margins, which need the reference whatever the loss.
    referred = {
        name: split for name, split in splits.items() if split.records and (loss.needs_reference or name == "test")
    }
    if referred:
        if config.reference == "live":
            with loading(config, source.folder, world):
                stored = live_reference(config, policy, source.folder, world, sharded)
        else:
            kind = ReferenceConfig(
                str(policy.compute_dtype).removeprefix("torch."), policy.device.type, policy.attention, packed,
                policy.compute_dtype != torch.float32 and (sharded or narrow_base(config, source.folder)),
                config.quantize,
            )  # fmt: skip
            maker = reference.Maker(source.store, source.pinned, kind, layout, config.micro_tokens, world)
            stored, refs = maker.cached(policy, referred)
    if config.activation_checkpointing == "on":
        checkpoint_activations(policy)
    optimizer = make_optimizer(config, policy)
    return Run(config, loss, plan, policy, optimizer, splits, stored, frozenset(referred), refs, world, sharded)


def narrow_base(config: TrainConfig, folder: Path) -> bool:
    """Whether LoRA's base is held in bfloat16: it needs no float32 masters where it is stored like that, all of it."""
    return bool(config.lora) and config.dtype == "bfloat16" and stored_dtypes(folder) == {"bfloat16"}


def resolve(config: TrainConfig, folder: Path, world: World) -> TrainConfig:
    """The config with its `auto` fields decided by what the model needs and each device has."""
    memory = None
    if world.device.type == "cuda":
        memory = -int(world.max(torch.tensor(-torch.cuda.mem_get_info(world.device)[1], device=world.device)))
    machine = footprint.Machine(world.size, memory, world.device.type, CHUNK_ELEMENTS[world.device.type])
    chosen = footprint.resolve(shape_of(read_config(folder)), config, machine)
    if world.size > 1 or chosen.activation_checkpointing == "on":
        recomputed = ", activation checkpointing" if chosen.activation_checkpointing == "on" else ""
        world.say(f"{world.size} {'ranks' if world.size > 1 else 'rank'}, {chosen.parallel}{recomputed}")
    return chosen


def load(config: TrainConfig, folder: Path, world: World, sharded: bool) -> Policy:
    """The policy as training starts, its adapters in, on this rank's device: whole, or this rank's rows of it."""
    attention = padded_attention(folder, config.attention)
    if sharded:
        model = empty_policy_model(folder, attention=attention, trust_remote_code=config.trust_remote_code)
    else:
        stored = torch.bfloat16 if narrow_base(config, folder) else torch.float32
        model = load_model(folder, stored, attention, config.trust_remote_code, world.device, quantized(config))
    if config.lora:
        add_adapters(model, lora_of(config), config.seed)
    policy = Policy(model, torch_dtype(config.dtype))
    if sharded:
        shard(policy, world.size, world.device.type)
        load_rows(policy, folder, world.device)
    else:
        policy.to(world.device)
    check_parameters(policy, folder)
    check_parts(policy, str(folder))
    return policy


def live_reference(config: TrainConfig, policy: Policy, folder: Path, world: World, sharded: bool) -> reference.Live:
    """The policy with its adapters off, else a second model, in the same layout."""
    if config.lora:
        return reference.Live(policy, lambda: without_adapters(policy.model))
    second = load(config, folder, world, sharded)
    second.requires_grad_(False)
    set_attention(second, policy.attention)
    return reference.Live(second)


def lora_of(config: TrainConfig) -> Lora:
    alpha = 2.0 * config.lora if config.lora_alpha is None else config.lora_alpha
    return Lora(config.lora, alpha, config.lora_targets)


def quantized(config: TrainConfig) -> Any:
    """transformers' description of NF4 (QLoRA, arXiv 2305.14314), or None."""
    if config.quantize == "none":
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch_dtype(config.dtype)
    )


def checkpoint_activations(policy: Policy) -> None:
    """Keep one hidden state per layer, and compute the rest of it again in the backward.

    Not transformers' own switch, which wants layers in training mode: some of them then apply dropout.
    """
    for layer in layers(policy.model):
        again = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        layer.forward = again


def make_splits(
    loss: Loss, plan: Plan, test_set: Sequence[Record], layout: Layout, budget: int, limit: int, world: World
) -> dict[str, Work]:
    """Which records are computed, for what.  limit: tokens that the model has positions for, or the user wants."""

    def keep(side: Side) -> bool:
        return side.label in loss.labels

    def work(records: Sequence[Record], kept: Kept) -> Work:
        return Work(records, kept, layout, budget, world.rank, world.size)

    splits = {"train": work(plan.records, keep), "test": work(test_set, all_sides)}
    if loss.needs_kl:
        for name, split in list(splits.items()):
            mismatched = partners(split.records, limit) if split.records else []
            if mismatched:
                splits[f"{name}-kl"] = work(mismatched, all_sides)
            elif split.records:
                world.say(f"{name} split: all records have one prompt, so KTO's reference point is 0")
    return splits


def make_optimizer(config: TrainConfig, policy: Policy) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norms and biases do not."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.optimizer == "adamw-8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(groups, **settings)
        return optimizer
    # fused: one pass over the numbers, and no temporary copies of all parameters.
    return torch.optim.AdamW(groups, **settings, fused=True)
