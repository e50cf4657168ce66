"""What a loss is: a sum over response tokens, its denominator, and a value to report.

The loop divides `total` once, by the denominator of the whole optimizer step, so a gradient does not depend
on how the step was split.  One file per family; `bnfctl.tables.LOSSES` names them.  `bnf` and `log_odds` are BNF
as pure functions, for a trainer of your own.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from bnfctl import tables
from bnfctl.errors import UsageError, nearest

if TYPE_CHECKING:  # so that the types can be imported where torch must not be
    from torch import Tensor

    from bnfctl.losses.bidirectional import bnf as bnf
    from bnfctl.losses.bidirectional import log_odds as log_odds

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class TokenLogps:
    """N trained tokens of R responses, packed one response after the other.

    The fields are float32 on the policy's device, except segment and pair (int64).
    """

    logp: Tensor
    """[N] log pi(y_i), nats: what `total` is differentiated by."""
    log_odds: Tensor
    """[N] log p / (1 - p) of the policy, detached."""
    ref_log_odds: Tensor | None
    """[N] the same under the reference, where the loss or the metrics need it."""
    segment: Tensor
    """[N] index 0..R-1 of the response a token belongs to."""
    label: Tensor
    """[R] +1 chosen, -1 rejected."""
    length: Tensor
    """[R] number of trained tokens, |y|."""
    pair: Tensor
    """[R] the same number >= 0 for the two sides of a pair; -1 for a response without a partner."""

    def sum_by_response(self, values: Tensor) -> Tensor:
        """Sum of per-token values [N] within each response: [R]."""
        return values.new_zeros(self.label.shape[0]).index_add(0, self.segment, values)

    def mean_by_response(self, values: Tensor) -> Tensor:
        """The same over |y|: [R]."""
        return self.sum_by_response(values) / self.length

    def log_ratio(self) -> Tensor:
        """[N] log pi(y_i) - log pi_ref(y_i), differentiable by `logp`."""
        from torch.nn.functional import logsigmoid

        assert self.ref_log_odds is not None
        return self.logp - logsigmoid(self.ref_log_odds)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Indices into the responses, [P] chosen and [P] rejected, row by row of the same pair."""
        sides = []
        for sign in (1, -1):
            found = ((self.label * sign > 0) & (self.pair >= 0)).nonzero().squeeze(-1)
            sides.append(found[self.pair[found].argsort(stable=True)])
        return sides[0], sides[1]


@dataclass(frozen=True)
class Stats:
    """What a loss has to know about the whole optimizer step before the first gradient."""

    kl: float
    """KTO's reference point z0 in nats, clamped at 0: the mean of log pi(y) - log pi_ref(y) over mismatched pairs."""


class Loss(Protocol):
    """A frozen dataclass of its own hyper-parameters."""

    needs_reference: ClassVar[bool]
    """Reads `ref_log_odds`."""
    needs_pairs: ClassVar[bool]
    """Contrastive: every record must have both sides."""
    needs_entropy: ClassVar[bool]
    """`value` reads `entropy`."""
    needs_kl: ClassVar[bool]
    """Reads `stats.kl`: the loop makes a pass over the step first."""
    separable: ClassVar[bool]
    """Has `coefficients`: a token's gradient needs only its own log-odds and its response's label and length."""
    labels: ClassVar[tuple[int, ...]]
    """The labels that it trains on; the loop does not run the model on others."""

    def denominator(self, label: Tensor, length: Tensor, pair: Tensor) -> float:
        """What the step's total is divided by, from the data alone ([R] each); 0 cannot be trained on."""

    def total(self, tokens: TokenLogps, stats: Stats | None = None) -> Tensor:
        """A sum (never a mean) whose derivative by `tokens.logp` is the gradient; stats: given where `needs_kl`."""

    def coefficients(self, tokens: TokenLogps) -> Tensor:
        """[N] d total / d logp in closed form; separable losses only."""

    def value(self, tokens: TokenLogps, entropy: Tensor | None, stats: Stats | None = None) -> Tensor:
        """[R] the objective to report: its sum over a step, divided by the denominator, is the step's objective.

        entropy: [N] in nats, of pi renormalised without the label token; given where `needs_entropy`.
        """


