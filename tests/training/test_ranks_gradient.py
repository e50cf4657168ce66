"""The gradient on two real ranks, each parameter whole or in rows: equal to one process's, for every loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bnfctl import tables
from bnfctl.data.records import Record
from bnfctl.losses import make
from bnfctl.training.world import World
from tests.losses.ragged import relative
from tests.model.tiny import opt_config, write_any, write_model
from tests.ranks import run_ranks
from tests.training.data import gradients, make_records, moved_run

LAYOUTS: dict[str, dict[str, Any]] = {
    "tied": {"micro_tokens": 30},
    "untied": {"micro_tokens": 1, "layout": "padded"},
}
"""By model: some records in a micro-batch, packed; and one in each, padded."""
LORA = {"loss": "bnf", "lora": 2, "micro_tokens": 30, "lora_targets": ("q_proj", "up_proj")}
CHECKPOINTED = {"activation_checkpointing": "on"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("tied", LORA),
    "lora-checkpointed": ("tied", {**LORA, **CHECKPOINTED}),
    "opt-checkpointed": ("opt", {"loss": "bnf", "micro_tokens": 30, **CHECKPOINTED}),
}
"""Model and fields; the gradient is that of one process without checkpointing."""


def data_for(name: str) -> list[Record]:
    """An odd number, so that a rank has a micro-batch less where each holds one record."""
    return make_records(5) if make(name).needs_pairs else make_records(3) + make_records(4, seed=1, pairs=False)


def steps_of(name: str) -> dict[str, list[int]]:
    """All records; and one alone, so that a rank has nothing but an empty micro-batch."""
    records, loss = data_for(name), make(name)
    kept = [p for p, record in enumerate(records) if any(side.label in loss.labels for side in record.sides)]
    return {"all": kept, "one": kept[:1]}


def on_each_rank(world: World, folders: list[Path], home: Path, out: Path) -> None:
    """Every loss, ddp and fsdp, tied and untied: whole gradients and metrics into files."""
    found: dict[str, torch.Tensor] = {}
    lines: dict[str, Any] = {}

    def measure(label: str, folder: Path, fields: dict[str, Any]) -> None:
        name = fields["loss"]
        run, _ = moved_run(folder, home, data_for(name), home=home, world=world, **fields)
        assert run.sharded == (fields["parallel"] == "fsdp")
        for step, positions in steps_of(name).items():
            batches = list(run.splits["train"].micro_batches(positions))
            assert step == "all" or bool(batches[0].positions) == world.main, "the other rank has an empty one"
            assert [len(batches)] * 2 == world.gather_json(len(batches))
            grads, line = gradients(run, positions)
            found.update({f"{label}/{step}/{key}": value.contiguous() for key, value in grads.items()})
            lines[f"{label}/{step}"] = line

    for parallel in ("ddp", "fsdp"):
        for folder in folders:
            for name in sorted(tables.LOSSES):
                fields = {"loss": name, "parallel": parallel, **LAYOUTS[folder.name]}
                measure(f"{parallel}/{folder.name}/{name}", folder, fields)
        for case, (model, fields) in CASES.items():
            measure(f"{parallel}/{case}", folders[0].parent / model, {"parallel": parallel, **fields})
    assert all(line == other for line, other in zip(*world.gather_json(list(lines.values())), strict=True))
    if world.main:
        save_file(found, out / "gradients.safetensors")
        (out / "lines.json").write_text(json.dumps(lines))


def check(label: str, exact: dict[str, torch.Tensor], line: dict[str, Any], out: Path) -> None:
    """What the ranks wrote for one step, against one process."""
    every = load_file(out / "gradients.safetensors")
    found = {name.removeprefix(f"{label}/"): value for name, value in every.items() if name.startswith(f"{label}/")}
    assert found.keys() == exact.keys(), label
    for key, value in found.items():
        assert relative(value, exact[key]) < 1e-5, (label, key)
    said = json.loads((out / "lines.json").read_text())[label]
    assert said.keys() == line.keys()
    for key, number in line.items():
        assert said[key] == (None if number is None else pytest.approx(number, rel=1e-5, abs=1e-5)), (label, key)


def test_two_ranks_equal_one_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folders = [write_model(tmp_path / "tied"), write_model(tmp_path / "untied", tie_word_embeddings=False)]
    write_any(tmp_path / "opt", opt_config())
    home = tmp_path / "home"
    run_ranks(on_each_rank, 2, folders, home, tmp_path)
    capfd.readouterr()
    for folder in folders:
        for name in sorted(tables.LOSSES):
            fields = {**LAYOUTS[folder.name], "loss": name, "micro_tokens": 10_000}
            run, _ = moved_run(folder, home, data_for(name), home=home, **fields)
            for step, positions in steps_of(name).items():
                exact, line = gradients(run, positions)
                for parallel in ("ddp", "fsdp"):
                    check(f"{parallel}/{folder.name}/{name}/{step}", exact, line, tmp_path)
    for case, (model, fields) in CASES.items():
        whole = {**fields, "micro_tokens": 10_000, "activation_checkpointing": "off"}
        run, _ = moved_run(tmp_path / model, home, data_for("bnf"), home=home, **whole)
        for step, positions in steps_of("bnf").items():
            exact, line = gradients(run, positions)
            for parallel in ("ddp", "fsdp"):
                check(f"{parallel}/{case}/{step}", exact, line, tmp_path)
    assert "one pass over" not in capfd.readouterr().err, "one process takes the rows that the ranks made"
