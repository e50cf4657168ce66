"""train: align a model with preference records."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from typing import Any

from bnfctl import losses
from bnfctl.artifact import Artifact, Draft, Plan, Store
from bnfctl.config import PUBLISHED_SETS, BuildConfig, TrainConfig
from bnfctl.errors import UsageError
from bnfctl.hub import split_revision
from bnfctl.machine import resolve_dtype
from bnfctl.model.source import model_dir, parameter_count, pin_model
from bnfctl.stages import Prerequisite

STAGE, VERSION = "train", 2

_COUNTED = {
    "cut": "responses cut at the maximum length",
    "no_room": "records dropped: the prompt leaves no room for a response",
    "empty": "empty responses left out",
    "no_side": "records dropped: no response left",
}


def plan(config: TrainConfig, store: Store) -> Plan | Prerequisite:
    """Resolve the model and the data; without --data, the only build made from this model, or its published set."""
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
    if config.loss_arg:
        losses.make(config.loss, config.loss_arg)  # bad names and values before anything starts
    assert config.data is not None
    data = store.find(config.data, "build", "--data")
    config = dataclasses.replace(config, dtype=resolve_dtype(config.dtype))
    return Plan(STAGE, VERSION, config, {"model": model, "data": data.pinned()}, tuple(notes))


def run(config: TrainConfig, draft: Draft) -> dict[str, Any]:
    """Write model/ and metrics.jsonl; returns the last figures.  Every rank runs it, in the same draft folder."""
    from bnfctl.data.tokens import check_digest, records
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
    draft.provenance.update(summary.pop("provenance"), engine=f"torch {version('torch')}")
    return summary


def estimate(planned: Plan) -> str:
    """What training needs besides activations: 16 bytes a parameter (float32 master, gradient, two moments)."""
    pinned = planned.inputs.get("model")
    count = parameter_count(pinned) if pinned else None
    if count is None:
        return "16 bytes a parameter (float32 master, gradient, two AdamW moments), plus activations"
    return f"{16 * count / 1e9:.3g} GB for {count / 1e6:.3g}M parameters (16 bytes each), plus activations"


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