class Contrastive:
    """What the losses of pairs share: `per_pair` is summed and divided by the number of pairs.

    A response without a partner (pair -1) counts for nothing.
    """

    needs_pairs: ClassVar[bool] = True
    needs_entropy: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False
    separable: ClassVar[bool] = False
    labels: ClassVar[tuple[int, ...]] = (1, -1)

    def per_pair(self, tokens: TokenLogps) -> Tensor:
        """[P] the loss of each pair, in the order of `tokens.pairs()`."""
        raise NotImplementedError

    def denominator(self, label: Tensor, length: Tensor, pair: Tensor) -> float:
        """The number of pairs."""
        return float(((label > 0) & (pair >= 0)).sum())

    def total(self, tokens: TokenLogps, stats: Stats | None = None) -> Tensor:
        return self.per_pair(tokens).sum()

    def coefficients(self, tokens: TokenLogps) -> Tensor:
        raise NotImplementedError("contrastive: a token's coefficient needs both whole responses")

    def value(self, tokens: TokenLogps, entropy: Tensor | None, stats: Stats | None = None) -> Tensor:
        """[R] half the pair's loss on each side, so that the sum over responses is the sum over pairs."""
        half = self.per_pair(tokens).detach() / 2
        chosen, rejected = tokens.pairs()
        return half.new_zeros(tokens.label.shape).index_add(0, chosen, half).index_add(0, rejected, half)


def check_number(name: str, value: float, *, zero: bool = False) -> None:
    """ValueError unless a hyper-parameter is a finite number above 0, or 0 where `zero` says so."""
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} is a finite number {'of at least' if zero else 'above'} 0, not {value}")


def make(name: str, args: tuple[str, ...] = ()) -> Loss:
    """The loss called `name` with `name=value` hyper-parameters.

    A parameter whose name is a Python keyword is typed without its underscore: lambda=0.1.  Raises UsageError for an
    unknown loss or parameter (with the nearest name) and for a bad value.
    """
    cls = tables.load(tables.LOSSES, name, "loss")
    hints = typing.get_type_hints(cls)
    fields = {field.name.rstrip("_"): field.name for field in dataclasses.fields(cls)}
    kinds = {typed: hints[name] for typed, name in fields.items()}
    values: dict[str, Any] = {}
    for arg in args:
        parameter, equals, text = (part.strip() for part in arg.partition("="))
        where = f"--loss-arg {arg}"
        if not equals:
            raise UsageError("a hyper-parameter of the loss is written name=value", where=where)
        if parameter not in kinds:
            known = f"{name} has {', '.join(kinds)}" if kinds else f"{name} has no hyper-parameters"
            what = f"the loss '{name}' has no parameter '{parameter}'{nearest(parameter, kinds)}"
            raise UsageError(what, where=where, hint=known)
        if parameter in values:
            raise UsageError(f"{parameter} is given twice", where=where)
        values[parameter] = _parse(kinds[parameter], parameter, text, where)
    try:
        return cls(**{fields[parameter]: value for parameter, value in values.items()})
    except ValueError as error:
        raise UsageError(str(error), where=f"--loss-arg of {name}") from None


def _parse(kind: type, parameter: str, text: str, where: str) -> Any:
    """One value by its declared type (bool, int, float or str)."""
    try:
        if kind is bool:
            return _WORDS[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        raise UsageError(f"{parameter} is of type {kind.__name__}, not '{text}'", where=where) from None


def __getattr__(name: str) -> Any:
    """`bnf` and `log_odds`, loaded at first use: importing this package must not import torch."""
    if name in ("bnf", "log_odds"):
        return getattr(import_module("bnfctl.losses.bidirectional"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
