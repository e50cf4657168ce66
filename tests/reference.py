"""Exact float64 twins of the losses over full logits, written from the paper (equation numbers below).

They work on log-odds, because the literal eq. 6 loses its digits as p -> 1 (off by 2e-3 at p = 1 - 1e-12);
`tests/losses/test_reference_twins.py` proves them against mpmath.

Shapes: logits [B, T, V] already shifted (logits[b, t] predicts target[b, t]), target [B, T], mask [B, T] bool
(the trained tokens; |y| = mask.sum(-1)), label [B] of +1 / -1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bnfctl.losses import Loss


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


def total(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of [B, T] over the trained tokens of each response: [B]."""
    return (values * mask).sum(-1)


def average(values: Tensor, mask: Tensor) -> Tensor:
    """The same over |y|: [B]."""
    return total(values, mask) / mask.sum(-1)


def log_ratio(logits: Tensor, ref_logits: Tensor, target: Tensor) -> Tensor:
    """log pi(y_i) - log pi_ref(y_i): [B, T]."""
    return token_logp(logits, target) - token_logp(ref_logits, target)


def sft(logits: Tensor, target: Tensor, mask: Tensor, label: Tensor, normalize: str = "token") -> Tensor:
    """Eq. 2 over the preferred responses only: the mean over their tokens, or over responses of the token mean."""
    kept = mask & (label > 0).unsqueeze(-1)
    if normalize == "response":
        return -average(token_logp(logits, target), mask)[label > 0].mean()
    return -(token_logp(logits, target) * kept).sum() / kept.sum()


def nll_pll(logits: Tensor, target: Tensor, mask: Tensor, label: Tensor, normalize: str = "response") -> Tensor:
    """Eq. 1 (normalize "none"), or eq. 4 with the one-hot target of eq. 5: length-normalised; mean over responses."""
    logp = token_logp(logits, target)
    return (-label * (average(logp, mask) if normalize == "response" else total(logp, mask))).mean()


