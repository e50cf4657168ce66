"""The gradient of a whole tiny Llama: equal to the twin's, however the step is cut into micro-batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bnfctl import tables
from bnfctl.data.records import Record
from bnfctl.losses import make
from bnfctl.training import loop
from bnfctl.training.batches import step_data
from bnfctl.training.objective import partners
from tests import reference
from tests.losses.ragged import relative
from tests.training.data import at_reference, gradients, make_records, moved_run


def rows_of(model: Any, records: list[Record]) -> tuple[Tensor, dict[str, Tensor]]:
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


def twin_kl(model: Any, before: Any, records: list[Record], max_length: int) -> float:
    """KTO's reference point of all records."""
    mismatched = partners(records, max_length)
    with torch.no_grad():
        (logits, ours), (ref_logits, _) = rows_of(model, mismatched), rows_of(before, mismatched)
    return reference.kto_reference_point(logits, ref_logits, ours["target"], ours["mask"])


def twin(name: str, model: Any, before: Any, records: list[Record], max_length: int) -> tuple[Tensor, float]:
    """The exact objective, differentiable, and the largest logit."""
    logits, ours = rows_of(model, records)
    with torch.no_grad():
        ref_logits, _ = rows_of(before, records)
    kl = twin_kl(model, before, records, max_length) if make(name).needs_kl else None
    exact = reference.objective(make(name), logits, ref_logits, kl, **ours)
    return exact, float(logits.detach().abs().max())


def data_for(name: str) -> list[Record]:
    """Pairs, and singles too where the loss takes them: with one record a micro-batch some have labels -1 alone."""
    if make(name).needs_pairs:
        return make_records(8)
    return make_records(4) + make_records(4, seed=1, pairs=False)


@pytest.mark.parametrize("name", sorted(tables.LOSSES))
def test_parameter_gradients_equal_the_twin(name: str, model_dir: Path, tmp_path: Path) -> None:
    records = make_records(6)
    run, before = moved_run(model_dir, tmp_path, records, loss=name, micro_tokens=70)
    grads, line = gradients(run, list(range(6)))
    exact_model = copy.deepcopy(run.policy.model).double()
    exact_model.set_attn_implementation("eager")
    exact_model.zero_grad()
    exact, largest = twin(name, exact_model, before, records, run.config.max_length)
    exact.backward()
    tolerance = 1e-5 * max(1.0, largest / 10)
    assert line["objective"] == pytest.approx(float(exact.detach()), rel=tolerance, abs=tolerance)
    assert set(grads) == {n for n, _ in exact_model.named_parameters()}
    for key, parameter in exact_model.named_parameters():
        assert relative(grads[key], parameter.grad) < tolerance, key


CUTS: dict[str, dict[str, Any]] = {
    "8 micro-batches": {"micro_tokens": 1},
    "some micro-batches": {"micro_tokens": 40},
    "packed": {"layout": "packed", "share_prompt": False},
    "packed, 8 micro-batches": {"layout": "packed", "share_prompt": False, "micro_tokens": 1},
    "padded": {"layout": "padded"},
    "padded, some micro-batches": {"layout": "padded", "micro_tokens": 60},
    "eager": {"attention": "eager"},
    "live reference": {"reference": "live"},
    "checkpointed": {"activation_checkpointing": "on"},
}
"""Against one micro-batch, packed, with the prompt of a pair computed once."""


