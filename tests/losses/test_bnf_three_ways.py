"""BNF in one pass, BNF with logits computed again, and the exact twin of eq. 4: one value, one gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bnfctl.losses import TokenLogps, make
from bnfctl.model import head as head_module
from bnfctl.model.head import Head
from tests import reference
from tests.losses.ragged import relative

LOW, HIGH = -70.0, 30.0
LENGTHS = (7, 1, 5, 6, 2, 4)
LABELS = (1.0, -1.0, -1.0, 1.0, -1.0, 1.0)
LOSS = make("bnf")


@dataclass(frozen=True, eq=False)
class Case:
    """R responses of N tokens over a head [V, H], whose log-odds are set."""

    hidden: Tensor
    ref_hidden: Tensor
    matrix: Tensor
    target: Tensor
    softcap: float | None

    @property
    def segment(self) -> Tensor:
        return torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))

    def tokens(self, logp: Tensor, log_odds: Tensor, part: slice = slice(None)) -> TokenLogps:
        """What the training loop makes of the head's results; the reference goes through the same head."""
        ref = Head(self.matrix, None, self.softcap)(self.ref_hidden[part], self.target[part]).log_odds
        pair = torch.full((len(LENGTHS),), -1)
        label, length = torch.tensor(LABELS), torch.tensor(LENGTHS).float()
        return TokenLogps(logp, log_odds, ref, self.segment[part], label, length, pair)


def make_case(vocabulary: int, kind: torch.dtype, softcap: float | None) -> Case:
    """Log-odds from -70 to +30 for the policy, and for the reference 2 above, the same or 3 below.

    Every target has a dimension of its own, which no other token looks at.
    """
    n, noise = sum(LENGTHS), 8
    draw = torch.Generator().manual_seed(0)
    target = torch.randperm(vocabulary, generator=draw)[:n]
    matrix = torch.zeros(vocabulary, noise + n)
    matrix[:, :noise] = 0.3 * torch.randn(vocabulary, noise, generator=draw)
    matrix[target, noise + torch.arange(n)] = 8.0
    policy = torch.linspace(LOW, HIGH, n)[torch.randperm(n, generator=draw)]
    shift = torch.tensor([2.0, 0.0, -3.0]).repeat(n)[:n]
    states = []
    common = torch.randn(n, noise, generator=draw)
    for odds in (policy, policy + shift):
        hidden = torch.zeros(n, noise + n)
        hidden[:, :noise] = common
        plain = hidden.double() @ matrix.double().T
        rest = capped(plain, softcap).scatter(-1, target[:, None], -torch.inf).logsumexp(-1)
        wanted = odds + rest
        if softcap is not None:
            wanted = softcap * torch.atanh(wanted / softcap)
        own = (wanted - plain.gather(-1, target[:, None]).squeeze(-1)) / 8.0
        hidden[torch.arange(n), noise + torch.arange(n)] = own.float()
        states.append(hidden.to(kind))
    return Case(states[0], states[1], matrix, target, softcap)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


Outcome = tuple[float, Tensor, Tensor]
"""The objective, its gradient by hidden states [N, H] and by the matrix [V, H]."""


def ours(case: Case, one_pass: bool) -> Outcome:
    hidden, matrix = case.hidden.clone().requires_grad_(), case.matrix.clone().requires_grad_()
    head = Head(matrix, None, case.softcap)
    if one_pass:

        def coefficients(part: slice, log_odds: Tensor) -> Tensor:
            return LOSS.coefficients(case.tokens(logsigmoid(log_odds), log_odds, part)) / len(LENGTHS)

        surrogate, result = head.one_pass(hidden, case.target, coefficients, entropy=True)
        surrogate.backward()
    else:
        result = head(hidden, case.target, entropy=True)
        (LOSS.total(case.tokens(result.logp, result.log_odds)) / len(LENGTHS)).backward()
    value = LOSS.value(case.tokens(result.logp.detach(), result.log_odds), result.entropy).sum() / len(LENGTHS)
    assert hidden.grad is not None and matrix.grad is not None
    assert hidden.grad.dtype == case.hidden.dtype and matrix.grad.dtype == torch.float32
    return float(value), hidden.grad, matrix.grad


def twin(case: Case) -> tuple[Outcome, float, Tensor]:
    """The same in float64 of the very factors that the head multiplies; the largest logit; the log-odds."""
    hidden = case.hidden.double().requires_grad_()
    matrix = case.matrix.to(case.hidden.dtype).double().requires_grad_()
    rows = [slice(sum(LENGTHS[:r]), sum(LENGTHS[: r + 1])) for r in range(len(LENGTHS))]

    def padded(values: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([values[row] for row in rows], batch_first=True)

    logits = capped(hidden @ matrix.T, case.softcap)
    ref_logits = capped(case.ref_hidden.double() @ matrix.detach().T, case.softcap)
    label = torch.tensor(LABELS, dtype=torch.float64)
    mask = padded(torch.ones(len(case.target), dtype=torch.bool))
    exact = reference.bnf(padded(logits), padded(ref_logits), padded(case.target), mask, label)
    exact.backward()
    assert hidden.grad is not None and matrix.grad is not None
    odds = reference.split(logits.detach()[None], case.target[None])[0][0]
    return (float(exact.detach()), hidden.grad, matrix.grad), float(logits.detach().abs().max()), odds


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 100.0])
@pytest.mark.parametrize("vocabulary", [257, 32_000])
def test_one_pass_is_recompute_is_the_twin(
    vocabulary: int, softcap: float | None, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cap, the logit of a confident token is 40; with one, the cap bends it by a tenth."""
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", {"cpu": 4 * vocabulary})
    case = make_case(vocabulary, kind, softcap)
    exact, largest, odds = twin(case)
    assert float(odds.min()) == pytest.approx(LOW, rel=0.01) and float(odds.max()) == pytest.approx(HIGH, rel=0.02)
    first, second = ours(case, one_pass=True), ours(case, one_pass=False)
    tolerance = 1e-5 * max(1.0, largest / 10)
    # The gradient of hidden states comes in their type: rounded once.
    narrow = 2**-8 if kind == torch.bfloat16 else tolerance
    for found in (first, second):
        assert found[0] == pytest.approx(exact[0], rel=tolerance)
        assert relative(found[1], exact[1]) < narrow
        assert relative(found[2], exact[2]) < tolerance
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    assert relative(first[1], second[1]) < narrow and relative(first[2], second[2]) < 1e-6


@pytest.mark.parametrize("one_pass", [True, False])
def test_every_token_keeps_its_own_digits(one_pass: bool) -> None:
    """In norms over a tensor the unlikely tokens hide the confident ones, whose gradients are of the size of 1 - p."""
    case = make_case(257, torch.float32, None)
    exact, largest, odds = twin(case)
    found = ours(case, one_pass)[1]
    for row in range(len(case.target)):
        assert relative(found[row], exact[1][row]) < 1e-5 * max(1.0, largest / 10), float(odds[row])
