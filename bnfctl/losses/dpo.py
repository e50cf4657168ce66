"""Direct Preference Optimization (Rafailov et al. 2023, eq. 7; in Table 2 of arXiv 2410.04834)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, zeros_like
from torch.nn.functional import logsigmoid

from bnfctl.losses import TokenLogps


@dataclass(frozen=True)
class DPO:
    """-log sigmoid(beta (rho_w - rho_l)), rho = log pi(y) - log pi_ref(y) summed over the response.

    beta: strength of the pull to the reference; 0.1 is the authors' default.
    """

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = True
    needs_entropy: ClassVar[bool] = False
    separable: ClassVar[bool] = False
    labels: ClassVar[tuple[int, ...]] = (1, -1)

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta is a number above 0, not {self.beta}")

    def denominator(self, label: Tensor, length: Tensor, pair: Tensor) -> float:
        """The number of pairs."""
        return float(((label > 0) & (pair >= 0)).sum())

    def total(self, tokens: TokenLogps, stats: object = None) -> Tensor:
        return self._per_pair(tokens).sum()

    def coefficients(self, tokens: TokenLogps) -> Tensor:
        raise NotImplementedError("contrastive: a token's coefficient needs both whole responses")

    def value(self, tokens: TokenLogps, entropy: Tensor | None) -> Tensor:
        """[R] half the pair's loss on each side, so that the sum over responses is the sum over pairs."""
        half = self._per_pair(tokens).detach() / 2
        chosen, rejected = tokens.pairs()
        return zeros_like(tokens.label).index_add(0, chosen, half).index_add(0, rejected, half)

    def _per_pair(self, tokens: TokenLogps) -> Tensor:
        """[P]"""
        assert tokens.ref_log_odds is not None
        rho = tokens.sum_by_response(tokens.logp - logsigmoid(tokens.ref_log_odds))
        chosen, rejected = tokens.pairs()
        return -logsigmoid(self.beta * (rho[chosen] - rho[rejected]))
