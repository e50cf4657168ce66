"""What is particular to one loss."""

from __future__ import annotations

import dataclasses

import mpmath as mp
import pytest
import torch
from torch import Tensor

from bnfctl.losses import Loss, Stats, TokenLogps, make
from bnfctl.model.head import Head
from tests import reference
from tests.losses.ragged import gradients, ragged, relative, tokens

CONFIDENT = [3.0, 20.0, 27.631021115927546, 45.0, 65.0]
"""Log-odds; 27.63 is p = 1 - 1e-12."""


def one_pair(chosen: int, rejected: int) -> TokenLogps:
    """A pair of such lengths, with the policy at its reference: every rho is 0."""
    n = chosen + rejected
    log_odds = torch.linspace(-2, 2, n)
    return TokenLogps(
        logp=torch.nn.functional.logsigmoid(log_odds).requires_grad_(),
        log_odds=log_odds,
        ref_log_odds=log_odds,
        segment=torch.tensor([0] * chosen + [1] * rejected),
        label=torch.tensor([1.0, -1.0]),
        length=torch.tensor([float(chosen), float(rejected)]),
        pair=torch.tensor([0, 0]),
    )


def push(loss: Loss, pair: TokenLogps) -> float:
    """How hard one chosen token is pushed up."""
    (slope,) = torch.autograd.grad(loss.total(pair), pair.logp)
    return -float(slope[0])


def test_r_dpo_pushes_a_longer_winner_less() -> None:
    dpo, ours = make("dpo"), make("r-dpo")
    longer, shorter, equal = one_pair(9, 4), one_pair(4, 9), one_pair(5, 5)
    assert 0 < push(ours, longer) < push(dpo, longer) == pytest.approx(0.05)
    assert push(ours, shorter) > push(dpo, shorter)
    assert push(ours, equal) == push(dpo, equal)
    assert push(make("r-dpo", ("alpha=0",)), longer) == push(dpo, longer)


def test_ipo_stops_at_its_gap_whatever_the_length() -> None:
    """At rho / |y| = 1 / (2 tau) for the winner and 0 for the loser nothing is pushed."""
    loss, pair = make("ipo", ("tau=0.25",)), one_pair(6, 3)
    there = dataclasses.replace(pair, logp=(pair.logp.detach() + torch.where(pair.segment == 0, 2.0, 0.0)).clone())
    there.logp.requires_grad_()
    assert push(loss, there) == pytest.approx(0, abs=1e-5)
    assert push(loss, pair) > 0.1


def test_slic_hf_leaves_the_nll_of_a_pair_beyond_the_margin() -> None:
    loss = make("slic-hf", ("lambda=0.25",))
    # Sums of -2 and -2 lie within the margin of 1, -2 and -4.5 beyond it.
    inside, beyond = (
        dataclasses.replace(pair, logp=torch.full_like(pair.logp, -0.5, requires_grad=True))
        for pair in (one_pair(4, 4), one_pair(4, 9))
    )
    for pair, chosen, rejected in ((inside, -1.25, 1.0), (beyond, -0.25, 0.0)):
        (slope,) = torch.autograd.grad(loss.total(pair), pair.logp)
        assert set(slope[pair.segment == 0].tolist()) == {chosen}
        assert set(slope[pair.segment == 1].tolist()) == {rejected}


def logits_of(log_odds: list[list[float]]) -> Tensor:
    """[B, T, 4] float64 logits with token 1 at these log-odds."""
    odds = torch.tensor(log_odds, dtype=torch.float64)
    rest = torch.tensor([0.3, 0.0, -1.1, 0.8], dtype=torch.float64).expand(*odds.shape, 4).clone()
    rest[..., 1] = odds + rest[..., [0, 2, 3]].logsumexp(-1)
    return rest


@pytest.mark.parametrize("chosen", CONFIDENT)
@pytest.mark.parametrize("rejected", CONFIDENT)
def test_orpo_near_certainty(chosen: float, rejected: float) -> None:
    """The twin equals mpmath, and the float32 gradient equals the twin's, although A is up to -1e-28."""
    odds = [[chosen, chosen + 1.5], [rejected, rejected - 0.5]]
    with mp.workdps(80):
        averages = [mp.fsum(mp.log(1 / (1 + mp.exp(-mp.mpf(o)))) for o in row) / 2 for row in odds]
        ratio = mp.fprod(mp.exp(a) / (1 - mp.exp(a)) for a in averages[:1]) / (
            mp.exp(averages[1]) / (1 - mp.exp(averages[1]))
        )
        exact = float(-averages[0] + mp.mpf("0.1") * mp.log(1 + 1 / ratio))
    logits = logits_of(odds).requires_grad_()
    target, mask = torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool)
    label = torch.tensor([1.0, -1.0], dtype=torch.float64)
    twin = reference.orpo(logits, target, mask, label, lambda_=0.1)
    assert float(twin.detach()) == pytest.approx(exact, rel=1e-11)
    twin.backward()
    hidden = logits.detach().float().flatten(0, 1).requires_grad_()
    result = Head(torch.eye(4))(hidden, target.flatten())
    pair = TokenLogps(
        result.logp, result.log_odds, None, torch.tensor([0, 0, 1, 1]), label.float(), torch.tensor([2.0, 2.0]),
        torch.tensor([0, 0]),
    )  # fmt: skip
    make("orpo").total(pair).backward()
    assert hidden.grad is not None and logits.grad is not None
    assert relative(hidden.grad.view(2, 2, 4), logits.grad) < 1e-4


def test_kto_without_the_reference_point_says_what_is_missing() -> None:
    packed, _ = tokens(ragged())
    loss = make("kto")
    with pytest.raises(ValueError, match="reference point of the whole step"):
        loss.total(packed)
    with pytest.raises(ValueError, match="reference point of the whole step"):
        loss.value(packed, None)


def test_kto_measures_from_the_reference_point() -> None:
    """At rho = z0 both sides stand at half their weight; a response of either side far beyond it is left alone."""
    loss = make("kto", ("beta=1", "desirable_weight=3", "undesirable_weight=5"))
    pair = one_pair(2, 2)
    shifted = dataclasses.replace(pair, logp=pair.logp + 0.35)  # rho = 0.7 for both
    torch.testing.assert_close(loss.value(shifted, None, Stats(kl=0.7)), torch.tensor([1.5, 2.5]))
    far = loss.value(shifted, None, Stats(kl=60.0))
    torch.testing.assert_close(far, torch.tensor([3.0, 0.0]))


def test_kto_works_with_one_label() -> None:
    batch = ragged(pairs=3, seed=4).rows([0, 2, 4])
    hidden, _ = gradients(make("kto"), batch)
    assert hidden.abs().sum() > 0


def test_kto_reference_point_of_the_twin() -> None:
    """A mean over responses, of sums over tokens, and never below 0."""
    batch = ragged(pairs=2, seed=3).to(torch.float64)
    given = (batch.target, batch.mask)
    rho = [
        float(sum(
            logits.log_softmax(-1)[t, y] - ref.log_softmax(-1)[t, y]
            for t, y in enumerate(target) if mask[t]
        ))
        for logits, ref, target, mask in zip(batch.logits(), batch.ref_logits, *given, strict=True)
    ]  # fmt: skip
    mean = sum(rho) / 4
    found = {
        reference.kto_reference_point(batch.logits(), batch.ref_logits, *given),
        reference.kto_reference_point(batch.ref_logits, batch.logits(), *given),
    }
    assert abs(mean) > 0.1 and min(found) == 0 and max(found) == pytest.approx(abs(mean))
