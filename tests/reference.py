"""Exact float64 twins of the losses over full logits, written from the paper (equation numbers below).

They work on log-odds, because the literal eq. 6 loses its digits as p -> 1 (off by 2e-3 at p = 1 - 1e-12);
`tests/losses/test_reference.py` proves them against mpmath.

Shapes: logits [B, T, V] already shifted (logits[b, t] predicts target[b, t]), target [B, T], mask [B, T] bool
(the trained tokens; |y| = mask.sum(-1)), label [B] of +1 / -1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-odds o [B, T] of the target, and log pi(j | not target) [B, T, V] (0 where j is the target)."""
    is_target = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, target.unsqueeze(-1), True)
    rest = logits.masked_fill(is_target, -torch.inf)
    o = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1) - rest.logsumexp(-1)
    return o, rest.log_softmax(-1).masked_fill(is_target, 0.0)


def token_logp(logits: Tensor, target: Tensor) -> Tensor:
    """log pi(y_i) [B, T] = logsigmoid(o)."""
    return logsigmoid(split(logits, target)[0])


def dynamic_target(logits: Tensor, ref_logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 6, detached: f(y_i, y_i) [B, T] and f(y_i, t_j) [B, T, V] for t_j != y_i (0 at t_j = y_i)."""
    is_target = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, target.unsqueeze(-1), True)
    o, log_rest = split(logits, target)
    log_f = (logsigmoid(o) - token_logp(ref_logits, target)).clamp(max=0.0)
    others = (-torch.expm1(log_f)).unsqueeze(-1) * log_rest.exp().masked_fill(is_target, 0.0)
    return log_f.exp().detach(), others.detach()


def bnf_per_response(logits: Tensor, ref_logits: Tensor, target: Tensor, mask: Tensor, label: Tensor) -> Tensor:
    """Eq. 4 for each response [B], differentiable in `logits`: its gradient is eq. 8."""
    f, others = dynamic_target(logits, ref_logits, target)
    o, log_rest = split(logits, target)
    log_pi_others = logsigmoid(-o).unsqueeze(-1) + log_rest
    token = f * logsigmoid(o) + (others * log_pi_others).sum(-1)
    return -label / mask.sum(-1) * (token * mask).sum(-1)


def bnf(logits: Tensor, ref_logits: Tensor, target: Tensor, mask: Tensor, label: Tensor) -> Tensor:
    """Eq. 4: the mean over responses."""
    return bnf_per_response(logits, ref_logits, target, mask, label).mean()


def sft(logits: Tensor, target: Tensor, mask: Tensor, label: Tensor) -> Tensor:
    """Eq. 2 over the preferred responses only, as the mean over their tokens."""
    kept = mask & (label > 0).unsqueeze(-1)
    return -(token_logp(logits, target) * kept).sum() / kept.sum()


def nll_pll(logits: Tensor, target: Tensor, mask: Tensor, label: Tensor) -> Tensor:
    """Eq. 1 in the form of eq. 4 with the one-hot target of eq. 5: length-normalised, mean over responses."""
    return (-label / mask.sum(-1) * (token_logp(logits, target) * mask).sum(-1)).mean()


def dpo(logits: Tensor, ref_logits: Tensor, target: Tensor, mask: Tensor, label: Tensor, beta: float) -> Tensor:
    """Table 2, row DPO: rows 0, 2, .. are preferred, rows 1, 3, .. their dispreferred; mean over pairs."""
    assert (label[0::2] > 0).all() and (label[1::2] < 0).all()
    rho = ((token_logp(logits, target) - token_logp(ref_logits, target)) * mask).sum(-1)
    return -logsigmoid(beta * (rho[0::2] - rho[1::2])).mean()


def appendix_b(logits: Tensor, ref_logits: Tensor, target: Tensor, mask: Tensor, label: Tensor) -> Tensor:
    """Appendix B as printed, after the four repairs it needs to mean eq. 4.

    1. the minus sign of eq. 4; 2. the shift by one token (here: logits come shifted); 3. the response mask;
    4. the mean over responses where the listing sums.  Its arithmetic is kept: NaN once p rounds to 1.
    """
    policy_logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)  # repair 2: already shifted
    response_logp = policy_logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    response_logp_ref = ref_logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    other_logp_sum = (policy_logp.exp().detach() * policy_logp).sum(-1) - response_logp.exp().detach() * response_logp
    responses_target = torch.clamp(response_logp.exp() / response_logp_ref.exp(), max=1).detach()
    others_target = (1 - responses_target) / (1 - response_logp.exp().detach())
    loss = (responses_target * response_logp + others_target * other_logp_sum) * mask  # repair 3
    return -(loss.sum(-1) * label / mask.sum(-1)).mean()  # repairs 1 and 4
