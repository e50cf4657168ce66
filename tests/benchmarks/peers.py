"""TRL's trainers on the same records, each at a given number of rows per forward pass."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from bnfctl.data.records import Record
from tests.benchmarks.clock import clocked, now
from tests.benchmarks.job import Job, NotRunError, Timing
from tests.benchmarks.shapes import text

NAMES = ("trl-sft", "trl-dpo", "trl-dpo-precomputed", "trl-kto")
SEQUENCES = {"trl-sft": 1, "trl-dpo": 2, "trl-dpo-precomputed": 2, "trl-kto": 1}
"""Responses in one row of the data set."""
NOTES = {
    "trl-sft": "both responses of a pair, completion only",
    "trl-dpo": "reference inside the step",
    "trl-kto": "reference inside the step",
}


def rows_to_try(name: str, batch_pairs: int) -> tuple[int, ...]:
    """Rows per forward pass that divide a step of `batch_pairs` pairs; KTO needs a mismatched partner, so two."""
    whole = batch_pairs * 2 // SEQUENCES[name]
    return tuple(n for n in (1, 2, 4, 8, 16) if whole % n == 0 and n >= (2 if name == "trl-kto" else 1))


def load() -> None:
    """Import what a run needs, so that it is not timed."""
    if importlib.util.find_spec("trl") is None:
        raise NotRunError("not run: needs trl (pip install 'bnfctl[bench]')")
    import datasets  # noqa: F401
    import trl

    for name in ("SFTTrainer", "DPOTrainer", "KTOTrainer"):
        getattr(trl, name)  # trl imports them when they are asked for


def train(job: Job, records: list[Record]) -> Timing:
    """One pass; tokenizing and loading are not counted, a reference pass before the steps is, on its own."""
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        trainer, reference = _trainer(job, records, Path(work))
        _check(trainer.train_dataset, records)
        started = now()
        trainer.train()
        return Timing(now() - started, reference, NOTES.get(job.name, ""))


def _trainer(job: Job, records: list[Record], work: Path) -> tuple[Any, float | None]:
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert job.rows is not None
    options: dict[str, Any] = {
        "output_dir": str(work),
        "per_device_train_batch_size": job.rows,
        "gradient_accumulation_steps": job.batch_pairs * 2 // SEQUENCES[job.name] // job.rows,
        "num_train_epochs": 1,
        "learning_rate": job.lr,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": job.dtype == "bfloat16",
        "use_cpu": job.device == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": job.device != "cpu",
    }
    if job.name == "trl-dpo-precomputed":
        options["precompute_ref_log_probs"] = True
    if job.name == "trl-sft":
        options["completion_only_loss"] = True
    kind = job.name.split("-")[1].upper()
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32)
    with clocked(trl.DPOTrainer, "_precompute_ref_logps") as seconds:  # called while the trainer is built
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model,
            args=getattr(trl, f"{kind}Config")(**options),
            train_dataset=_data(kind, records),
            processing_class=AutoTokenizer.from_pretrained(job.folder),
        )
    return trainer, sum(seconds) or None


def _data(kind: str, records: list[Record]) -> Any:
    """The records in the form that the trainer asks for: ids where it takes them, else words that mean these ids."""
    from datasets import Dataset

    if kind == "DPO":
        rows: list[dict[str, Any]] = [
            {
                "prompt": text(r.prompt_ids),
                "chosen": text(r.sides[0].ids),
                "rejected": text(r.sides[1].ids),
            }
            for r in records
        ]
    elif kind == "KTO":
        rows = [
            {"prompt": text(r.prompt_ids), "completion": text(side.ids), "label": side.label > 0}
            for r in records
            for side in r.sides
        ]
    else:
        rows = [
            {
                "input_ids": r.prompt_ids + side.ids,
                "completion_mask": [0] * len(r.prompt_ids) + [1] * len(side.ids),
            }
            for r in records
            for side in r.sides
        ]
    return Dataset.from_list(rows)


def _check(data: Any, records: list[Record]) -> None:
    """The first record's ids, as the trainer will see them."""
    row, record = data[0], records[0]
    chosen = record.sides[0].ids
    if "input_ids" in row:
        found, meant = row["input_ids"], record.prompt_ids + chosen
        assert [i for i in row["labels"] if i != -100] == chosen
    else:
        found = row["prompt_ids"] + (row["chosen_ids"] if "chosen_ids" in row else row["completion_ids"])
        meant = record.prompt_ids + chosen
    assert found == meant, "the trainer sees other tokens than ours"
