"""Kahneman-Tversky Optimization: labelled responses against a reference point of the whole step, no pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bnfctl.losses import Stats, TokenLogps, check_number


@dataclass(frozen=True)
class KTO:
    """lambda_y - v(x, y): lambda_D (1 - s(beta (rho - z0))) if desirable, else lambda_U (1 - s(beta (z0 - rho))).

    Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7; s = sigmoid, rho = log pi(y) - log pi_ref(y) summed over the
    response, and the mean over responses.  z0 is `stats.kl`: max(0, mean rho of responses put after another
    record's prompt), detached, over the whole optimizer step, so that no split of the step changes it.  (TRL takes
    it over one micro-batch of all ranks.)

    beta: how soon the value saturates; 0.1 is the authors' default.  desirable_weight, undesirable_weight: lambda_D
    and lambda_U; with n_D and n_U responses of each kind the authors advise lambda_D n_D / (lambda_U n_U) from 1 to
    4/3.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    needs_reference: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = False
    needs_entropy: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = True
    separable: ClassVar[bool] = False
    labels: ClassVar[tuple[int, ...]] = (1, -1)

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            check_number(name, getattr(self, name))

    def denominator(self, label: Tensor, length: Tensor, pair: Tensor) -> float:
        """The number of responses."""
        return float(label.numel())

    def total(self, tokens: TokenLogps, stats: Stats | None = None) -> Tensor:
        """ValueError without `stats`."""
        return self._per_response(tokens, stats).sum()

    def coefficients(self, tokens: TokenLogps) -> Tensor:
        raise NotImplementedError("KTO: a token's coefficient needs the whole response and the reference point")

    def value(self, tokens: TokenLogps, entropy: Tensor | None, stats: Stats | None = None) -> Tensor:
        """[R] lambda_y - v; ValueError without `stats`."""
        return self._per_response(tokens, stats).detach()

    def _per_response(self, tokens: TokenLogps, stats: Stats | None) -> Tensor:
        """[R], with 1 - s(x) as s(-x): no digit is lost where s(x) is near 1."""
        if stats is None:
            raise ValueError("KTO needs the reference point of the whole step: pass stats=Stats(kl=..)")
        rho = tokens.sum_by_response(tokens.log_ratio())
        weight = (tokens.label > 0) * self.desirable_weight + (tokens.label < 0) * self.undesirable_weight
        return weight * (-tokens.label * self.beta * (rho - stats.kl)).sigmoid()
