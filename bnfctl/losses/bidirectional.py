"""Bidirectional Negative Feedback (arXiv 2410.04834, eq. 4 and 6), as a weighted NLL.

Eq. 6 put into eq. 8 gives the logit gradient p - f on the label and pi_j (f - p) / (1 - p) elsewhere: exactly
-c d log p, with c = (f - p) / (1 - p) = min(1, odds of the policy / odds of the reference).  So the gradient is
that of -(label / |y|) sum_i c_i log p_i with c held fixed, and no [T, V] tensor is needed.

`BNF` is the loss of this package's training loop; `bnf` and `log_odds` are the same for a trainer of your own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, expm1
from torch.nn.functional import logsigmoid

from bnfctl.losses import Stats, TokenLogps


@dataclass(frozen=True)
class BNF:
    """Eq. 4: the mean over labelled responses of a length-normalised cross-entropy.  No hyper-parameters."""

    needs_reference: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = False
    needs_entropy: ClassVar[bool] = True
    needs_kl: ClassVar[bool] = False
    separable: ClassVar[bool] = True
    labels: ClassVar[tuple[int, ...]] = (1, -1)

    def denominator(self, label: Tensor, length: Tensor, pair: Tensor) -> float:
        """The number of responses (the expectation of eq. 4)."""
        return float(label.numel())

    def total(self, tokens: TokenLogps, stats: Stats | None = None) -> Tensor:
        """-sum (label / |y|) c log p: its gradient is eq. 8; its value is not eq. 4 (see `value`)."""
        return (self.coefficients(tokens) * tokens.logp).sum()

    def coefficients(self, tokens: TokenLogps) -> Tensor:
        """[N] -(label / |y|) c, with c = exp(min(0, o - o_ref)): in [0, 1] and finite whatever the log-odds."""
        assert tokens.ref_log_odds is not None
        c = (tokens.log_odds - tokens.ref_log_odds).clamp(max=0.0).exp()
        return -(tokens.label / tokens.length)[tokens.segment] * c

    def value(self, tokens: TokenLogps, entropy: Tensor | None, stats: Stats | None = None) -> Tensor:
        """[R] eq. 4: -(label / |y|) sum_i [f log p + (1 - f) (log(1 - p) - H)].

        sum_j!=y pi_j / (1 - p) log pi_j = log(1 - p) - H, with H the entropy of pi renormalised without y.
        """
        assert tokens.ref_log_odds is not None and entropy is not None
        log_p = logsigmoid(tokens.log_odds)
        log_f = (log_p - logsigmoid(tokens.ref_log_odds)).clamp(max=0.0)
        others = logsigmoid(-tokens.log_odds) - entropy
        per_token = log_f.exp() * log_p - expm1(log_f) * others
        return -tokens.label / tokens.length * tokens.sum_by_response(per_token)


def bnf(
    logits: Tensor,
    target: Tensor,
    label: Tensor,
    ref_log_odds: Tensor,
    mask: Tensor | None = None,
    denominator: float | None = None,
) -> Tensor:
    """The BNF loss of B labelled responses: a scalar with the value of eq. 4, and its gradient (eq. 8) by autograd.

    logits: [B, T, V] of the policy, shifted: logits[b, t] predicts target[b, t].  Any float type; the loss is
    computed in float32 (float64 for float64).
    target: [B, T] token ids.  label: [B] of +1 (chosen) and -1 (rejected); no pairs are needed.
    ref_log_odds: [B, T], `log_odds` of the reference's logits, which can be computed once and stored.
    mask: [B, T], true on response tokens; without it, wherever the target is not negative (-100 means "ignore").
    denominator: what to divide by, B by default.  With gradient accumulation or several processes, pass the number
    of responses in the whole optimizer step, and add the gradients up: they then don't depend on the split.

    Memory: a few tensors of [response tokens, V]; the training loop of this package has none.  Raises ValueError for
    shapes that don't fit, other labels, and a response without tokens.

    >>> import torch
    >>> from bnfctl.losses import bnf, log_odds
    >>> policy, reference = torch.nn.Linear(8, 50), torch.nn.Linear(8, 50)
    >>> hidden, target = torch.randn(2, 6, 8), torch.randint(0, 50, (2, 6))
    >>> target[:, :2] = -100                            # the prompt
    >>> with torch.no_grad():
    ...     stored = log_odds(reference(hidden), target)
    >>> loss = bnf(policy(hidden), target, torch.tensor([1, -1]), stored)
    >>> loss.backward()
    >>> loss.shape, policy.weight.grad.isfinite().all().item()
    (torch.Size([]), True)
    """
    mask = target >= 0 if mask is None else mask.bool()
    _check(logits, target, label, ref_log_odds, mask)
    o, others = _split(logits[mask], target[mask])
    responses = torch.arange(len(label), device=logits.device)
    tokens = TokenLogps(
        logp=logsigmoid(o),
        log_odds=o.detach(),
        ref_log_odds=ref_log_odds[mask].to(o.dtype),
        segment=responses[:, None].expand_as(mask)[mask],
        label=label.to(o.dtype),
        length=mask.sum(-1).to(o.dtype),
        pair=torch.full_like(responses, -1),
    )
    with torch.no_grad():
        value = BNF().value(tokens, torch.special.entr(others.softmax(-1)).sum(-1)).sum()
    surrogate = BNF().total(tokens)
    return (surrogate - surrogate.detach() + value) / (len(label) if denominator is None else denominator)


def log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """log p / (1 - p) of every target: [...] from logits [..., V] and ids [...], in float32 or better.

    From logits, z_y - logsumexp(z without y): a log-probability of a confident token has lost these digits.  What
    stands at a negative target (-100, "ignore") means nothing.
    """
    return _split(logits, target.clamp(min=0))[0]


def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-odds [...] of the target, and the logits with -inf in its place [..., V]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = target.unsqueeze(-1)
    others = logits.scatter(-1, index, -torch.inf)
    return logits.gather(-1, index).squeeze(-1) - others.logsumexp(-1), others


def _check(logits: Tensor, target: Tensor, label: Tensor, ref_log_odds: Tensor, mask: Tensor) -> None:
    """ValueError for what `bnf` cannot work with."""
    shape = logits.shape[:2]
    if logits.ndim != 3 or not (target.shape == ref_log_odds.shape == mask.shape == shape):
        found = ", ".join(str(list(tensor.shape)) for tensor in (logits, target, ref_log_odds, mask))
        raise ValueError(f"logits are [B, T, V]; target, ref_log_odds and mask are [B, T]; not {found}")
    if label.shape != shape[:1] or not (label.abs() == 1).all():
        raise ValueError("label is [B], +1 for a chosen and -1 for a rejected response")
    if not mask.any(-1).all():
        raise ValueError("a response has no token in the mask")
