"""Plain log-likelihood losses: SFT (NLL of the chosen response) and NLL + PLL (paper, eq. 1).

Paper: arXiv 2410.04834.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bnfctl.losses import Stats, TokenLogps


@dataclass(frozen=True)
class SFT:
    """NLL of the chosen responses; rejected ones are left out.

    normalize: "token" is the mean over the step's chosen tokens, as supervised fine-tuning is usually done (a
    long response counts for more); "response" gives each response the same say, as eq. 4 does.
    """

    normalize: str = "token"
    needs_reference: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = False
    needs_entropy: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False
    separable: ClassVar[bool] = True
    labels: ClassVar[tuple[int, ...]] = (1,)

    def __post_init__(self) -> None:
        if self.normalize not in ("token", "response"):
            raise ValueError(f"normalize is token or response, not '{self.normalize}'")

    def denominator(self, label: Tensor, length: Tensor, pair: Tensor) -> float:
        """The number of chosen tokens, or of chosen responses."""
        chosen = label > 0
        return float(length[chosen].sum() if self.normalize == "token" else chosen.sum())

    def total(self, tokens: TokenLogps, stats: Stats | None = None) -> Tensor:
        return (self.coefficients(tokens) * tokens.logp).sum()

    def coefficients(self, tokens: TokenLogps) -> Tensor:
        """[N] -1 (or -1 / |y|) on chosen tokens, 0 on rejected ones."""
        return -self._share(tokens)[tokens.segment]

    def value(self, tokens: TokenLogps, entropy: Tensor | None, stats: Stats | None = None) -> Tensor:
        """[R] NLL (per token under "response"); 0 for a rejected response."""
        return -self._share(tokens) * tokens.sum_by_response(tokens.logp.detach())

    def _share(self, tokens: TokenLogps) -> Tensor:
        chosen = (tokens.label > 0).to(tokens.logp.dtype)
        return chosen if self.normalize == "token" else chosen / tokens.length


@dataclass(frozen=True)
class NLLPLL:
    """Eq. 1: NLL on chosen, its negative on rejected responses; without bound, it collapses (paper, 2.1).

    normalize: eq. 1 sums over a response, but the paper says (below eq. 4) that eq. 4 with the one-hot target of
    eq. 5 is this loss, and eq. 4 divides by |y|.  "response" (default) is that form, so that BNF and this
    baseline differ in the coefficient alone; "none" is eq. 1 to the letter.  Both average over responses.
    """

    normalize: str = "response"
    needs_reference: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = False
    needs_entropy: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False
    separable: ClassVar[bool] = True
    labels: ClassVar[tuple[int, ...]] = (1, -1)

    def __post_init__(self) -> None:
        if self.normalize not in ("response", "none"):
            raise ValueError(f"normalize is response or none, not '{self.normalize}'")

    def denominator(self, label: Tensor, length: Tensor, pair: Tensor) -> float:
        """The number of responses, as for BNF."""
        return float(label.numel())

    def total(self, tokens: TokenLogps, stats: Stats | None = None) -> Tensor:
        return (self.coefficients(tokens) * tokens.logp).sum()

    def coefficients(self, tokens: TokenLogps) -> Tensor:
        """[N] -label / |y|, or -label."""
        return -self._share(tokens)[tokens.segment]

    def value(self, tokens: TokenLogps, entropy: Tensor | None, stats: Stats | None = None) -> Tensor:
        """[R] -(label / |y|) log pi(y), or -label log pi(y)."""
        return -self._share(tokens) * tokens.sum_by_response(tokens.logp.detach())

    def _share(self, tokens: TokenLogps) -> Tensor:
        return tokens.label / tokens.length if self.normalize == "response" else tokens.label
