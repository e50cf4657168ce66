"""The head: from hidden states to log pi(y_i) and log-odds, chunk by chunk over tokens.

No [N, V] tensor of a whole micro-batch exists.  Two ways to the same gradients, both fed by the one vector
d total / d logp [N]:

* `one_pass`, for losses whose vector follows from a token's own log-odds (BNF, SFT): each chunk's logits are
  computed once and give value and gradient; three matrix products in all.
* calling the head, for the others: their vector needs whole responses first, so the backward computes each chunk's
  logits again; four products.

Log-odds come from logits, o = z_y - logsumexp(z without y), and log p = logsigmoid(o); never 1 - exp(logp), which
is 0 once p rounds to 1.  With s = softmax(z without y) and g = d total / d logp, the logit gradient is
g sigmoid(-o) on the label and -g sigmoid(-o) s_j elsewhere, so the digits of 1 - p survive p -> 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Logits per chunk, whatever the vocabulary: 32 MiB of float32 on a CPU, 1 GiB on a GPU (2,093 tokens of Llama 3)."""

Coefficients = Callable[[slice, Tensor], Tensor]
"""(which of the N tokens, their log-odds [n]) -> d total / d logp [n]."""


@dataclass(frozen=True, eq=False)
class Head:
    """What turns final hidden states into logits: h @ matrix.T (+ bias), then cap * tanh(z / cap) if there is a cap.

    Made anew in each forward from the output layer's parameters, inside the module that FSDP2 shards: outside of it
    they are a rank's shards only.
    """

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
        """Per-token results for hidden states [N, H] (float32, bfloat16 or float64) and target ids [N]; N may be 0.

        `logp` is differentiable; the backward computes the logits again.
        """
        results = _Recompute.apply(hidden, self.matrix, self.bias, target, self.softcap, entropy)
        return HeadResult(results[0], results[1], results[2] if entropy else None)

    def one_pass(
        self, hidden: Tensor, target: Tensor, coefficients: Coefficients, *, entropy: bool = False
    ) -> tuple[Tensor, HeadResult]:
        """(surrogate, results): surrogate [] is sum of coefficient * logp, and its backward needs no logits.

        The gradients of hidden states and matrix are made here, with the coefficients held fixed.
        """
        surrogate, logp, log_odds, spread = _OnePass.apply(
            hidden, self.matrix, self.bias, target, self.softcap, entropy, coefficients
        )
        return surrogate, HeadResult(logp, log_odds, spread if entropy else None)


@dataclass(frozen=True, eq=False)
class HeadResult:
    """N tokens, float32 (float64 for float64 hidden states)."""

    logp: Tensor
    """[N] log pi(target), nats; differentiable only where the head was called."""
    log_odds: Tensor
    """[N] log p / (1 - p), detached."""
    entropy: Tensor | None
    """[N] nats: of pi renormalised without the target, detached; where asked for."""


