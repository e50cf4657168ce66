"""Attention where the responses of a prompt read its keys and values, and the prompt attends to itself once.

`model.attention` puts a shared prompt into the row of each of its responses, which is right for training and where a
kernel without a mask is fast.  On a CPU, scoring spends half of a narrow model's time there; this saves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "bnfctl_prompts"
"""What this implementation is called in transformers' registry of attention functions."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Where packed tokens stand: P prompts in rows of A places, S responses in rows of B, padded behind."""

    prompt: Tensor
    """[P, A] token in each place (token 0 where there is padding)."""
    prompt_real: Tensor
    """[P, A] bool: no padding."""
    response: Tensor
    """[S, B]"""
    response_real: Tensor
    """[S, B] bool."""
    read: Tensor
    """[S, A + B] the tokens that a response reads: its prompt, and itself."""
    mask: Tensor
    """[S, 1, B, A + B] bool: which of them each place may look at."""


def prompts_of(prompts: Sequence[range], responses: Sequence[range]) -> Prompts:
    """prompts: [S] the tokens of each response's prompt; equal neighbours share one row."""
    unique = list(dict.fromkeys(prompts))
    rows = torch.tensor([unique.index(prompt) for prompt in prompts])
    prompt, prompt_real = _padded(unique)
    response, response_real = _padded(responses)
    size, width = response.shape
    causal = torch.ones(width, width, dtype=torch.bool).tril().expand(size, width, width)
    seen = prompt_real[rows][:, None].expand(size, width, prompt.shape[1])
    return Prompts(
        prompt, prompt_real, response, response_real,
        read=torch.cat([prompt[rows], response], dim=1), mask=torch.cat([seen, causal], dim=2)[:, None],
    )  # fmt: skip


def _padded(ranges: Sequence[range]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(part) for part in ranges])
    starts = torch.tensor([part.start for part in ranges])
    place = torch.arange(int(lengths.max()))
    real = place < lengths[:, None]
    return (starts[:, None] + place) * real, real


def prompts_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, bnfctl_prompts: Prompts | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls: query [1, h, T, d], key and value [1, h_kv, T, d] -> ([1, T, h, d], no matrix).

    Raises ValueError where the model does not hand the places on to its layers.
    """
    if bnfctl_prompts is None:
        raise ValueError("the places did not arrive: the model drops keyword arguments on the way to its attention")
    places = bnfctl_prompts
    groups = query.shape[1] // key.shape[1]
    out = torch.empty_like(query[0].transpose(0, 1))

    def spread(states: Tensor, tokens: Tensor, repeat: int = 1) -> Tensor:
        return states[0].to(value.dtype)[:, tokens].transpose(0, 1).repeat_interleave(repeat, dim=1)

    def attend(tokens: Tensor, real: Tensor, read: Tensor, mask: Tensor | None) -> None:
        keys, values = (spread(states, read, groups) for states in (key, value))
        found = scaled_dot_product_attention(
            spread(query, tokens), keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        out[tokens[real]] = found.transpose(1, 2)[real].to(out.dtype)

    attend(places.prompt, places.prompt_real, places.prompt, None)
    attend(places.response, places.response_real, places.read, places.mask)
    return out[None], None


def register() -> None:
    """Put it into transformers' registry; without a mask function of its own, a model makes no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, prompts_attention)
