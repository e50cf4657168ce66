"""One micro-batch under a loss: forward, and the gradient of its share of the step's total.

The loop divides by the step's denominator once, through `scale`, so the gradient does not depend on how a step was
split into micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bnfctl.data.records import Record, Side
from bnfctl.losses import Loss, Stats, TokenLogps
from bnfctl.model.policy import Policy
from bnfctl.training.batches import MicroBatch


@dataclass(frozen=True, eq=False)
class Forward:
    """What one micro-batch gave, everything detached."""

    tokens: TokenLogps
    entropy: Tensor | None
    coefficients: Tensor | None
    """[N] d total / d logp, where it was trained on."""


def forward(policy: Policy, batch: MicroBatch, ref_log_odds: Tensor | None, entropy: bool) -> Forward:
    """Without gradients; `batch` is on the policy's device."""
    with torch.no_grad():
        logp, log_odds, spread = policy.logps(batch.sequences, entropy)
    return Forward(_tokens(batch, logp, log_odds, ref_log_odds), spread, None)


def backward(
    policy: Policy, loss: Loss, batch: MicroBatch, ref_log_odds: Tensor | None, stats: Stats | None, scale: float,
    entropy: bool,
) -> Forward:  # fmt: skip
    """Adds the gradient of scale * total to the parameters' gradients."""
    if loss.separable:

        def coefficients(part: slice, log_odds: Tensor) -> Tensor:
            return loss.coefficients(_tokens(batch, logsigmoid(log_odds), log_odds, ref_log_odds, part)) * scale

        surrogate, logp, log_odds, spread = policy.one_pass(batch.sequences, coefficients, entropy)
        surrogate.backward()
        tokens = _tokens(batch, logp, log_odds, ref_log_odds)
        return Forward(tokens, spread, loss.coefficients(tokens))
    logp, log_odds, spread = policy.logps(batch.sequences, entropy)
    leaf = logp.detach().requires_grad_()
    (pull,) = torch.autograd.grad(loss.total(_tokens(batch, leaf, log_odds, ref_log_odds), stats), leaf)
    logp.backward(pull * scale)
    return Forward(_tokens(batch, leaf.detach(), log_odds, ref_log_odds), spread, pull)


def _tokens(
    batch: MicroBatch, logp: Tensor, log_odds: Tensor, ref_log_odds: Tensor | None, part: slice = slice(None)
) -> TokenLogps:
    """The trained tokens of a micro-batch, or `part` of them (logp and log_odds are that part's already)."""
    return TokenLogps(
        logp=logp,
        log_odds=log_odds,
        ref_log_odds=None if ref_log_odds is None else ref_log_odds[part],
        segment=batch.segment[part],
        label=batch.label,
        length=batch.length,
        pair=batch.pair,
    )


def partners(records: Sequence[Record], max_length: int) -> list[Record]:
    """Each prompt with responses to another one: what KTO's reference point is measured on.

    The partner of a record is the next one in the order of the data that has another prompt, whatever the batch, so
    reference log-odds of these pairs are the same for every seed, epoch and number of ranks.  A response is cut where
    the two together would pass `max_length`.  Empty where all records have the same prompt.
    """
    count = len(records)
    if all(record.prompt_ids == records[0].prompt_ids for record in records):
        return []
    found = []
    for i, record in enumerate(records):
        j = (i + 1) % count
        while records[j].prompt_ids == record.prompt_ids:
            j = (j + 1) % count
        found.append(_mismatched(record, records[j], max_length))
    return found


def _mismatched(record: Record, other: Record, max_length: int) -> Record:
    room = max(1, max_length - len(record.prompt_ids))
    sides = [other.sides[min(i, len(other.sides) - 1)] for i in range(len(record.sides))]
    kept = tuple(Side(own.label, side.ids[:room]) for own, side in zip(record.sides, sides, strict=True))
    return Record(f"{record.id} with {other.id}", record.prompt_ids, kept)


def kl_sum(policy: Policy, batches: Iterator[tuple[MicroBatch, Tensor | None]]) -> Tensor:
    """[] sum over mismatched responses of log pi - log pi_ref, without gradients (KTO, arXiv 2402.01306)."""
    total = torch.zeros((), dtype=torch.float64, device=policy.device)
    for batch, ref_log_odds in batches:
        total += forward(policy, batch, ref_log_odds, entropy=False).tokens.log_ratio().double().sum()
    return total
