"""The head: from hidden states to log pi(y_i) and log-odds, chunk by chunk over tokens.

No [N, V] tensor of a whole micro-batch exists: the backward computes each chunk's logits again.  Log-odds come
from logits, o = z_y - logsumexp(z without y), and log p = logsigmoid(o); never 1 - exp(logp), which is 0 once p
rounds to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

CHUNK_ELEMENTS = 1 << 24
"""Logits per chunk: 64 MiB in float32, whatever the vocabulary."""


@dataclass(frozen=True, eq=False)
class Head:
    """What turns final hidden states into logits: h @ matrix.T (+ bias), then cap * tanh(z / cap) if there is a cap."""

    matrix: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    softcap: float | None = None
    """Gemma-2's final_logit_softcapping."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V] float32 logits of hidden states [n, H]; not differentiable."""
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return _logits(hidden, self.matrix.to(hidden.dtype), self.bias, self.softcap)

    def __call__(self, hidden: Tensor, target: Tensor, *, entropy: bool = False) -> HeadResult:
        """Per-token results for hidden states [N, H] (float32, bfloat16 or float64) and target ids [N]; N may be 0."""
        logp, log_odds, spread = _TokenLogp.apply(hidden, self.matrix, self.bias, target, self.softcap, entropy)
        return HeadResult(logp, log_odds, spread if entropy else None)


@dataclass(frozen=True, eq=False)
class HeadResult:
    """N tokens, float32 (float64 for float64 hidden states)."""

    logp: Tensor
    """[N] log pi(target), nats, differentiable."""
    log_odds: Tensor
    """[N] log p / (1 - p), detached."""
    entropy: Tensor | None
    """[N] nats: of pi renormalised without the target, detached; where asked for."""


def _logits(hidden: Tensor, matrix: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """[n, V] in float32 or better: bfloat16 factors, but neither the sum nor the result is rounded to bfloat16."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.is_cuda and hidden.dtype != wide:
        logits = torch.mm(hidden, matrix.T, out_dtype=wide)
    else:
        logits = hidden.to(wide) @ matrix.to(wide).T
    if bias is not None:
        logits += bias
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _without_target(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Target logit [n], logits with -inf at the target [n, V] (in place), their logsumexp [n]."""
    index = target.unsqueeze(-1)
    label = logits.gather(-1, index).squeeze(-1)
    rest = logits.scatter_(-1, index, -torch.inf)
    return label, rest, rest.logsumexp(-1)


class _TokenLogp(torch.autograd.Function):
    """(logp, log-odds, entropy), each [N]; logits are computed again in the backward, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, matrix: Tensor, bias: Tensor | None, target: Tensor, softcap: float | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_odds = hidden.new_empty(hidden.shape[0], dtype=wide)
        spread = hidden.new_zeros(hidden.shape[0] if entropy else 0, dtype=wide)
        with torch.autocast(hidden.device.type, enabled=False):
            cast = matrix.to(hidden.dtype)
            for part in _chunks(hidden.shape[0], matrix.shape[0]):
                logits = _logits(hidden[part], cast, bias, softcap)
                label, rest, lse = _without_target(logits, target[part])
                log_odds[part] = label - lse
                if entropy:
                    spread[part] = torch.special.entr(rest.sub_(lse.unsqueeze(-1)).exp_()).sum(-1)
        ctx.save_for_backward(hidden, matrix, bias, target)
        ctx.softcap = softcap
        ctx.mark_non_differentiable(log_odds, spread)
        return logsigmoid(log_odds), log_odds, spread

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, matrix, bias, target = ctx.saved_tensors
        grad_logp = grads[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.zeros_like(hidden)
        grad_matrix = torch.zeros_like(matrix, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None else None
        with torch.autocast(hidden.device.type, enabled=False):
            cast = matrix.to(hidden.dtype)
            # On a GPU the two products run on bfloat16 factors; a CPU has no faster path than float32.
            work = hidden.dtype if hidden.is_cuda else wide
            for part in _chunks(hidden.shape[0], matrix.shape[0]):
                grad = _logit_gradient(hidden[part], cast, bias, ctx.softcap, target[part], grad_logp[part])
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(work)
                grad_hidden[part] = (grad @ cast.to(work)).to(hidden.dtype)
                if grad_matrix is not None:
                    grad_matrix += grad.T @ hidden[part].to(work)
        return (
            grad_hidden,
            None if grad_matrix is None else grad_matrix.to(matrix.dtype),
            None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
            None, None, None,
        )  # fmt: skip


def _logit_gradient(
    hidden: Tensor, matrix: Tensor, bias: Tensor | None, softcap: float | None, target: Tensor, grad_logp: Tensor
) -> Tensor:
    """[n, V] grad_logp * d logp / d (logit before the cap).

    sigmoid(-o) on the target and -sigmoid(-o) pi_j / (1 - p) elsewhere: the digits of 1 - p survive p -> 1.
    """
    logits = _logits(hidden, matrix, bias, softcap)
    slope = 1 - (logits / softcap) ** 2 if softcap is not None else None
    label, rest, lse = _without_target(logits, target)
    scale = grad_logp * torch.sigmoid(lse - label)
    grad = rest.sub_(lse.unsqueeze(-1)).exp_().mul_(-scale.unsqueeze(-1))
    grad.scatter_(-1, target.unsqueeze(-1), scale.unsqueeze(-1))
    return grad if slope is None else grad.mul_(slope)


def _chunks(n: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
