"""Attention over packed sequences, in any transformers model that takes its attention from the registry.

A packed micro-batch is one row of T tokens without padding, and norms, projections and MLPs run on just these.  Inside
attention alone the tokens stand in S rows of L places, one sequence a row, and a plain causal mask keeps documents
apart: padding lies behind a sequence, where no token of it looks.  A prompt that two responses share is computed once
and stands in both their rows, so attention costs what it costs for separate sequences, and everything else costs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "bnfctl_rows"
"""What this implementation is called in transformers' registry of attention functions."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Where T packed tokens stand in S rows of L places."""

    source: Tensor
    """[S * L] the token in each place (token 0 where there is padding)."""
    home: Tensor
    """[T] the place of each token, its first where it has two."""
    again: Tensor
    """[D] the tokens of shared prompts, for every further place they have, and"""
    again_place: Tensor
    """[D] that place."""
    shape: tuple[int, int]
    """(S, L)"""

    def to(self, device: torch.device) -> Rows:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Rows(**moved, shape=self.shape)


def rows_of(sequences: Sequence[Sequence[int]], total: int) -> Rows:
    """The rows of sequences of token indices 0..total-1, each in order; every token is in at least one."""
    width = max(map(len, sequences))
    source = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, indices in enumerate(sequences):
        source[row, : len(indices)] = torch.as_tensor(indices)
    lengths = torch.tensor([len(indices) for indices in sequences])
    places = (torch.arange(width) < lengths[:, None]).flatten().nonzero().squeeze(-1)
    tokens = source.flatten()[places]
    # The first place of each token: written last to first, so the first one stays.
    home = torch.empty(total, dtype=torch.int64)
    for row in range(len(sequences) - 1, -1, -1):
        here = slice(int(lengths[:row].sum()), int(lengths[: row + 1].sum()))
        home[tokens[here]] = places[here]
    further = home[tokens] != places
    return Rows(source.flatten(), home, tokens[further], places[further], (len(sequences), width))


class _Spread(torch.autograd.Function):
    """[T, F] tokens -> [S * L, F] places.  Its gradient is gathered, not scattered: each token has few places."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return tokens.index_select(0, rows.source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows: Rows = ctx.rows
        gathered = grads[0].index_select(0, rows.home)
        if rows.again.numel():
            gathered.index_add_(0, rows.again, grads[0].index_select(0, rows.again_place))
        return gathered, None


class _Collect(torch.autograd.Function):
    """[S * L, F] places -> [T, F] tokens, each from its home."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, rows: Rows) -> Tensor:
        ctx.rows, ctx.shape = rows, places.shape
        return places.index_select(0, rows.home)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].new_zeros(ctx.shape).index_copy_(0, ctx.rows.home, grads[0]), None


def rows_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
    sliding_window: int | None = None, bnfctl_rows: Rows | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls: query [1, h, T, d], key and value [1, h_kv, T, d] -> ([1, T, h, d], no weights).

    Raises ValueError where the model does not hand the rows on to its layers.
    """
    if bnfctl_rows is None:
        raise ValueError("the rows did not arrive: the model drops keyword arguments on the way to its attention")
    s, width = bnfctl_rows.shape

    def spread(states: Tensor) -> Tensor:
        flat = states[0].transpose(0, 1).flatten(1).to(value.dtype)  # rotary embeddings widen query and key
        return _Spread.apply(flat, bnfctl_rows).view(s, width, states.shape[1], -1).transpose(1, 2)

    rows_query, rows_key, rows_value = spread(query), spread(key), spread(value)
    groups = query.shape[1] // key.shape[1]
    window = sliding_window if sliding_window is not None and sliding_window < width else None
    mask = None if window is None and softcap is None else _mask(width, window, query.device)
    # Of torch's kernels only flash attention has grouped heads: on a GPU, in 16 bits, without a mask.
    native = query.is_cuda and mask is None and value.dtype != torch.float32
    if groups > 1 and not native:
        rows_key, rows_value = (x.repeat_interleave(groups, dim=1) for x in (rows_key, rows_value))
    if softcap is not None:
        assert mask is not None
        out = _capped(rows_query, rows_key, rows_value, mask, scaling, softcap)
    else:
        out = scaled_dot_product_attention(
            rows_query, rows_key, rows_value, attn_mask=mask, is_causal=mask is None, scale=scaling,
            enable_gqa=groups > 1 and native,
        )  # fmt: skip
    heads, size = out.shape[1], out.shape[3]
    places = out.transpose(1, 2).reshape(s * width, heads * size)
    return _Collect.apply(places, bnfctl_rows).view(1, -1, heads, size), None


def _mask(width: int, window: int | None, device: torch.device) -> Tensor:
    """[L, L] bool: what a place may look at: nothing behind it, and no further back than the window."""
    place = torch.arange(width, device=device)
    back = place[:, None] - place[None, :]
    return (back >= 0) & (back < (window or width))


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float
) -> Tensor:  # fmt: skip
    """Attention with Gemma-2's cap * tanh(score / cap), which torch's kernels do not have."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


def register() -> None:
    """Put it into transformers' registry; without a mask function of its own, a model makes no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, rows_attention)
