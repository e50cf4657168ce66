"""What a loss is: a sum over response tokens, its denominator, and a value to report.

The loop divides `total` once, by the denominator of the whole optimizer step, so a gradient does not depend
on how the step was split.  One file per family; `bnfctl.tables.LOSSES` names them.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from bnfctl import tables
from bnfctl.errors import UsageError, nearest

if TYPE_CHECKING:  # so that the types can be imported where torch must not be
    from torch import Tensor

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

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Indices into the responses, [P] chosen and [P] rejected, row by row of the same pair."""
        sides = []
        for sign in (1, -1):
            found = ((self.label * sign > 0) & (self.pair >= 0)).nonzero().squeeze(-1)
            sides.append(found[self.pair[found].argsort(stable=True)])
        return sides[0], sides[1]


class Loss(Protocol):
    """A frozen dataclass of its own hyper-parameters."""

    needs_reference: ClassVar[bool]
    """Reads `ref_log_odds`."""
    needs_pairs: ClassVar[bool]
    """Contrastive: every record must have both sides."""
    needs_entropy: ClassVar[bool]
    """`value` reads `entropy`."""
    separable: ClassVar[bool]
    """Has `coefficients`: a token's gradient needs only its own log-odds and its response's label and length."""
    labels: ClassVar[tuple[int, ...]]
    """The labels that it trains on; the loop does not run the model on others."""

    def denominator(self, label: Tensor, length: Tensor, pair: Tensor) -> float:
        """What the step's total is divided by, from the data alone ([R] each); 0 cannot be trained on."""

    def total(self, tokens: TokenLogps, stats: Any = None) -> Tensor:
        """A sum (never a mean) whose derivative by `tokens.logp` is the gradient.

        stats: what a loss needs to know about the whole step first; no loss here does yet.
        """

    def coefficients(self, tokens: TokenLogps) -> Tensor:
        """[N] d total / d logp in closed form; separable losses only."""

    def value(self, tokens: TokenLogps, entropy: Tensor | None) -> Tensor:
        """[R] the objective to report: its sum over a step, divided by the denominator, is the step's objective.

        entropy: [N] in nats, of pi renormalised without the label token; given where `needs_entropy`.
        """


def make(name: str, args: tuple[str, ...] = ()) -> Loss:
    """The loss called `name` with `name=value` hyper-parameters.

    Raises UsageError for an unknown loss or parameter (with the nearest name) and for a bad value.
    """
    cls = tables.load(tables.LOSSES, name, "loss")
    hints = typing.get_type_hints(cls)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
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
        return cls(**values)
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
