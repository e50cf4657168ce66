"""The float64 twins against mpmath, and against Appendix B where its arithmetic still works."""

from __future__ import annotations

import mpmath as mp
import pytest
import torch

from tests import reference
from tests.losses.ragged import ragged, relative

LOG_ODDS = [-200.0, -30.0, -3.0, 0.0, 2.0, 20.0, 27.631021115927546, 40.0, 200.0]
"""27.63 is p = 1 - 1e-12."""


def logits_at(log_odds: float) -> list[float]:
    """Logits of 4 tokens whose token 1 has these log-odds."""
    rest = [0.3, -1.1, 0.8]
    label = log_odds + float(torch.tensor(rest, dtype=torch.float64).logsumexp(0))
    return [rest[0], label, rest[1], rest[2]]


def eq4_and_eq8(policy: list[float], ref: list[float], y: int, label: int) -> tuple[mp.mpf, list[mp.mpf]]:
    """Literal eq. 4 with eq. 6 for one response of one token, and its literal gradient, eq. 8."""
    pi, pi_ref = ([mp.exp(z) / mp.fsum(map(mp.exp, row)) for z in map(mp.mpf, row)] for row in (policy, ref))
    f_y = min(pi[y] / pi_ref[y], mp.mpf(1))
    f = [f_y if j == y else (1 - f_y) / (1 - pi[y]) * pi[j] for j in range(len(pi))]
    value = -label * mp.fsum(f[j] * mp.log(pi[j]) for j in range(len(pi)))
    return value, [label * (pi[j] - f[j]) for j in range(len(pi))]


@pytest.mark.parametrize("label", [1, -1])
@pytest.mark.parametrize("ref", LOG_ODDS)
@pytest.mark.parametrize("policy", LOG_ODDS)
def test_bnf_twin_equals_mpmath(policy: float, ref: float, label: int) -> None:
    z, z_ref = logits_at(policy), logits_at(ref)
    with mp.workdps(250):
        value, slope = eq4_and_eq8(z, z_ref, 1, label)
        exact = float(value), torch.tensor([float(s) for s in slope], dtype=torch.float64)
    logits = torch.tensor([[z]], dtype=torch.float64, requires_grad=True)
    found = reference.bnf(
        logits, torch.tensor([[z_ref]], dtype=torch.float64), torch.tensor([[1]]), torch.tensor([[True]]),
        torch.tensor([float(label)], dtype=torch.float64),
    )  # fmt: skip
    found.backward()
    assert float(found.detach()) == pytest.approx(exact[0], rel=1e-12, abs=1e-300)
    assert logits.grad is not None
    # eq. 8 subtracts; where p and f agree to many digits, float64 keeps the absolute error of the larger one.
    floor = 1e-15 * float(torch.sigmoid(torch.tensor(-policy, dtype=torch.float64)))
    assert float((logits.grad[0, 0] - exact[1]).norm()) <= 1e-11 * float(exact[1].norm()) + floor


def test_bnf_twin_equals_repaired_appendix_b_at_moderate_logits() -> None:
    batch = ragged(seed=3).to(torch.float64)
    logits = batch.logits().requires_grad_()
    ours = reference.bnf(logits, batch.ref_logits, batch.target, batch.mask, batch.label)
    theirs = reference.appendix_b(logits, batch.ref_logits, batch.target, batch.mask, batch.label)
    assert float((ours - theirs).detach()) == pytest.approx(0, abs=1e-12)
    (slope,) = torch.autograd.grad(ours, logits, retain_graph=True)
    (printed,) = torch.autograd.grad(theirs, logits)
    assert relative(printed, slope) < 1e-10


def test_appendix_b_is_nan_at_log_odds_50() -> None:
    logits = torch.tensor([[logits_at(50.0)]])
    one, mask = torch.tensor([[1]]), torch.tensor([[True]])
    assert reference.appendix_b(logits, logits, one, mask, torch.tensor([1.0])).isnan()
    assert reference.bnf(logits, logits, one, mask, torch.tensor([1.0])).isfinite()


def test_others_share_what_the_target_leaves() -> None:
    """Eq. 6 is a distribution (Appendix A.2)."""
    batch = ragged(seed=4).to(torch.float64)
    f, others = reference.dynamic_target(batch.logits(), batch.ref_logits, batch.target)
    torch.testing.assert_close(f + others.sum(-1), torch.ones_like(f), rtol=0, atol=1e-12)
    assert (f < 1).any() and (f == 1).any()