def pairs(values: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Rows 0, 2, .. of [B] are preferred, rows 1, 3, .. their dispreferred: [B / 2] each."""
    assert (label[0::2] > 0).all() and (label[1::2] < 0).all()
    return values[0::2], values[1::2]


def dpo(logits: Tensor, ref_logits: Tensor, target: Tensor, mask: Tensor, label: Tensor, beta: float) -> Tensor:
    """Table 2, row DPO (Rafailov et al. 2023, eq. 7); mean over pairs, as in all twins below but KTO's."""
    won, lost = pairs(total(log_ratio(logits, ref_logits, target), mask), label)
    return -logsigmoid(beta * (won - lost)).mean()


def r_dpo(
    logits: Tensor, ref_logits: Tensor, target: Tensor, mask: Tensor, label: Tensor, beta: float, alpha: float
) -> Tensor:
    """DPO's argument plus alpha (|y_w| - |y_l|) (arXiv 2403.19159)."""
    won, lost = pairs(total(log_ratio(logits, ref_logits, target), mask), label)
    length_w, length_l = pairs(mask.sum(-1).to(logits.dtype), label)
    return -logsigmoid(beta * (won - lost) + alpha * (length_w - length_l)).mean()


def ipo(
    logits: Tensor, ref_logits: Tensor, target: Tensor, mask: Tensor, label: Tensor, tau: float, normalize: str
) -> Tensor:
    """Table 2, row IPO (Azar et al. 2023, eq. 17) over log ratios averaged per token, or summed."""
    per_token = log_ratio(logits, ref_logits, target)
    won, lost = pairs(average(per_token, mask) if normalize == "token" else total(per_token, mask), label)
    return ((won - lost - 1 / (2 * tau)) ** 2).mean()


def slic_hf(logits: Tensor, target: Tensor, mask: Tensor, label: Tensor, delta: float, lambda_: float) -> Tensor:
    """Table 2, row SLiC-HF, with its NLL term (Zhao et al. 2023, eq. 4); sums over tokens."""
    won, lost = pairs(total(token_logp(logits, target), mask), label)
    return (torch.clamp(delta - won + lost, min=0) - lambda_ * won).mean()


def simpo(logits: Tensor, target: Tensor, mask: Tensor, label: Tensor, beta: float, gamma: float) -> Tensor:
    """Table 2, row SimPO (Meng et al. 2024, eq. 6)."""
    won, lost = pairs(average(token_logp(logits, target), mask), label)
    return -logsigmoid(beta * won - beta * lost - gamma).mean()


def orpo(logits: Tensor, target: Tensor, mask: Tensor, label: Tensor, lambda_: float) -> Tensor:
    """Hong et al. 2024, eq. 6 and 7: P(y) = exp(mean log pi(y_i)), odds = P / (1 - P)."""
    log_p = average(token_logp(logits, target), mask)
    odds_w, odds_l = pairs(log_p - torch.log(-torch.expm1(log_p)), label)
    return (-log_p[0::2] - lambda_ * logsigmoid(odds_w - odds_l)).mean()


def kto(
    logits: Tensor, ref_logits: Tensor, target: Tensor, mask: Tensor, label: Tensor, beta: float,
    desirable_weight: float, undesirable_weight: float, kl: float,
) -> Tensor:  # fmt: skip
    """Ethayarajh et al. 2024, eq. 7: mean over responses of lambda_y - v(x, y), with kl for z0."""
    rho = total(log_ratio(logits, ref_logits, target), mask)
    desirable = desirable_weight - desirable_weight * torch.sigmoid(beta * (rho - kl))
    undesirable = undesirable_weight - undesirable_weight * torch.sigmoid(beta * (kl - rho))
    return torch.where(label > 0, desirable, undesirable).mean()


def kto_reference_point(logits: Tensor, ref_logits: Tensor, target: Tensor, mask: Tensor) -> float:
    """z0 of the same paper (section 4.1), from the logits of responses [B] after prompts of other records."""
    return max(0.0, float(total(log_ratio(logits, ref_logits, target), mask).mean()))


TWINS: dict[str, Callable[..., Tensor]] = {
    "BNF": bnf, "SFT": sft, "NLLPLL": nll_pll, "DPO": dpo, "RDPO": r_dpo, "IPO": ipo, "SLiCHF": slic_hf,
    "SimPO": simpo, "ORPO": orpo, "KTO": kto,
}  # fmt: skip
"""By class of the loss; a twin's keywords are the loss's hyper-parameters."""


def objective(loss: Loss, logits: Tensor, ref_logits: Tensor, kl: float | None = None, **batch: Tensor) -> Tensor:
    """The exact objective of any loss; batch: target, mask, label."""
    given: dict[str, Any] = {**batch, **vars(loss)}
    if loss.needs_reference:
        given["ref_logits"] = ref_logits
    if loss.needs_kl:
        assert kl is not None, "the reference point of the whole step"
        given["kl"] = kl
    return TWINS[type(loss).__name__](logits, **given)


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


def shifts(logits: Tensor, ref_logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Per-token shifts [..., T] between two models' logits [..., T, V] (paper, section 5.3; its figures give no formula).

    ll: log-likelihood; z: logit of the target; lse: log-sum-exp; z3: mean absolute difference of logits over the
    vocabulary; z4: the same after their mean difference is taken off.
    """
    index = target.unsqueeze(-1)
    difference = logits - ref_logits
    return {
        "ll": token_logp(logits, target) - token_logp(ref_logits, target),
        "z": difference.gather(-1, index).squeeze(-1),
        "lse": logits.logsumexp(-1) - ref_logits.logsumexp(-1),
        "z3": difference.abs().mean(-1),
        "z4": (difference - difference.mean(-1, keepdim=True)).abs().mean(-1),
    }


def gini(values: Tensor) -> Tensor:
    """Gini's coefficient of [n] non-negative numbers by its definition: mean |a - b| / (2 mean a)."""
    return (values[:, None] - values[None, :]).abs().mean() / (2 * values.mean())