@pytest.mark.parametrize("name", sorted(tables.LOSSES))
def test_cuts_and_layouts_change_no_gradient(name: str, model_dir: Path, tmp_path: Path) -> None:
    records = data_for(name)
    loss = make(name)
    kept = [p for p, record in enumerate(records) if any(side.label in loss.labels for side in record.sides)]
    whole = {"loss": name, "micro_tokens": 10_000, "home": tmp_path}
    run, _ = moved_run(model_dir, tmp_path, records, **whole)
    assert run.splits["train"].layout.share and len(list(run.splits["train"].micro_batches(kept))) == 1
    exact, line = gradients(run, kept)
    assert all(value.norm() > 0 for value in exact.values())
    for cut, fields in CUTS.items():
        run, _ = moved_run(model_dir, tmp_path, records, **{**whole, **fields})
        pieces = list(run.splits["train"].micro_batches(kept))
        if cut == "8 micro-batches":
            assert len(pieces) == len(kept)
            assert loss.needs_pairs or loss.labels == (1,) or any((piece.label < 0).all() for piece in pieces)
        found, said = gradients(run, kept[::-1])
        for key, value in found.items():
            assert relative(value, exact[key]) < 1e-5, (cut, key)
        for key, number in line.items():
            assert said[key] == (None if number is None else pytest.approx(number, rel=1e-5, abs=1e-5)), (cut, key)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", ["bnf", "dpo"])
def test_an_empty_micro_batch_adds_nothing(name: str, layout: str, model_dir: Path, tmp_path: Path) -> None:
    """Backward runs all the same: under FSDP2 the ranks wait for each other in it."""
    records = make_records(2)
    run, _ = moved_run(model_dir, tmp_path, records, loss=name, layout=layout)
    empty = run.splits["train"].collate([])
    assert run.reference is not None and empty.label.numel() == empty.sequences.target.numel() == 0
    ref_log_odds = run.reference.log_odds("train", empty)
    done = loop.backward(run.policy, run.loss, empty, ref_log_odds, None, 1.0, run.loss.needs_entropy)
    assert run.loss.value(done.tokens, done.entropy, None).shape == (0,)
    grads = [p.grad for p in run.policy.parameters()]
    assert grads and all(grad is not None and not grad.any() for grad in grads)


@pytest.mark.parametrize("fields", [{}, {"micro_tokens": 1}, {"layout": "padded"}])
def test_the_reference_point_of_kto_is_the_twins(fields: dict[str, Any], model_dir: Path, tmp_path: Path) -> None:
    records = data_for("kto")
    config = {"loss": "kto", "home": tmp_path, **fields}
    positive = 0
    for seed in range(3):
        run, before = moved_run(model_dir, tmp_path, records, seed=seed, **config)
        positions = list(range(len(records)))
        data = step_data(run.splits["train"].records, positions, run.splits["train"].keep)
        stats = loop.kl_stats(run, "train", positions, data)
        model = copy.deepcopy(run.policy.model).double()
        model.set_attn_implementation("eager")
        exact = twin_kl(model, before, records, run.config.max_length)
        assert stats is not None and stats.kl == pytest.approx(exact, rel=1e-5, abs=1e-5)
        positive += exact > 0
    assert positive


def test_bfloat16_gradients_are_near(model_dir: Path, tmp_path: Path) -> None:
    """Autocast over float32 masters: relative error of a tensor within a few roundings of bfloat16 (2^-8)."""
    records = make_records(6)
    exact, _ = gradients(moved_run(model_dir, tmp_path / "a", records, loss="sft", dtype="float32")[0], list(range(6)))
    rough, _ = gradients(moved_run(model_dir, tmp_path / "b", records, loss="sft", dtype="bfloat16")[0], list(range(6)))
    errors = {key: relative(rough[key], exact[key]) for key in exact}
    assert 1e-4 < max(errors.values()) < 0.1, errors


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_the_reference_every_coefficient_is_one(dtype: str, layout: str, model_dir: Path, tmp_path: Path) -> None:
    """The reference pass and the first step go through the same code; here, in the same micro-batches: no bit differs."""
    records = make_records(9)
    run = at_reference(model_dir, tmp_path, records, batch_size=9, dtype=dtype, micro_tokens=64, layout=layout)
    line = loop.take_step(run, next(run.plan.batches()), 1, log=True)
    assert line["coefficient"] == pytest.approx(1, abs=1e-7)
    assert line["shift_chosen"] == line["shift_rejected"] == line["margin"] == 0
