"""train: align a model with preference records."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from bnfctl import durable, footprint, hub, losses
from bnfctl.artifact import Artifact, Draft, Plan, Store
from bnfctl.config import BuildConfig, TrainConfig
from bnfctl.data.chat import read_config
from bnfctl.errors import UsageError
from bnfctl.hub import split_revision
from bnfctl.machine import gpu_memory, has_gpu, place, resolve_dtype, visible_gpus
from bnfctl.model.source import model_dir, pin_model
from bnfctl.options import flag_name
from bnfctl.recipes import PUBLISHED_SETS
from bnfctl.shape import shape_of
from bnfctl.stages import Prerequisite
from bnfctl.training import tracking

STAGE, VERSION = "train", 2

_LARGEST_ON_CPU = 10**9
"""Parameters: whoever plans a larger model on a machine without a GPU plans for one with."""
_COUNTED = {
    "cut": "responses cut at the maximum length",
    "no_room": "records dropped: the prompt leaves no room for a response",
    "empty": "empty responses left out",
    "no_side": "records dropped: no response left",
}


def plan(config: TrainConfig, store: Store) -> Plan | Prerequisite:
    """Resolve the model and the data; without --data, the only build made from this model, or its published set."""
    _check_options(config)
    model = pin_model(config.model, store)
    notes: list[str] = []
    if config.data is None:
        found = _builds_of(config.model, model.digest, store)
        if len(found) > 1:
            listed = ", ".join(artifact.ref for artifact in found)
            raise UsageError(
                f"several builds were made from {config.model}: {listed}",
                where="--data",
                hint=f"--data {found[-1].ref}",
            )
        if not found:
            return _published(config)
        config = dataclasses.replace(config, data=found[0].ref)
        notes.append(f"data: {config.data}, the only build made from {split_revision(model.ref)[0]}")
    assert config.data is not None
    data = store.find(config.data, "build", "--data")
    config = dataclasses.replace(config, dtype=resolve_dtype(config.dtype))
    return Plan(STAGE, VERSION, config, {"model": model, "data": data.pinned()}, tuple(notes))


def _check_options(config: TrainConfig) -> None:
    """UsageError for bad hyper-parameters, and options that don't go together, before anything starts."""
    if config.loss_arg:
        losses.make(config.loss, config.loss_arg)
    if config.quantize != "none":
        if not config.lora:
            raise UsageError("a quantized base is frozen, so it needs adapters", where="--quantize", hint="--lora 16")
        if config.lora_save == "merged":
            raise UsageError(
                "adapters can't be merged into a quantized base", where="--quantize", hint="--lora-save adapter"
            )
        if not has_gpu():
            what = "bitsandbytes trains on a GPU only: on a CPU its 4-bit products drop gradients, silently"
            raise UsageError(what, where="--quantize", hint="--quantize none")
    tracking.check(config.track)
    narrow = [flag for flag, on in (("--quantize 4bit", config.quantize != "none"),
                                    ("--optimizer adamw-8bit", config.optimizer != "adamw")) if on]  # fmt: skip
    if narrow and config.parallel == "fsdp":
        raise UsageError(f"{narrow[0]} can't be cut into rows", where="--parallel fsdp", hint="--parallel ddp")
    if narrow and find_spec("bitsandbytes") is None:
        raise UsageError(f"{narrow[0]} needs bitsandbytes", where=narrow[0], hint="pip install 'bnfctl[bitsandbytes]'")
    _check_lora(config)
    _check_attention(config)


def _check_lora(config: TrainConfig) -> None:
    """UsageError for options of adapters that there are none of."""
    plain = TrainConfig(model=config.model)
    for name in ("lora_alpha", "lora_targets", "lora_save"):
        if not config.lora and getattr(config, name) != getattr(plain, name):
            flag = flag_name(name)
            raise UsageError(f"{flag} says how adapters are, and there are none", where=flag, hint="--lora 16")


