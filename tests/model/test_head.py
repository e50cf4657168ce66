"""The chunked head against plain log_softmax and autograd."""

from __future__ import annotations

from typing import Any

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


WAYS = ("recompute", "one-pass")


def weighted(way: str, head: Head, hidden: Tensor, target: Tensor, weights: Tensor, entropy: bool = False) -> Any:
    """(sum of weights * logp to differentiate, results), each way."""
    if way == "recompute":
        result = head(hidden, target, entropy=entropy)
        return (result.logp * weights).sum(), result
    return head.one_pass(hidden, target, lambda part, log_odds: weights[part].to(log_odds.dtype), entropy=entropy)


def naive(hidden: Tensor, matrix: Tensor, bias: Tensor | None, softcap: float | None, target: Tensor) -> Tensor:
    logits = hidden @ matrix.T + (0 if bias is None else bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_equals_log_softmax(
    way: str, softcap: float | None, with_bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, matrix, bias, target = parts(torch.float64)
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", {"cpu": chunk * matrix.shape[0]})
    used = bias if with_bias else None
    leaves = [hidden, matrix, *([bias] if with_bias else [])]
    weights = torch.linspace(-1, 1, len(target), dtype=torch.float64)
    total, result = weighted(way, Head(matrix, used, softcap), hidden, target, weights, entropy=True)
    exact = naive(hidden, matrix, used, softcap, target)
    torch.testing.assert_close(result.logp, exact)
    torch.testing.assert_close(total, (exact * weights).sum())
    found = torch.autograd.grad(3 * total, leaves, grad_outputs=torch.tensor(1 / 3, dtype=torch.float64))
    expected = torch.autograd.grad((exact * weights).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    p = exact.detach().exp()
    torch.testing.assert_close(result.log_odds, p.log() - (-p).log1p())
    logits = Head(matrix, used, softcap).logits(hidden)
    rest = logits.scatter(-1, target.unsqueeze(-1), -torch.inf).softmax(-1)
    assert result.entropy is not None
    torch.testing.assert_close(result.entropy, torch.special.entr(rest).sum(-1))


def test_a_frozen_matrix_gets_no_gradient() -> None:
    """LoRA leaves the head alone: neither the product nor the [V, H] tensor is made."""
    hidden, matrix, _, target = parts(torch.float64)
    exact = torch.autograd.grad(naive(hidden, matrix, None, None, target).sum(), hidden)[0]
    for way in WAYS:
        total, _ = weighted(way, Head(matrix.detach()), hidden, target, torch.ones(len(target)))
        torch.testing.assert_close(torch.autograd.grad(total, hidden)[0], exact)


def test_only_logp_is_differentiable() -> None:
    hidden, matrix, _, target = parts(torch.float32)
    result = Head(matrix)(hidden, target, entropy=True)
    assert result.entropy is not None
    assert result.logp.requires_grad and not result.log_odds.requires_grad and not result.entropy.requires_grad
    assert Head(matrix)(hidden, target).entropy is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("log_odds", [30.0, 60.0, 80.0])
def test_a_confident_token_keeps_the_digits_of_its_gradient(way: str, log_odds: float) -> None:
    """1 - p is sigmoid(-o); 1 - exp(logp) would be 0 here."""
    hidden = torch.tensor([[log_odds, 0.0]], requires_grad=True)
    total, result = weighted(way, Head(torch.eye(2)), hidden, torch.tensor([0]), torch.ones(1))
    total.backward()
    assert hidden.grad is not None
    exact = float(torch.sigmoid(torch.tensor(-log_odds, dtype=torch.float64)))
    assert hidden.grad[0].tolist() == pytest.approx([exact, -exact], rel=1e-6, abs=0)
    assert float(result.logp.detach()) == pytest.approx(-exact, rel=1e-6, abs=0)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_hidden_states_keep_float32_results(way: str) -> None:
    """Log-odds are those of the bfloat16 factors without further rounding; gradients arrive in the leaf's type."""
    hidden, matrix, _, target = parts(torch.bfloat16)
    total, result = weighted(way, Head(matrix), hidden, target, torch.ones(len(target)))
    assert result.logp.dtype == result.log_odds.dtype == torch.float32
    exact = naive(hidden.double(), matrix.bfloat16().double(), None, None, target)
    torch.testing.assert_close(result.logp.double(), exact, rtol=1e-5, atol=1e-6)
    total.backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert matrix.grad is not None and matrix.grad.dtype == torch.float32


def test_autocast_does_not_round_the_logits() -> None:
    hidden, matrix, _, target = parts(torch.float32)
    plain = Head(matrix)(hidden, target).logp
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Head(matrix)(hidden, target).logp, plain)


@pytest.mark.parametrize("way", WAYS)
def test_tied_embeddings_get_both_gradients(way: str) -> None:
    _, matrix, _, target = parts(torch.float64)
    ids = target.flip(0)
    total, _ = weighted(way, Head(matrix), matrix[ids], target, torch.ones(len(target)))
    (found,) = torch.autograd.grad(total, matrix)
    (expected,) = torch.autograd.grad(naive(matrix[ids], matrix, None, None, target).sum(), matrix)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("way", WAYS)
def test_no_logits_are_kept_for_the_backward(way: str) -> None:
    hidden, matrix, _, target = parts(torch.float32, n=64)
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        weighted(way, Head(matrix), hidden, target, torch.ones(64))
    assert sizes and max(sizes) <= max(hidden.numel(), matrix.numel()) < 64 * 23


@pytest.mark.parametrize("way", WAYS)
def test_no_tokens(way: str) -> None:
    _, matrix, _, _ = parts(torch.float32)
    hidden = torch.zeros(0, 8, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    total, result = weighted(way, Head(matrix), hidden, none, torch.zeros(0), entropy=True)
    total.backward()
    assert result.logp.shape == (0,)
    assert hidden.grad is not None and hidden.grad.shape == (0, 8)
    assert matrix.grad is not None and not matrix.grad.any()


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_on_a_gpu_has_float32_logits(way: str) -> None:
    """The products run on bfloat16 factors there; only the gradients are rounded to bfloat16 on the way."""
    hidden, matrix, _, target = (part.detach().cuda() for part in parts(torch.bfloat16, n=64))
    hidden, matrix = hidden.requires_grad_(), matrix.requires_grad_()
    total, result = weighted(way, Head(matrix), hidden, target, torch.ones(64, device="cuda"))
    exact = naive(hidden.detach().double(), matrix.detach().bfloat16().double(), None, None, target)
    torch.testing.assert_close(result.logp.double(), exact, rtol=1e-5, atol=1e-5)
    total.backward()
    double_hidden, double_matrix = (part.detach().bfloat16().double().requires_grad_() for part in (hidden, matrix))
    naive(double_hidden, double_matrix, None, None, target).sum().backward()
    for found, slope in ((hidden.grad, double_hidden.grad), (matrix.grad, double_matrix.grad)):
        assert found is not None and slope is not None
        assert float((found.double() - slope).norm() / slope.norm()) < 1e-2
