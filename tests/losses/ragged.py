"""Ragged batches of labelled responses over a random head, in the shapes of the twins and of the losses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnfctl.losses import Loss, Stats, TokenLogps
from bnfctl.model.head import Head
from tests import reference

STATS = Stats(kl=0.3)
"""Of the whole step, whatever part of it is looked at."""


@dataclass(frozen=True, eq=False)
class Ragged:
    """B responses of up to T tokens, rows 0, 1 a pair, rows 2, 3 a pair, ..; masked positions hold junk."""

    hidden: Tensor
    """[B, T, H]"""
    matrix: Tensor
    """[V, H]"""
    ref_logits: Tensor
    """[B, T, V]"""
    target: Tensor
    mask: Tensor
    label: Tensor

    def logits(self) -> Tensor:
        return self.hidden @ self.matrix.T

    def rows(self, keep: list[int]) -> Ragged:
        """Some of the responses, in the given order."""
        cut = {name: getattr(self, name)[keep] for name in ("hidden", "ref_logits", "target", "mask", "label")}
        return replace(self, **cut)

    def to(self, dtype: torch.dtype) -> Ragged:
        cast = {name: getattr(self, name).to(dtype) for name in ("hidden", "matrix", "ref_logits", "label")}
        return replace(self, **cast)

    def leaves(self) -> Ragged:
        """The same batch with hidden and matrix as leaves that want gradients."""
        hidden, matrix = self.hidden.detach().requires_grad_(), self.matrix.detach().requires_grad_()
        return replace(self, hidden=hidden, matrix=matrix)


def ragged(
    pairs: int = 3, width: int = 7, vocabulary: int = 53, size: int = 16, scale: float = 1.0, seed: int = 0
) -> Ragged:
    """Logits of about `scale` * N(0, 2); every response has at least one token, one has all `width`."""
    draw = torch.Generator().manual_seed(seed)
    rows = 2 * pairs
    lengths = torch.randint(1, width + 1, (rows,), generator=draw)
    lengths[0] = width
    start = torch.randint(0, width, (rows,), generator=draw).minimum(width - lengths)
    place = torch.arange(width)
    return Ragged(
        hidden=torch.randn(rows, width, size, generator=draw) * scale,
        matrix=torch.randn(vocabulary, size, generator=draw) * (2 / size**0.5),
        ref_logits=torch.randn(rows, width, vocabulary, generator=draw) * 2 * scale,
        target=torch.randint(0, vocabulary, (rows, width), generator=draw),
        mask=(place >= start[:, None]) & (place < (start + lengths)[:, None]),
        label=torch.tensor([1.0, -1.0]).repeat(pairs),
    )


def tokens(batch: Ragged, entropy: bool = True) -> tuple[TokenLogps, Tensor | None]:
    """The batch through the head, as the loop does it: trained tokens only, packed."""
    result = Head(batch.matrix)(batch.hidden[batch.mask], batch.target[batch.mask], entropy=entropy)
    rows = torch.arange(len(batch.label))
    packed = TokenLogps(
        logp=result.logp,
        log_odds=result.log_odds,
        ref_log_odds=reference.split(batch.ref_logits, batch.target)[0][batch.mask].to(result.logp.dtype),
        segment=rows[:, None].expand_as(batch.mask)[batch.mask],
        label=batch.label.to(result.logp.dtype),
        length=batch.mask.sum(-1).to(result.logp.dtype),
        pair=rows // 2,
    )
    return packed, result.entropy


def gradients(loss: Loss, batch: Ragged, denominator: float | None = None) -> tuple[Tensor, Tensor]:
    """d objective / d hidden and / d matrix."""
    leaves = batch.leaves()
    packed, _ = tokens(leaves)
    if denominator is None:
        denominator = loss.denominator(packed.label, packed.length, packed.pair)
    (loss.total(packed, STATS) / denominator).backward()
    assert leaves.hidden.grad is not None and leaves.matrix.grad is not None
    return leaves.hidden.grad, leaves.matrix.grad


def objective(loss: Loss, batch: Ragged) -> Tensor:
    """The reported objective of the batch."""
    packed, entropy = tokens(batch)
    return loss.value(packed, entropy, STATS).sum() / loss.denominator(packed.label, packed.length, packed.pair)


def twin(loss: Loss, batch: Ragged) -> Tensor:
    """The exact objective of the batch, float64, differentiable."""
    exact = batch if batch.hidden.dtype == torch.float64 else batch.to(torch.float64)
    return reference.objective(
        loss, exact.logits(), exact.ref_logits, STATS.kl, target=exact.target, mask=exact.mask, label=exact.label
    )


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact tensor."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())
