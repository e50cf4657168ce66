"""Losses of pairs over log ratios to the reference: DPO, R-DPO and IPO.

rho(y) = log pi(y) - log pi_ref(y), summed over the response; w is the chosen response of a pair, l the rejected one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from bnfctl.losses import Contrastive, TokenLogps, check_number


@dataclass(frozen=True)
class DPO(Contrastive):
    """Direct Preference Optimization: -log sigmoid(beta (rho_w - rho_l)).

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7; Table 2 of arXiv 2410.04834.

    beta: strength of the pull to the reference; 0.1 is the authors' default.
    """

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("beta", self.beta)

    def per_pair(self, tokens: TokenLogps) -> Tensor:
        return -logsigmoid(self.beta * _gap(tokens, tokens.sum_by_response(tokens.log_ratio())))


@dataclass(frozen=True)
class RDPO(Contrastive):
    """Length-regularised DPO: -log sigmoid(beta (rho_w - rho_l) + alpha (|y_w| - |y_l|)).

    Park et al. 2024, arXiv 2403.19159 (R-DPO; not the robust DPO of arXiv 2403.00409).

    The sign: the best policy for the length-penalised reward r - alpha |y| is pi_ref exp((r - alpha |y|) / beta) / Z,
    so r = beta rho + alpha |y| + beta log Z, and the pair's reward difference, Bradley and Terry's argument, is
    beta (rho_w - rho_l) + alpha (|y_w| - |y_l|).  A longer winner has the larger argument, hence the smaller push:
    part of its preference is put down to its length.

    beta: as for DPO.  alpha: reward per token that length explains; 0 is DPO.  The usual search is over 0.05 to 1
    (SimPO's baselines); the default is its lower end, since a difference of 100 tokens is then 5 nats already.
    """

    beta: float = 0.1
    alpha: float = 0.05
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("beta", self.beta)
        check_number("alpha", self.alpha, zero=True)

    def per_pair(self, tokens: TokenLogps) -> Tensor:
        rewards = self.beta * tokens.sum_by_response(tokens.log_ratio()) + self.alpha * tokens.length
        return -logsigmoid(_gap(tokens, rewards))


@dataclass(frozen=True)
class IPO(Contrastive):
    """Identity Preference Optimization: (h_w - h_l - 1 / (2 tau))^2, h = rho / |y|.

    Azar et al. 2023, arXiv 2310.12036, eq. 17; Table 2 of arXiv 2410.04834.

    tau: strength of the pull to the reference; the gap aims at 1 / (2 tau).  0.1 is the usual default.
    normalize: "token" averages rho over the response's tokens, as the authors confirmed their results do (noted in
    TRL's source); "none" sums, as the equation reads, and grows with the square of the length.
    """

    tau: float = 0.1
    normalize: str = "token"
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("tau", self.tau)
        if self.normalize not in ("token", "none"):
            raise ValueError(f"normalize is token or none, not '{self.normalize}'")

    def per_pair(self, tokens: TokenLogps) -> Tensor:
        by_response = tokens.mean_by_response if self.normalize == "token" else tokens.sum_by_response
        return (_gap(tokens, by_response(tokens.log_ratio())) - 1 / (2 * self.tau)) ** 2


def _gap(tokens: TokenLogps, values: Tensor) -> Tensor:
    """[P] chosen minus rejected, of one value per response [R]."""
    chosen, rejected = tokens.pairs()
    return values[chosen] - values[rejected]
