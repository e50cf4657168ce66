"""`bnf` and `log_odds`: BNF as pure functions for a trainer of one's own."""

from __future__ import annotations

import dataclasses
import doctest
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import bnfctl.losses
from bnfctl.losses import bidirectional, bnf, log_odds
from tests import reference
from tests.losses.ragged import Ragged, ragged, relative


def call(batch: Ragged, logits: Tensor, denominator: float | None = None) -> Tensor:
    stored = log_odds(batch.ref_logits.double(), batch.target)
    return bnf(logits, batch.target, batch.label, stored, batch.mask, denominator)


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_value_and_gradient_are_the_twins(kind: torch.dtype, tolerance: float, scale: float) -> None:
    batch = ragged(scale=scale, seed=1)
    logits = batch.logits().to(kind).detach().requires_grad_()
    exact_logits = logits.detach().double().requires_grad_()
    exact = reference.bnf(exact_logits, batch.ref_logits.double(), batch.target, batch.mask, batch.label.double())
    found = call(batch, logits)
    assert found.dtype == torch.promote_types(kind, torch.float32) and found.shape == ()
    largest = float(logits.detach().abs().max())
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-5, abs=1e-6 * largest)
    found.backward()
    exact.backward()
    assert logits.grad is not None and exact_logits.grad is not None and logits.grad.dtype == kind
    assert relative(logits.grad, exact_logits.grad) < tolerance * max(1.0, largest / 10)


def test_a_split_step_adds_up_to_the_whole() -> None:
    batch = ragged(pairs=3, seed=2).to(torch.float64)
    whole = batch.logits().detach().requires_grad_()
    value = call(batch, whole)
    value.backward()
    parts, values = batch.logits().detach().requires_grad_(), []
    for rows in ([0], [1, 2, 3], [5, 4]):
        part = call(batch.rows(rows), parts[rows], denominator=6)
        part.backward()
        values.append(float(part.detach()))
    assert sum(values) == pytest.approx(float(value.detach()), rel=1e-12)
    assert whole.grad is not None and parts.grad is not None and relative(parts.grad, whole.grad) < 1e-12


def test_without_a_mask_negative_targets_are_left_out() -> None:
    batch = ragged(seed=3)
    marked = dataclasses.replace(batch, target=batch.target.where(batch.mask, -100))
    stored = log_odds(batch.ref_logits.double(), marked.target)
    found = bnf(batch.logits(), marked.target, batch.label, stored)
    assert torch.equal(found, call(batch, batch.logits()))


def test_whole_numbers_and_the_extremes() -> None:
    """Labels as integers; p that rounds to 1 and to 0 on either side."""
    odds = torch.tensor([[-200.0, -50.0, 0.0, 50.0, 200.0]])
    logits = torch.zeros(2, 5, 7)
    logits[..., 4] = odds
    logits.requires_grad_()
    target = torch.full((2, 5), 4)
    loss = bnf(logits, target, torch.tensor([1, -1]), odds.flip(1).expand(2, 5))
    loss.backward()
    assert loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all() and logits.grad.any()


def test_log_odds_are_those_of_the_softmax() -> None:
    batch = ragged(seed=4)
    exact = torch.logit(batch.logits().double().softmax(-1)).gather(-1, batch.target.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(log_odds(batch.logits(), batch.target).double(), exact, rtol=1e-5, atol=1e-5)
    assert float(log_odds(torch.tensor([0.0, 300.0]), torch.tensor(1))) == 300


def test_bad_input_is_named() -> None:
    logits, target, odds = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    label = torch.tensor([1, -1])
    with pytest.raises(ValueError, match=r"logits are \[B, T, V\].*not \[2, 3, 5\], \[2, 3\], \[2, 2\]"):
        bnf(logits, target, label, odds[:, :2])
    with pytest.raises(ValueError, match="logits are"):
        bnf(logits[0], target[0], label, odds[0])
    with pytest.raises(ValueError, match="label is"):
        bnf(logits, target, torch.tensor([True, False]).long(), odds)
    with pytest.raises(ValueError, match="no token"):
        bnf(logits, target, label, odds, torch.tensor([[True, True, True], [False, False, False]]))


def test_the_example_of_the_docstring_runs() -> None:
    found = doctest.testmod(bidirectional)
    assert found.attempted >= 8 and found.failed == 0


def test_importing_the_losses_imports_no_torch() -> None:
    code = (
        "import sys, bnfctl.losses\nassert 'torch' not in sys.modules\n"
        "from bnfctl.losses import bnf\nassert callable(bnf) and 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bnfctl.losses.nothing
