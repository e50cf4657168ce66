"""The end of a training: the policy as a folder that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path

from bnfctl import durable
from bnfctl.hub import split_revision
from bnfctl.model.adapters import merged, save_adapter
from bnfctl.model.loading import checkpoint_dtype, copy_companions, empty, save_model
from bnfctl.model.pretrained import DTYPES
from bnfctl.model.sharding import full_state
from bnfctl.training.setup import Run, Source, lora_of


def save(run: Run, source: Source, target: Path) -> None:
    """Write model/: whole, or the adapter alone; LoRA's adapters are merged in float32, then rounded once.  Collective."""
    config, world = run.config, run.world
    state = full_state(run.policy.model, world.main)
    if world.main:
        dtype = checkpoint_dtype(source.folder) if config.save_dtype == "auto" else config.save_dtype
        if config.lora and config.lora_save == "adapter":
            empty(target)
            # A path means nothing elsewhere, and would be in the digest.
            base = split_revision(source.pinned.ref)[0] if source.pinned.kind == "hub-model" else None
            save_adapter(state, lora_of(config), base, target, DTYPES[dtype])
            copy_companions(source.folder, target)
            durable.sync_tree(target)
        else:
            if config.lora:
                state = merged(run.policy.model, state, lora_of(config).scale, DTYPES[dtype])
            save_model(run.policy.model, state, source.folder, target, dtype)
    world.barrier()
