"""A policy: a transformers model taken apart into body and head, and the one way to compute with it.

Dropout is off and there is no KV cache: a policy in training and its reference go through the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bnfctl.errors import UsageError
from bnfctl.model.attention import NAME as ROWS_ATTENTION
from bnfctl.model.attention import Rows, rows_of
from bnfctl.model.head import Coefficients, Head, HeadResult

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Sequences:
    """The input of one forward: B rows of L tokens, and the N places whose next token is trained.

    Packed: B = 1, no padding, `position_ids` restart with every document, `rows` (or the attention implementation)
    keep documents apart.  Padded: a sequence a row, `attention_mask` [B, L] is 1 for a token.
    """

    input_ids: Tensor
    """[B, L]"""
    position_ids: Tensor
    """[B, L]"""
    attention_mask: Tensor | None
    rows: Rows | None
    predictor: Tensor
    """[N] index into the flattened [B * L] positions: the one that predicts the token."""
    target: Tensor
    """[N] the trained token ids."""


class Policy(nn.Module):
    """A causal language model with float32 parameters, in eval mode on its device."""

    def __init__(self, model: Any, compute_dtype: torch.dtype) -> None:
        """Raises UsageError for a model without separate body and head."""
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype
        if model.get_output_embeddings() is None or self.body is None or self.body is model:
            raise UsageError(f"{type(model).__name__} has no separate body and head, so it cannot be trained here")

    @property
    def body(self) -> Any:
        """The module that gives final hidden states."""
        return self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model.base_model

    @property
    def head(self) -> Head:
        """The head, with the output layer's parameters as they are now: whole inside `forward` only."""
        output = self.model.get_output_embeddings()
        softcap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return Head(output.weight, getattr(output, "bias", None), softcap)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def attention(self) -> str:
        """The attention implementation in use."""
        return str(self.model.config.get_text_config()._attn_implementation)

    @property
    def attends_rows(self) -> bool:
        """Whether packed sequences need `Sequences.rows`; the other implementations that pack read position ids."""
        return self.attention == ROWS_ATTENTION

    def forward(self, work: Callable[[Policy], R]) -> R:
        """work(self), with whole parameters: FSDP2's hooks are around this call.  Returns tensors, in a tuple."""
        return work(self)

    def autocast(self) -> Any:
        """bfloat16 products over float32 masters, where that is the compute type.

        Each matrix is used once in a forward, so keeping its narrow copy until the end would only cost memory.
        """
        mixed = self.compute_dtype != torch.float32
        kind = self.compute_dtype if mixed else torch.bfloat16
        return torch.autocast(self.device.type, dtype=kind, enabled=mixed, cache_enabled=False)

    def hidden(self, sequences: Sequences) -> Tensor:
        """[N, H] final hidden states in the compute type, at the places whose next token is trained."""
        more: dict[str, Any] = {"bnfctl_rows": sequences.rows} if sequences.rows is not None else {}
        with self.autocast():
            states = self.body(
                input_ids=sequences.input_ids, position_ids=sequences.position_ids,
                attention_mask=sequences.attention_mask, use_cache=False, **more,
            ).last_hidden_state  # fmt: skip
        return states.flatten(0, 1).index_select(0, sequences.predictor).to(self.compute_dtype)

    def logps(self, sequences: Sequences, entropy: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logp, log-odds, entropy), each [N]; logp is differentiable."""
        result = self(
            lambda policy: _as_tuple(policy.head(policy.hidden(sequences), sequences.target, entropy=entropy))
        )
        return result

    def one_pass(
        self, sequences: Sequences, coefficients: Coefficients, entropy: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(surrogate to differentiate, logp, log-odds, entropy): gradients from one look at the logits."""

        def work(policy: Policy) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
            hidden = policy.hidden(sequences)
            surrogate, result = policy.head.one_pass(hidden, sequences.target, coefficients, entropy=entropy)
            return surrogate, *_as_tuple(result)

        return self(work)


def _as_tuple(result: HeadResult) -> tuple[Tensor, Tensor, Tensor | None]:
    return result.logp, result.log_odds, result.entropy


@torch.no_grad()
def check_parts(policy: Policy, where: str) -> None:
    """Refuse an architecture that does more to its logits than the head knows (Cohere and Granite scale them)."""
    device = policy.device
    ids = torch.arange(1, 4, device=device).remainder(policy.model.config.get_text_config().vocab_size)[None]
    plain = Sequences(ids, torch.arange(3, device=device)[None], None, None, torch.arange(3, device=device), ids[0])

    def work(inner: Policy) -> tuple[Tensor, Tensor]:
        with inner.autocast():
            expected = inner.model(input_ids=ids, use_cache=False).logits[0].float()
        return inner.head.logits(inner.hidden(plain)), expected

    error = _relative(*policy(work))
    if not error < (1e-3 if policy.compute_dtype == torch.float32 else 0.05):
        kind = type(policy.model).__name__
        if not math.isfinite(error):
            raise UsageError(f"the logits of this {kind} are not finite", where=where, hint="try --dtype float32")
        what = f"{kind} changes its logits in a way that bnfctl does not know (relative error {error:.2g})"
        raise UsageError(what, where=where, hint="Llama, Mistral, Qwen and Gemma models are known to work")


@torch.no_grad()
def packs(policy: Policy, packed_attention: str, padded_attention: str, longest: int) -> bool:
    """Whether two packed documents give the hidden states that they give alone; leaves the packed attention on if so.

    Asked of the model itself, since nothing else tells: a layer that mixes tokens outside of attention (convolutions,
    state spaces), an attention that takes no notice of the documents, or one that is not told of its window, all
    compute something else silently.  longest: tokens of the longest sequence to come; a window above it is no matter.
    """
    config = policy.model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    seen = [window for window in windows if isinstance(window, int) and 0 < window < longest]
    first, second = (2 * min(seen) + 4 if seen else 5), 4
    ids = torch.arange(3, 3 + first + second, device=policy.device).remainder(config.vocab_size)
    set_attention(policy, padded_attention)
    alone = torch.cat([_documents(policy, ids[:first], [first]), _documents(policy, ids[first:], [second])])
    set_attention(policy, packed_attention)
    # A small leak is lost in bfloat16's roundings.  These are the same whatever the first document says, the leak not.
    neighbour = torch.cat([(ids[:first] + 17).remainder(config.vocab_size), ids[first:]])
    try:
        found, other = (_documents(policy, tokens, [first, second]) for tokens in (ids, neighbour))
        end = slice(first - 4, first)  # where a lost window shows
        error = max(_relative(found, alone), _relative(found[end], alone[end]))
        leak = _relative(other[first:], found[first:])
    except ValueError:
        error = leak = float("inf")
    if error < (1e-4 if policy.compute_dtype == torch.float32 else 0.05) and leak < 1e-3:
        return True
    set_attention(policy, padded_attention)
    return False


def _documents(policy: Policy, ids: Tensor, lengths: list[int]) -> Tensor:
    """[T, H] hidden states of documents packed one behind the other, ids [T]."""
    places = torch.arange(len(ids), device=policy.device)
    positions = torch.cat([torch.arange(length, device=policy.device) for length in lengths])
    rows = None
    if policy.attends_rows:
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        documents = [range(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        rows = rows_of(documents, len(ids)).to(policy.device)
    sequences = Sequences(ids[None], positions[None], None, rows, places, ids)
    return policy(lambda inner: (inner.hidden(sequences),))[0]


def set_attention(policy: Policy, name: str) -> None:
    """Switch the model, in place, to another attention implementation."""
    policy.model.set_attn_implementation(name)


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm().clamp(min=1e-6))
