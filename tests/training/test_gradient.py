"""The gradient of a whole tiny Llama: equal to the twin's, whatever the micro-batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bnfctl import tables
from bnfctl.config import TrainConfig
from bnfctl.data.records import Record
from bnfctl.losses import make
from bnfctl.training.batches import Plan
from bnfctl.training.loop import Run, prepare, take_step
from tests import reference
from tests.losses.ragged import relative
from tests.training.data import make_records


def moved_run(model_dir: Path, work: Path, records: list[Record], seed: int = 0, **fields: Any) -> tuple[Run, Any]:
    """A run whose policy has left the reference, and the reference as a float64 model."""
    config = TrainConfig(model="m", clip=0, lr=0, **fields)
    run = prepare(config, make(config.loss), Plan(config, records), [], model_dir, work)
    before = copy.deepcopy(run.policy.model).double()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in run.policy.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draw)
    return run, before


def gradients(run: Run, positions: list[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    line = take_step(run, positions, 1, log=True)
    grads = {name: p.grad.clone() for name, p in run.policy.model.named_parameters() if p.grad is not None}
    return grads, line


def full_logits(model: Any, records: list[Record]) -> tuple[Tensor, dict[str, Tensor]]:
    """[B, T, V] float64 logits, one unpadded response at a time, and target, mask, label of the twins."""
    rows, targets, labels = [], [], []
    for record in records:
        for side in record.sides:
            logits = model(torch.tensor([record.prompt_ids + side.ids])).logits[0]
            start = len(record.prompt_ids) - 1
            rows.append(logits[start : start + len(side.ids)])
            targets.append(torch.tensor(side.ids))
            labels.append(float(side.label))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(len(t), dtype=torch.bool) for t in targets], batch_first=True)
    ours = {"target": pad(targets, batch_first=True), "mask": mask, "label": torch.tensor(labels, dtype=torch.float64)}
    return pad(rows, batch_first=True), ours


def twin(name: str, model: Any, before: Any, records: list[Record]) -> tuple[Tensor, float]:
    """The exact objective, differentiable, and the largest logit."""
    logits, ours = full_logits(model, records)
    with torch.no_grad():
        ref_logits, _ = full_logits(before, records)
    largest = float(logits.detach().abs().max())
    return reference.objective(make(name), logits, ref_logits, **ours), largest


@pytest.mark.parametrize("name", sorted(name for name in tables.LOSSES if not make(name).needs_kl))
def test_parameter_gradients_equal_the_twin(name: str, model_dir: Path, tmp_path: Path) -> None:
    records = make_records(6)
    run, before = moved_run(model_dir, tmp_path, records, loss=name, micro_tokens=70)
    grads, line = gradients(run, list(range(6)))
    exact_model = copy.deepcopy(run.policy.model).double()
    exact_model.zero_grad()
    exact, largest = twin(name, exact_model, before, records)
    exact.backward()
    tolerance = 1e-5 * max(1.0, largest / 10)
    assert line["objective"] == pytest.approx(float(exact.detach()), rel=tolerance, abs=tolerance)
    assert set(grads) == {n for n, _ in exact_model.named_parameters()}
    for key, parameter in exact_model.named_parameters():
        assert relative(grads[key], parameter.grad) < tolerance, key


@pytest.mark.parametrize("name", sorted(tables.LOSSES))
def test_micro_batches_padding_and_order_change_nothing(name: str, model_dir: Path, tmp_path: Path) -> None:
    pairs = make(name).needs_pairs
    records = make_records(4) if pairs else make_records(3) + make_records(3, seed=1, pairs=False)
    n = len(records)
    found = []
    for i, (micro_tokens, positions) in enumerate([(10_000, range(n)), (1, range(n)), (60, reversed(range(n)))]):
        run, _ = moved_run(model_dir, tmp_path / str(i), records, loss=name, micro_tokens=micro_tokens)
        kept = [p for p in positions if any(side.label in run.loss.labels for side in records[p].sides)]
        found.append(gradients(run, kept))
    for grads, line in found[1:]:
        for key, value in grads.items():
            assert relative(value, found[0][0][key]) < 1e-5, key
        for key, value in found[0][1].items():
            assert line[key] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-5)), key


def test_bfloat16_gradients_are_near(model_dir: Path, tmp_path: Path) -> None:
    """Autocast over float32 masters: relative error of a tensor within a few roundings of bfloat16 (2^-8)."""
    records = make_records(6)
    exact, _ = gradients(moved_run(model_dir, tmp_path / "a", records, loss="sft", dtype="float32")[0], list(range(6)))
    rough, _ = gradients(moved_run(model_dir, tmp_path / "b", records, loss="sft", dtype="bfloat16")[0], list(range(6)))
    errors = {key: relative(rough[key], exact[key]) for key in exact}
    assert 1e-4 < max(errors.values()) < 0.1, errors


def test_at_the_reference_every_coefficient_is_one(model_dir: Path, tmp_path: Path) -> None:
    """The reference pass and the first step go through the same code: no bit differs."""
    records = make_records(9)
    for dtype in ("float32", "bfloat16"):
        config = TrainConfig(model="m", batch_size=9, dtype=dtype, micro_tokens=64)
        plan = Plan(config, records)
        run = prepare(config, make("bnf"), plan, [], model_dir, tmp_path / dtype)
        line = take_step(run, next(plan.batches()), 1, log=True)
        assert line["coefficient"] == pytest.approx(1, abs=1e-7)
        assert line["shift_chosen"] == line["shift_rejected"] == line["margin"] == 0