def _logits(hidden: Tensor, matrix: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """[n, V] in float32 or better: bfloat16 factors, but neither the sum nor the result is rounded to bfloat16."""
    logits = _product(hidden, matrix.T)
    if bias is not None:
        logits += bias
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in float32 (or better), whatever the factors' type."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.is_cuda and a.dtype != wide:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def _without_target(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(target logit [n], the logits with -inf at the target [n, V], in place)."""
    index = target.unsqueeze(-1)
    label = logits.gather(-1, index).squeeze(-1)
    return label, logits.scatter_(-1, index, -torch.inf)


def _softmax(rest: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax [n, V], logsumexp [n]) of logits in one go: at the largest logit m, softmax = exp(m - logsumexp)."""
    largest, place = rest.max(-1, keepdim=True)
    soft = rest.softmax(-1)
    return soft, (largest - soft.gather(-1, place).log()).squeeze(-1)


def _entropy(soft: Tensor, rest: Tensor, lse: Tensor, target: Tensor) -> Tensor:
    """[n] entropy of soft = exp(rest - lse): lse - sum soft * rest.  Overwrites rest at the target."""
    rest.scatter_(-1, target.unsqueeze(-1), 0.0)  # 0 * -inf is NaN
    return (lse - torch.bmm(soft.unsqueeze(1), rest.unsqueeze(2)).flatten()).clamp(min=0.0)


class _Gradients:
    """The gradients of hidden states, matrix and bias, gathered over the chunks."""

    def __init__(self, hidden: Tensor, matrix: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> None:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden = torch.zeros_like(hidden)
        self.matrix = torch.zeros_like(matrix, dtype=wide) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None

    def add(
        self, part: slice, hidden: Tensor, matrix: Tensor, soft: Tensor, target: Tensor, scale: Tensor,
        slope: tuple[Tensor, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """One chunk, hidden [n, H] and matrix in the compute type, whose logit gradient is scale * (label - soft).

        scale [n] is g sigmoid(-o).  It is put into the narrow tensors rather than into soft [n, V].  slope: the
        derivative of the soft cap, at the label [n] and elsewhere [n, V].  Returns soft @ matrix [n, H].
        """
        at_label = scale
        if slope is not None:
            at_label = scale * slope[0]
            soft = soft.mul_(slope[1])
        # On a GPU the products run on factors of the compute type; a CPU has no faster path than float32.
        soft = soft.to(hidden.dtype) if hidden.is_cuda else soft
        kind = soft.dtype
        mean = _product(soft, matrix.to(kind))
        back = mean * -scale.unsqueeze(-1)
        back += at_label.unsqueeze(-1) * matrix[target]
        self.hidden[part] = back.to(hidden.dtype)
        if self.matrix is not None:
            if self.matrix.dtype == kind:
                self.matrix.addmm_(soft.T, hidden.to(kind) * scale.unsqueeze(-1), alpha=-1)
            else:
                self.matrix -= _product(soft.T, (hidden * scale.unsqueeze(-1)).to(kind))
            self.matrix.index_add_(0, target, hidden.to(scale.dtype) * at_label.unsqueeze(-1))
        if self.bias is not None:
            self.bias -= scale @ soft.to(scale.dtype)
            self.bias.index_add_(0, target, at_label)
        return mean

    def cast(self, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(hidden, matrix, bias), each in the type of what it is the gradient of."""
        return (
            self.hidden,
            None if self.matrix is None else self.matrix.to(matrix.dtype),
            None if bias is None or self.bias is None else self.bias.to(bias.dtype),
        )


def _slope(logits: Tensor, target: Tensor, softcap: float | None) -> tuple[Tensor, Tensor] | None:
    """Derivative of cap * tanh(z / cap): 1 - (capped / cap)^2, at the label [n] and for all [n, V]."""
    if softcap is None:
        return None
    slope = 1 - (logits / softcap) ** 2
    return slope.gather(-1, target.unsqueeze(-1)).squeeze(-1), slope


class _OnePass(torch.autograd.Function):
    """(surrogate, logp, log-odds, entropy); all gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, matrix: Tensor, bias: Tensor | None, target: Tensor, softcap: float | None,
        entropy: bool, coefficients: Coefficients,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_odds = hidden.new_empty(hidden.shape[0], dtype=wide)
        spread = hidden.new_zeros(hidden.shape[0] if entropy else 0, dtype=wide)
        gradients = _Gradients(hidden, matrix, bias, ctx.needs_input_grad)
        surrogate = hidden.new_zeros((), dtype=wide)
        # The mean logit under soft is h . (soft @ matrix), which the gradient needs anyway: the entropy is then free.
        # Not under a soft cap, and not where that product is on narrow factors.
        free = softcap is None and bias is None and not (hidden.is_cuda and hidden.dtype != wide)
        with torch.autocast(hidden.device.type, enabled=False):
            cast = matrix.to(hidden.dtype)
            for part in _chunks(hidden, matrix.shape[0]):
                logits = _logits(hidden[part], cast, bias, softcap)
                slope = _slope(logits, target[part], softcap)
                label, rest = _without_target(logits, target[part])
                soft, lse = _softmax(rest)
                odds = log_odds[part] = label - lse
                if entropy and not free:
                    spread[part] = _entropy(soft, rest, lse, target[part])
                pull = coefficients(part, odds)
                surrogate += pull @ logsigmoid(odds)
                scale = pull * torch.sigmoid(-odds)
                mean = gradients.add(part, hidden[part], cast, soft, target[part], scale, slope)
                if entropy and free:
                    spread[part] = (lse - (mean * hidden[part]).sum(-1)).clamp(min=0.0)
        ctx.save_for_backward(*gradients.cast(matrix, bias))
        logp = logsigmoid(log_odds)
        ctx.mark_non_differentiable(logp, log_odds, spread)
        return surrogate, logp, log_odds, spread

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: they were made for this one backward, and a copy of [V, H] is large.
        return *(None if made is None else made.mul_(grads[0]) for made in ctx.saved_tensors), *[None] * 4


class _Recompute(torch.autograd.Function):
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
            for part in _chunks(hidden, matrix.shape[0]):
                label, rest = _without_target(_logits(hidden[part], cast, bias, softcap), target[part])
                soft, lse = _softmax(rest)
                log_odds[part] = label - lse
                if entropy:
                    spread[part] = _entropy(soft, rest, lse, target[part])
        ctx.save_for_backward(hidden, matrix, bias, target, log_odds)
        ctx.softcap = softcap
        ctx.mark_non_differentiable(log_odds, spread)
        return logsigmoid(log_odds), log_odds, spread

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, matrix, bias, target, log_odds = ctx.saved_tensors
        gradients = _Gradients(hidden, matrix, bias, ctx.needs_input_grad)
        scale = grads[0] * torch.sigmoid(-log_odds)
        with torch.autocast(hidden.device.type, enabled=False):
            cast = matrix.to(hidden.dtype)
            for part in _chunks(hidden, matrix.shape[0]):
                logits = _logits(hidden[part], cast, bias, ctx.softcap)
                slope = _slope(logits, target[part], ctx.softcap)
                soft = _without_target(logits, target[part])[1].softmax(-1)
                gradients.add(part, hidden[part], cast, soft, target[part], scale[part], slope)
        return *gradients.cast(matrix, bias), None, None, None


def _chunks(hidden: Tensor, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cpu"]) // vocabulary)
    return [slice(start, min(start + size, hidden.shape[0])) for start in range(0, hidden.shape[0], size)]