def _check_attention(config: TrainConfig) -> None:
    """UsageError for an attention that is not installed, or not for this machine."""
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(config.attention)
    where = f"--attention {config.attention}"
    if package and find_spec(package) is None:
        raise UsageError(f"{where} needs {package}", where=where, hint="--attention sdpa packs on every machine")
    if (package or config.attention == "flex_attention") and not has_gpu():
        raise UsageError(f"{where} trains on a GPU only", where=where, hint="--attention sdpa")


def run(config: TrainConfig, draft: Draft) -> dict[str, Any]:
    """Write model/ and metrics.jsonl; returns the last figures.  Every rank runs it, in the same draft folder."""
    from bnfctl.data.tokens import check_digest, records
    from bnfctl.model.card import FILE as CARD
    from bnfctl.model.card import card
    from bnfctl.training.loop import train
    from bnfctl.training.setup import Source
    from bnfctl.training.world import joined

    with joined() as world:
        folder = model_dir(draft.inputs["model"])
        build = draft.artifact("data")
        made_with = build.manifest.summary["tokenizer"]
        check_digest(folder, config, made_with)
        train_set, test_set, counts = records(build.rows(), config, folder, made_with)
        for name, count in counts.items():
            if count:
                world.say(f"{count} {_COUNTED[name]}")
        source = Source(folder, draft.inputs["model"], draft.store)
        summary = {**train(config, source, train_set, test_set, draft.path, world), **counts}
        if world.main:
            durable.write_bytes(draft.path / "model" / CARD, card(config, draft.inputs, summary).encode())
    draft.provenance.update(summary.pop("provenance"), engine=f"torch {version('torch')}")
    return summary


def estimate(planned: Plan, store: Store) -> list[str]:
    """For --dry-run: memory on each device, from the model's config.json alone; it may be on the hub."""
    config: TrainConfig = planned.config
    pinned = planned.inputs.get("model") or pin_model(config.model, store)
    raw = hub.model_config(pinned.ref) if pinned.kind == "hub-model" else read_config(model_dir(pinned))
    if not raw:
        return [f"no estimate: the config.json of {pinned.ref} can't be had here"]
    shape = shape_of(raw)
    elsewhere = not has_gpu() and shape is not None and shape.parameters > _LARGEST_ON_CPU
    if elsewhere:
        config = dataclasses.replace(config, dtype="bfloat16")
    devices = place().size if place().size > 1 else config.devices or visible_gpus() or 1
    machine = footprint.Machine(devices, gpu_memory(), "cuda" if has_gpu() or elsewhere else "cpu")
    return footprint.report(raw, config, machine)


def _builds_of(name: str, digest: str | None, store: Store) -> list[Artifact]:
    """The builds whose responses this model sampled: the same content, or the same hub name."""
    found = []
    for artifact in store.artifacts("build"):
        made_by = artifact.manifest.summary.get("model") or {}
        source = artifact.manifest.inputs["input"]
        on_hub = made_by.get("kind") == "hub-model"
        same_name = on_hub and split_revision(made_by["ref"])[0] == split_revision(name)[0]
        published = source["kind"] == "hub-data" and split_revision(source["ref"])[0] == PUBLISHED_SETS.get(
            split_revision(name)[0]
        )
        if (digest and made_by.get("digest") == digest) or same_name or published:
            found.append(artifact)
    return found


def _published(config: TrainConfig) -> Prerequisite:
    name = split_revision(config.model)[0]
    if name not in PUBLISHED_SETS:
        raise UsageError(
            f"no preference data made from {config.model}",
            where="--data",
            hint=f"bnfctl generate --model {config.model} --prompts FILE, then score and build; or --data BUILD",
        )
    source = PUBLISHED_SETS[name]
    return Prerequisite(
        "build", BuildConfig(input=source), "data", f"{source}, the published set of {name}, is built first"
    )
