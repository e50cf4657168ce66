"""Every loss against its exact twin, and the properties that all of them share."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnfctl import tables
from bnfctl.losses import Loss, TokenLogps, make
from bnfctl.model.head import Head
from tests import reference
from tests.losses.ragged import STATS, Ragged, gradients, objective, ragged, relative, tokens, twin

EXTREMES = [-200.0, -50.0, -20.0, -5.0, 5.0, 20.0, 50.0, 200.0]


VARIANTS = [
    *tables.LOSSES, "sft normalize=response", "nll-pll normalize=none", "slic-hf delta=30 lambda=0", "dpo beta=1",
    "ipo normalize=none tau=0.5", "kto beta=0.3 desirable_weight=1.5 undesirable_weight=0.5", "orpo lambda=2",
    "r-dpo alpha=0.3", "simpo beta=10 gamma=3",
]  # fmt: skip
"""Every loss with its defaults, and with other hyper-parameters."""


@pytest.fixture(params=VARIANTS)
def loss(request: pytest.FixtureRequest) -> Loss:
    name, *args = request.param.split()
    return make(name, tuple(args))


def twin_gradients(loss: Loss, batch: Ragged) -> tuple[Tensor, Tensor]:
    leaves = batch.to(torch.float64).leaves()
    twin(loss, leaves).backward()
    assert leaves.hidden.grad is not None and leaves.matrix.grad is not None
    return leaves.hidden.grad, leaves.matrix.grad


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_its_twin_in_float32(loss: Loss, scale: float, seed: int) -> None:
    batch = ragged(scale=scale, seed=seed)
    tolerance = 1e-5 * max(1.0, float(batch.logits().abs().max()) / 10)
    exact = twin(loss, batch)
    spread = float(twin(loss, dataclasses.replace(batch, label=batch.label.abs()))) if loss.separable else 1.0
    assert abs(float(objective(loss, batch)) - float(exact)) < tolerance * max(abs(float(exact)), abs(spread))
    for found, slope in zip(gradients(loss, batch), twin_gradients(loss, batch), strict=True):
        assert relative(found, slope) < tolerance


def test_equals_its_twin_in_float64(loss: Loss) -> None:
    batch = ragged(scale=3.0, seed=2).to(torch.float64)
    torch.testing.assert_close(objective(loss, batch), twin(loss, batch), rtol=1e-12, atol=1e-12)
    for found, slope in zip(gradients(loss, batch), twin_gradients(loss, batch), strict=True):
        assert relative(found, slope) < 1e-11


def test_equals_its_twin_in_bfloat16(loss: Loss) -> None:
    """The factors are bfloat16 and everything after the product is float32: only the hidden gradient is rounded."""
    batch = ragged(seed=1)
    batch = dataclasses.replace(batch, hidden=batch.hidden.bfloat16(), matrix=batch.matrix.bfloat16().float())
    exact = float(twin(loss, batch).detach())
    assert abs(float(objective(loss, batch)) - exact) < 1e-5 * max(10, abs(exact))
    slope_hidden, slope_matrix = twin_gradients(loss, batch)
    hidden, matrix = gradients(loss, batch)
    assert hidden.dtype == torch.bfloat16 and relative(hidden, slope_hidden) < 4e-3
    assert matrix.dtype == torch.float32 and relative(matrix, slope_matrix) < 1e-5


@settings(deadline=None, max_examples=15, derandomize=True)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(4)), cut=st.integers(0, 4))
def test_splitting_and_permuting_records_change_nothing(seed: int, order: list[int], cut: int) -> None:
    batch = ragged(pairs=4, seed=seed)
    rows = [row for pair in order for row in (2 * pair, 2 * pair + 1)]
    parts = [part for part in (rows[: 2 * cut], rows[2 * cut :]) if part]
    for name in tables.LOSSES:
        loss = make(name)
        whole_hidden, whole_matrix = gradients(loss, batch)
        packed, _ = tokens(batch)
        denominator = loss.denominator(packed.label, packed.length, packed.pair)
        hidden, matrix = torch.zeros_like(whole_hidden), torch.zeros_like(whole_matrix)
        for part in parts:
            part_hidden, part_matrix = gradients(loss, batch.rows(part), denominator)
            hidden[part] = part_hidden
            matrix += part_matrix
        assert relative(hidden, whole_hidden) < 1e-5, name
        assert relative(matrix, whole_matrix) < 1e-5, name


@pytest.mark.parametrize("name", [name for name in tables.LOSSES if make(name).needs_pairs])
def test_a_pair_is_found_wherever_its_sides_are(name: str) -> None:
    """Rejected-first rows with gaps in the pair numbers."""
    loss, batch = make(name), ragged(pairs=3, seed=5)
    exact = twin(loss, batch).float()
    shuffled = batch.rows([5, 0, 3, 4, 1, 2])
    packed, entropy = tokens(shuffled)
    moved = dataclasses.replace(packed, pair=torch.tensor([9, 4, 7, 9, 4, 7]))
    torch.testing.assert_close(
        loss.total(moved, STATS) / loss.denominator(moved.label, moved.length, moved.pair), exact
    )
    value = loss.value(moved, entropy, STATS)
    torch.testing.assert_close(value.sum() / loss.denominator(moved.label, moved.length, moved.pair), exact)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_everything_is_finite_at_the_extremes(loss: Loss, kind: torch.dtype) -> None:
    """Every policy log-odds with every reference log-odds, both labels, through the head."""
    vocabulary = 5
    grid = [(o, r) for o in EXTREMES for r in EXTREMES for _ in (1, -1)]
    logits = torch.zeros(len(grid), vocabulary)
    logits[:, 2] = torch.tensor([o for o, _ in grid])
    hidden = logits.to(kind).requires_grad_()
    matrix = torch.eye(vocabulary).requires_grad_()
    result = Head(matrix)(hidden, torch.full((len(grid),), 2), entropy=True)
    rows = torch.arange(len(grid))
    packed = TokenLogps(
        logp=result.logp, log_odds=result.log_odds, ref_log_odds=torch.tensor([r for _, r in grid]), segment=rows,
        label=torch.tensor([1.0, -1.0]).repeat(len(grid) // 2), length=torch.ones(len(grid)), pair=rows // 2,
    )  # fmt: skip
    assert loss.value(packed, result.entropy, STATS).isfinite().all()
    total = loss.total(packed, STATS)
    total.backward()
    assert total.isfinite()
    assert hidden.grad is not None and hidden.grad.isfinite().all() and hidden.grad.abs().max() > 0
    assert matrix.grad is not None and matrix.grad.isfinite().all()


def test_an_empty_micro_batch_allows_backward(loss: Loss) -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    matrix = torch.randn(9, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    result = Head(matrix)(hidden, none, entropy=True)
    packed = TokenLogps(result.logp, result.log_odds, result.log_odds, none, torch.zeros(0), torch.zeros(0), none)
    total = loss.total(packed, STATS)
    total.backward()
    assert float(total.detach()) == 0 and loss.value(packed, result.entropy, STATS).shape == (0,)
    assert matrix.grad is not None and not matrix.grad.any()
    assert loss.denominator(torch.zeros(0), torch.zeros(0), none) == 0


@pytest.mark.parametrize("name", [name for name in tables.LOSSES if make(name).needs_pairs])
def test_responses_without_a_partner_count_for_nothing(name: str) -> None:
    leaves, loss = ragged(seed=11).leaves(), make(name)
    packed, entropy = tokens(leaves)
    alone = dataclasses.replace(packed, pair=torch.full_like(packed.pair, -1))
    loss.total(alone).backward()
    assert leaves.hidden.grad is not None and not leaves.hidden.grad.any()
    assert not loss.value(alone, entropy).any() and loss.denominator(alone.label, alone.length, alone.pair) == 0


def test_values_per_label_add_up_for_a_loss_without_pairs() -> None:
    """What `objective_chosen` and `objective_rejected` are made of."""
    for loss in (make(name) for name in tables.LOSSES):
        batch = ragged(seed=12)
        packed, entropy = tokens(batch)
        whole = loss.value(packed, entropy, STATS)
        assert whole.shape == packed.label.shape and not whole.requires_grad
        if not loss.needs_pairs:
            for side in (packed.label > 0, packed.label < 0):
                alone, entropy = tokens(batch.rows(side.nonzero().squeeze(-1).tolist()))
                torch.testing.assert_close(loss.value(alone, entropy, STATS), whole[side])


def test_closed_form_coefficients_are_the_derivative_of_the_total(loss: Loss) -> None:
    packed, _ = tokens(ragged(seed=6))
    leaf = packed.logp.detach().requires_grad_()
    at_leaf = dataclasses.replace(packed, logp=leaf)
    (slope,) = torch.autograd.grad(loss.total(at_leaf, STATS), leaf)
    if loss.separable:
        torch.testing.assert_close(loss.coefficients(at_leaf), slope)
    else:
        with pytest.raises(NotImplementedError):
            loss.coefficients(at_leaf)


def test_labels_name_the_responses_that_have_a_gradient(loss: Loss) -> None:
    batch = ragged(seed=7)
    hidden, _ = gradients(loss, batch)
    moved = hidden.abs().sum((1, 2)) > 0
    assert {int(label) for label in batch.label[moved]} == set(loss.labels)


def test_bnf_gradient_is_a_weighted_nll() -> None:
    """Eq. 6 in eq. 8 is -(label / |y|) c d log p with c = min(1, odds / odds_ref): exact, both labels."""
    batch = ragged(scale=2.0, seed=8).to(torch.float64)
    logits = batch.logits().requires_grad_()
    o = reference.split(logits, batch.target)[0]
    c = (o - reference.split(batch.ref_logits, batch.target)[0]).clamp(max=0).exp().detach()
    weighted = -batch.label / batch.mask.sum(-1) * (c * reference.token_logp(logits, batch.target) * batch.mask).sum(-1)
    (found,) = torch.autograd.grad(weighted.mean(), logits)
    exact = reference.bnf(logits, batch.ref_logits, batch.target, batch.mask, batch.label)
    (slope,) = torch.autograd.grad(exact, logits)
    assert (c[batch.mask] < 1).any() and (c[batch.mask] == 1).any()
    assert relative(found, slope) < 1e-12


def test_bnf_at_the_reference_is_nll_pll() -> None:
    batch = ragged(seed=9)
    packed, _ = tokens(batch)
    at_start = dataclasses.replace(packed, ref_log_odds=packed.log_odds)
    assert torch.equal(make("bnf").coefficients(at_start), make("nll-pll").coefficients(at_start))
