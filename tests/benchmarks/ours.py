"""bnfctl's own trainer under the benchmark: the only file here that knows its interface."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from bnfctl.config import TrainConfig
from bnfctl.data.records import Record
from tests.benchmarks.clock import clocked, resident_mib
from tests.benchmarks.job import Job, Timing

NAMES = ("bnf", "sft-all", "sft", "dpo", "kto")
NOTES = {"sft-all": "the same tokens, every label +1", "sft": "chosen responses only"}


def load() -> None:
    """Import what a run needs, so that it is not timed."""
    import pyarrow.parquet  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from bnfctl.training import loop  # noqa: F401


def train(job: Job, records: list[Record]) -> Timing:
    """One pass over the records; loading and saving the model are not counted."""
    from bnfctl.artifact import Store
    from bnfctl.model.source import pin_model
    from bnfctl.training import loop, reference, setup, world

    if job.name == "sft-all":
        records = [replace(r, sides=tuple(replace(side, label=1) for side in r.sides)) for r in records]
    config = TrainConfig(
        model=job.folder,
        loss=job.name.removesuffix("-all"),
        lr=job.lr,
        batch_size=job.batch_pairs,
        dtype=job.dtype,
        micro_tokens=job.micro_tokens,
        share_prompt=job.share_prompt,
        activation_checkpointing="off",
        save_every=0,
    )
    peak: list[float] = []  # before the model is saved, which peers do not do
    reference_pass = clocked(reference.Maker, "cached")
    steps = clocked(loop, "_steps", lambda: peak.append(resident_mib()))
    with tempfile.TemporaryDirectory() as folder, reference_pass as before, steps as seconds:
        store = Store(Path(folder) / "artifacts")
        source = setup.Source(Path(job.folder), pin_model(job.folder, store), store)
        with world.joined() as alone:
            loop.train(config, source, records, [], Path(folder) / "work", alone)
    return Timing(sum(seconds), sum(before) or None, NOTES.get(job.name, ""), peak[-1])
