"""Losses of pairs that need no reference: SLiC-HF, SimPO and ORPO.

P = log pi(y) summed over the response, A = P / |y|; w is the chosen response of a pair, l the rejected one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, expm1
from torch.nn.functional import logsigmoid

from bnfctl.losses import Contrastive, TokenLogps, check_number


@dataclass(frozen=True)
class SLiCHF(Contrastive):
    """Sequence Likelihood Calibration: max(0, delta - P_w + P_l) - lambda P_w, over sums as written.

    Zhao et al. 2023, arXiv 2305.10425, eq. 4, with the chosen response as the target of its NLL term; Table 2 of
    arXiv 2410.04834 has the first term alone (lambda = 0).  Nothing is divided by a length, so a long rejected
    response already satisfies the margin: only the NLL term is left of such a pair.

    delta: the margin in nats; 1 is the authors'.  lambda: strength of the NLL term; the usual search is over 0.1 to
    10 (SimPO's baselines), and 0.1 is its lower end.
    """

    delta: float = 1.0
    lambda_: float = 0.1
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("delta", self.delta, zero=True)
        check_number("lambda", self.lambda_, zero=True)

    def per_pair(self, tokens: TokenLogps) -> Tensor:
        chosen, rejected = _sides(tokens, tokens.sum_by_response(tokens.logp))
        return (self.delta - chosen + rejected).clamp(min=0.0) - self.lambda_ * chosen


@dataclass(frozen=True)
class SimPO(Contrastive):
    """Simple Preference Optimization: -log sigmoid(beta (A_w - A_l) - gamma).

    Meng et al. 2024, arXiv 2405.14734, eq. 6; Table 2 of arXiv 2410.04834.

    beta: scale of the average log-probabilities.  gamma: the margin of the equation, in the units of beta A; the
    authors' code and tables state the ratio gamma / beta instead.  The defaults are theirs for
    Llama-3-8B-Instruct (ratio 0.55).
    """

    beta: float = 2.5
    gamma: float = 1.375
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("beta", self.beta)
        check_number("gamma", self.gamma, zero=True)

    def per_pair(self, tokens: TokenLogps) -> Tensor:
        chosen, rejected = _sides(tokens, tokens.mean_by_response(tokens.logp))
        return -logsigmoid(self.beta * (chosen - rejected) - self.gamma)


@dataclass(frozen=True)
class ORPO(Contrastive):
    """Odds Ratio Preference Optimization: -A_w - lambda log sigmoid(log odds_w - log odds_l).

    Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7; odds = P / (1 - P) of P = exp(A), so
    log odds = A - log(1 - exp A).  The NLL is the mean over the pair's chosen tokens, as the paper's eq. 2 says.

    lambda: strength of the odds ratio; 0.1 is the authors' default.
    """

    lambda_: float = 0.1
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("lambda", self.lambda_)

    def per_pair(self, tokens: TokenLogps) -> Tensor:
        chosen, rejected = _sides(tokens, tokens.mean_by_response(tokens.logp))
        return -chosen - self.lambda_ * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _sides(tokens: TokenLogps, values: Tensor) -> tuple[Tensor, Tensor]:
    """[P] of the chosen and [P] of the rejected responses, from one value per response [R]."""
    chosen, rejected = tokens.pairs()
    return values[chosen], values[rejected]


def _log_odds(mean_logp: Tensor) -> Tensor:
    """A - log(1 - exp A), finite with a finite slope for every A <= 0.

    expm1 keeps the digits of 1 - exp A as A -> 0, where the slope is 1 / |A|; times d A / d logits, of the order of
    A, it is of order 1.  Beyond A = -1e-30 (all tokens at log-odds of 69 or more) that product has no float32 left:
    the slope there is 0.
    """
    held = mean_logp.clamp(max=-1e-30)
    return held - (-expm1(held)).log()
