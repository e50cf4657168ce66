"""Bidirectional Negative Feedback (arXiv 2410.04834, eq. 4 and 6), as a weighted NLL.

Eq. 6 put into eq. 8 gives the logit gradient p - f on the label and pi_j (f - p) / (1 - p) elsewhere: exactly
-c d log p, with c = (f - p) / (1 - p) = min(1, odds of the policy / odds of the reference).  So the gradient is
that of -(label / |y|) sum_i c_i log p_i with c held fixed, and no [T, V] tensor is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, expm1
from torch.nn.functional import logsigmoid

from bnfctl.losses import TokenLogps


@dataclass(frozen=True)
class BNF:
    """Eq. 4: the mean over labelled responses of a length-normalised cross-entropy.  No hyper-parameters."""

    needs_reference: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = False
    needs_entropy: ClassVar[bool] = True
    separable: ClassVar[bool] = True
    labels: ClassVar[tuple[int, ...]] = (1, -1)

    def denominator(self, label: Tensor, length: Tensor, pair: Tensor) -> float:
        """The number of responses (the expectation of eq. 4)."""
        return float(label.numel())

    def total(self, tokens: TokenLogps, stats: object = None) -> Tensor:
        """-sum (label / |y|) c log p: its gradient is eq. 8; its value is not eq. 4 (see `value`)."""
        return (self.coefficients(tokens) * tokens.logp).sum()

    def coefficients(self, tokens: TokenLogps) -> Tensor:
        """[N] -(label / |y|) c, with c = exp(min(0, o - o_ref)): in [0, 1] and finite whatever the log-odds."""
        assert tokens.ref_log_odds is not None
        c = (tokens.log_odds - tokens.ref_log_odds).clamp(max=0.0).exp()
        return -(tokens.label / tokens.length)[tokens.segment] * c

    def value(self, tokens: TokenLogps, entropy: Tensor | None) -> Tensor:
        """[R] eq. 4: -(label / |y|) sum_i [f log p + (1 - f) (log(1 - p) - H)].

        sum_j!=y pi_j / (1 - p) log pi_j = log(1 - p) - H, with H the entropy of pi renormalised without y.
        """
        assert tokens.ref_log_odds is not None and entropy is not None
        log_p = logsigmoid(tokens.log_odds)
        log_f = (log_p - logsigmoid(tokens.ref_log_odds)).clamp(max=0.0)
        others = logsigmoid(-tokens.log_odds) - entropy
        per_token = log_f.exp() * log_p - expm1(log_f) * others
        return -tokens.label / tokens.length * tokens.sum_by_response(per_token)
