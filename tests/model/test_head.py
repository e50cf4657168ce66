"""The chunked head against plain log_softmax and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnfctl.model import head as head_module
from bnfctl.model.head import Head


def parts(kind: torch.dtype, n: int = 11, vocabulary: int = 23, size: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden [N, H], matrix [V, H], bias [V] as leaves, target [N]."""
    draw = torch.Generator().manual_seed(0)
    hidden = (torch.randn(n, size, generator=draw) * 2).to(kind).requires_grad_()
    matrix = torch.randn(vocabulary, size, generator=draw).to(torch.promote_types(kind, torch.float32)).requires_grad_()
    bias = torch.randn(vocabulary, generator=draw).to(matrix.dtype).requires_grad_()
    return hidden, matrix, bias, torch.randint(0, vocabulary, (n,), generator=draw)


def naive(hidden: Tensor, matrix: Tensor, bias: Tensor | None, softcap: float | None, target: Tensor) -> Tensor:
    logits = hidden @ matrix.T + (0 if bias is None else bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_equals_log_softmax(
    softcap: float | None, with_bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, matrix, bias, target = parts(torch.float64)
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", chunk * matrix.shape[0])
    used = bias if with_bias else None
    leaves = [hidden, matrix, *([bias] if with_bias else [])]
    weights = torch.linspace(-1, 1, len(target), dtype=torch.float64)
    result = Head(matrix, used, softcap)(hidden, target, entropy=True)
    exact = naive(hidden, matrix, used, softcap, target)
    torch.testing.assert_close(result.logp, exact)
    found = torch.autograd.grad((result.logp * weights).sum(), leaves)
    expected = torch.autograd.grad((exact * weights).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    p = exact.detach().exp()
    torch.testing.assert_close(result.log_odds, p.log() - (-p).log1p())
    logits = Head(matrix, used, softcap).logits(hidden)
    rest = logits.scatter(-1, target.unsqueeze(-1), -torch.inf).softmax(-1)
    assert result.entropy is not None
    torch.testing.assert_close(result.entropy, torch.special.entr(rest).sum(-1))


def test_only_logp_is_differentiable() -> None:
    hidden, matrix, _, target = parts(torch.float32)
    result = Head(matrix)(hidden, target, entropy=True)
    assert result.entropy is not None
    assert result.logp.requires_grad and not result.log_odds.requires_grad and not result.entropy.requires_grad
    assert Head(matrix)(hidden, target).entropy is None


@pytest.mark.parametrize("log_odds", [30.0, 60.0, 80.0])
def test_a_confident_token_keeps_the_digits_of_its_gradient(log_odds: float) -> None:
    """1 - p is sigmoid(-o); 1 - exp(logp) would be 0 here."""
    hidden = torch.tensor([[log_odds, 0.0]], requires_grad=True)
    result = Head(torch.eye(2))(hidden, torch.tensor([0]))
    result.logp.backward()
    assert hidden.grad is not None
    exact = float(torch.sigmoid(torch.tensor(-log_odds, dtype=torch.float64)))
    assert hidden.grad[0].tolist() == pytest.approx([exact, -exact], rel=1e-6, abs=0)
    assert float(result.logp.detach()) == pytest.approx(-exact, rel=1e-6, abs=0)


def test_bfloat16_hidden_states_keep_float32_results() -> None:
    """Log-odds are those of the bfloat16 factors without further rounding; gradients arrive in the leaf's type."""
    hidden, matrix, _, target = parts(torch.bfloat16)
    result = Head(matrix)(hidden, target)
    assert result.logp.dtype == result.log_odds.dtype == torch.float32
    exact = naive(hidden.double(), matrix.bfloat16().double(), None, None, target)
    torch.testing.assert_close(result.logp.double(), exact, rtol=1e-5, atol=1e-6)
    result.logp.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert matrix.grad is not None and matrix.grad.dtype == torch.float32


def test_autocast_does_not_round_the_logits() -> None:
    hidden, matrix, _, target = parts(torch.float32)
    plain = Head(matrix)(hidden, target).logp
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Head(matrix)(hidden, target).logp, plain)


def test_tied_embeddings_get_both_gradients() -> None:
    _, matrix, _, target = parts(torch.float64)
    ids = target.flip(0)
    result = Head(matrix)(matrix[ids], target)
    (found,) = torch.autograd.grad(result.logp.sum(), matrix)
    (expected,) = torch.autograd.grad(naive(matrix[ids], matrix, None, None, target).sum(), matrix)
    torch.testing.assert_close(found, expected)


def test_no_logits_are_kept_for_the_backward() -> None:
    hidden, matrix, _, target = parts(torch.float32, n=64)
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        Head(matrix)(hidden, target)
    assert sizes and max(sizes) <= max(hidden.numel(), matrix.numel()) < 64 * 23


def test_no_tokens() -> None:
    _, matrix, _, _ = parts(torch.float32)
    hidden = torch.zeros(0, 8, requires_grad=True)
    result = Head(matrix)(hidden, torch.zeros(0, dtype=torch.int64), entropy=True)
    result.logp.sum().backward()
    assert result.logp.shape == (0,)
    assert hidden.grad is not None and hidden.grad.shape == (0, 8)
    assert matrix.grad is not None and not matrix.grad.any()


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_has_float32_logits() -> None:
    """The products run on bfloat16 factors there; only the gradients are rounded to bfloat16 on the way."""
    hidden, matrix, _, target = (part.detach().cuda() for part in parts(torch.bfloat16, n=64))
    hidden, matrix = hidden.requires_grad_(), matrix.requires_grad_()
    result = Head(matrix)(hidden, target)
    exact = naive(hidden.detach().double(), matrix.detach().bfloat16().double(), None, None, target)
    torch.testing.assert_close(result.logp.double(), exact, rtol=1e-5, atol=1e-5)
    result.logp.sum().backward()
    double_hidden, double_matrix = (part.detach().bfloat16().double().requires_grad_() for part in (hidden, matrix))
    naive(double_hidden, double_matrix, None, None, target).sum().backward()
    for found, slope in ((hidden.grad, double_hidden.grad), (matrix.grad, double_matrix.grad)):
        assert found is not None and slope is not None
        assert float((found.double() - slope).norm() / slope.norm()) < 1e-2
