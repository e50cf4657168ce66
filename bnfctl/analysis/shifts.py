"""What training moved: policy against reference on given responses, token by token (paper, section 5.3, figure 3).

For token t of a response, with logits z [V] in float32 (after a soft cap, before any temperature) and their log-sum-exp:

    ll_t  = log pi(y_t) - log pi_ref(y_t)        z_t = z[y_t] - z_ref[y_t]        lse_t = lse(z) - lse(z_ref)
    z3_t  = mean over v of |z[v] - z_ref[v]|     z4_t = the same of z[v] - z_ref[v] minus its mean over v

The paper gives no formula for its "absolute logit shift".  Four readings, each as the sum over the response and per
token: z1 sums z_t, z2 sums |z_t| (the default), z3 and z4 sum z3_t and z4_t.  A softmax does not tell z from z + constant:
z1 to z3 mean something because policy and reference share their start, z4 needs not even that.

ll_t = z_t - lse_t, and since ll_t comes from log-odds and lse_t from a log-sum-exp of its own, that is checked on every
token.  Both models go through one micro-batch; logits are computed for a few tokens at a time and reduced at once, so
beyond the models there are the activations of one micro-batch and three tensors of CHUNK_ELEMENTS numbers.

Wiring: candidates (greedy, of the policy, or of whoever wrote the responses) in, one row per response out, in order:

    shifts = Shifts(policy_dir, reference_dir, ShiftOptions(longest=...))
    rows = [shift.row() for shift in shifts.measure(candidates)]     # for shards.Parts or shards.write_shards, SCHEMA
    shifts.deviation                                                 # the largest of the identity so far, for the summary

Aggregates of the rows are in `distributions`.  A response that was cut at max_tokens is marked, not left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bnfctl.analysis.distributions import gini
from bnfctl.data.chat import context_length, read_config
from bnfctl.data.records import Candidate
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.model.attention import rows_of
from bnfctl.model.head import Head
from bnfctl.model.loading import choose_packing, load_model, padded_attention
from bnfctl.model.policy import Policy, Sequences, check_parts
from bnfctl.model.pretrained import device, torch_dtype

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits of a chunk of tokens, whatever the vocabulary, and entries of the output matrix that are widened at a time."""
MICRO_TOKENS = {"cpu": 1024, "cuda": 8192}
_UNBOUNDED = 1 << 31
_ROUNDING = 1e-5
"""How far the identity may be off, relative to the largest of its logits: some 50 roundings of float32."""

_MEASURES = ("ll", "z1", "z2", "z3", "z4")
_TOKENS = ("ll", "z", "lse", "z3", "z4")
SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("sequence", pa.string()),
        ("tokens", pa.int32()),
        ("cut", pa.bool_()),
        *((f"{name}_{kind}", pa.float64()) for name in _MEASURES for kind in ("sum", "mean")),
        ("gini", pa.float64()),
        ("gini_corrected", pa.float64()),
        ("deviation", pa.float64()),
        *((f"token_{name}", pa.list_(pa.float32())) for name in _TOKENS),
    ]
)
"""One row per response.  sequence: hash of (prompt ids, response ids), the same for every pair of models."""

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class ShiftOptions:
    """How the two models compute.  None of it changes a shift beyond rounding, but for the compute type."""

    dtype: str = "auto"
    """Type of the parameters and of the bodies: auto is bfloat16 on a GPU, whose rounding is in every shift; float32 for
    models that hardly differ.  Logits are float32 always."""
    longest: int | None = None
    """Tokens of the longest prompt + response to come; default: what both models have positions for."""
    attention: str = "auto"
    layout: str = "auto"
    """packed, padded (one sequence at a time), or auto: packed where both models keep packed sequences apart."""
    micro_tokens: int | None = None
    """Tokens of a micro-batch, those that attention pads included; a longer sequence goes alone."""
    trust_remote_code: bool = False


@dataclass(frozen=True, eq=False)
class ResponseShift:
    """One response of T tokens."""

    prompt_id: str
    sample: int
    sequence: str
    cut: bool | None
    """Ended by max_tokens; None where nobody knows."""
    ll: Floats
    """[T] nats, as in the module's docstring; and so are the others."""
    z: Floats
    lse: Floats
    z3: Floats
    z4: Floats
    deviation: float
    """Largest |ll_t - (z_t - lse_t)|."""

    def row(self) -> dict[str, Any]:
        """The row of SCHEMA; sums are in float64, Gini coefficients of |z_t|."""
        tokens = {"ll": self.ll, "z1": self.z, "z2": np.abs(self.z), "z3": self.z3, "z4": self.z4}
        row: dict[str, Any] = {
            "prompt_id": self.prompt_id, "sample": self.sample, "sequence": self.sequence, "tokens": len(self.ll),
            "cut": self.cut, "deviation": self.deviation, "gini": gini(tokens["z2"]),
            "gini_corrected": gini(tokens["z2"], corrected=True),
        }  # fmt: skip
        for name, values in tokens.items():
            total = float(values.sum(dtype=np.float64))
            row |= {f"{name}_sum": total, f"{name}_mean": total / len(values)}
        return row | {f"token_{name}": getattr(self, name) for name in _TOKENS}


class Shifts:
    """A policy and a reference in memory, on the GPU where there is one."""

    def __init__(self, policy_dir: Path, reference_dir: Path, options: ShiftOptions | None = None) -> None:
        """Raises UsageError for a folder that is no known causal language model, and for two vocabularies."""
        self.options = options or ShiftOptions()
        folders = (policy_dir, reference_dir)
        self.longest = self.options.longest or min(context_length(folder) or _UNBOUNDED for folder in folders)
        self._models = [_load(folder, self.options) for folder in folders]
        self.device = self._models[0].device
        sizes = [model.head.matrix.shape[0] for model in self._models]
        if sizes[0] != sizes[1]:
            what = f"the policy has a vocabulary of {sizes[0]} tokens, the reference one of {sizes[1]}"
            raise UsageError(what, where=str(policy_dir), hint="take the model that the policy was trained from")
        self.vocabulary = sizes[0]
        self.packed = not any(_long_positions(folder, self.longest) for folder in folders) and all(
            choose_packing(model, self.options.layout, self.options.attention, self.longest, str(folder))
            for model, folder in zip(self._models, folders, strict=True)
        )
        self.deviation = 0.0
        """The largest deviation from ll = z - lse on any token so far."""

    def measure(self, candidates: Iterable[Candidate]) -> Iterator[ResponseShift]:
        """One shift per candidate, in order; reads no further ahead than a micro-batch.

        Raises UsageError for a candidate without token ids, or with ids that the models don't have; BnfctlError where
        the numbers are not finite or contradict each other.
        """
        batch: list[Candidate] = []
        for candidate in candidates:
            self._check(candidate)
            if batch and not self._fits([*batch, candidate]):
                yield from self._measure(batch)
                batch = []
            batch.append(candidate)
        if batch:
            yield from self._measure(batch)

    def _fits(self, batch: Sequence[Candidate]) -> bool:
        # Attention pads: its rows are as long as the longest sequence.
        budget = self.options.micro_tokens or MICRO_TOKENS[self.device.type]
        return self.packed and len(batch) * max(map(_length, batch)) <= budget

    def _measure(self, batch: Sequence[Candidate]) -> Iterator[ResponseShift]:
        with torch.inference_mode():
            target = torch.tensor([token for candidate in batch for token in candidate.token_ids or ()])
            target = target.to(self.device)
            hidden = [_hidden(model, batch, target) for model in self._models]
            found = compare((self._models[0].head, self._models[1].head), (hidden[0], hidden[1]), target)
        ends = np.cumsum([len(candidate.token_ids or ()) for candidate in batch])[:-1]
        for candidate, part in zip(batch, np.split(found.cpu().numpy(), ends, axis=1), strict=True):
            yield self._shift(candidate, part.copy())  # a view would keep the whole micro-batch

    def _shift(self, candidate: Candidate, tokens: Floats) -> ResponseShift:
        """tokens: [7, T] of `compare`."""
        ll, z, lse, z3, z4, deviation, relative = tokens
        where = f"prompt {candidate.prompt_id}, sample {candidate.sample}"
        if not np.isfinite(tokens).all():
            hint = "try --dtype float32"
            raise BnfctlError("the logits of a response are not finite", where=where, hint=hint)
        worst = float(deviation.max())
        if relative.max() > _ROUNDING:
            what = f"log-likelihood shift and logit shift minus log-sum-exp shift differ by {worst:.2g}"
            raise BnfctlError(what, where=where, hint="they are equal but for rounding: is the GPU sound?")
        self.deviation = max(self.deviation, worst)
        cut = None if candidate.finish_reason is None else candidate.finish_reason == "length"
        names = (candidate.prompt_id, candidate.sample, _sequence(candidate))
        return ResponseShift(*names, cut, ll, z, lse, z3, z4, worst)

    def _check(self, candidate: Candidate) -> None:
        where = f"prompt {candidate.prompt_id}, sample {candidate.sample}"
        if not candidate.prompt_ids or not candidate.token_ids:
            what = "shifts need the token ids of a prompt and of a response of at least one token"
            raise UsageError(what, where=where, hint="bnfctl generate keeps them")
        ids = [*candidate.prompt_ids, *candidate.token_ids]
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            what = f"token {wrong} is not in the models' vocabulary of {self.vocabulary}"
            raise UsageError(what, where=where, hint="the responses are those of a model with another tokenizer")
        if len(ids) > self.longest:
            what = f"prompt + response has {len(ids)} tokens, more than {self.longest}"
            raise UsageError(
                what, where=where, hint="that is what the models have positions for, or what was announced"
            )


def compare(heads: tuple[Head, Head], hidden: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """[7, N] float32: ll, z, lse, z3, z4, deviation from ll = z - lse, and that relative to the logits in it.

    heads, hidden [N, H]: of policy and reference; target [N].  Nothing of size N x V is kept.
    """
    found = torch.empty(7, len(target), device=target.device)
    vocabulary = heads[0].matrix.shape[0]
    size = max(1, _chunk(target.device) // vocabulary)
    for start in range(0, len(target), size):
        part = slice(start, start + size)
        (shift, values, one), (ref_shift, ref_values, two) = (
            _reduced(head, states[part], target[part]) for head, states in zip(heads, hidden, strict=True)
        )
        ll, z, lse = shift - ref_shift
        one -= two
        del two
        z3 = one.abs().mean(-1)
        one -= one.mean(-1, keepdim=True)
        z4 = one.abs_().mean(-1)
        del one  # before the next chunk's
        deviation = (ll - (z - lse)).abs()
        largest = torch.cat([values, ref_values]).abs().amax(0)
        found[:, part] = torch.stack([ll, z, lse, z3, z4, deviation, deviation / (1 + largest)])
    return found


def _reduced(head: Head, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """([3, n] logp, target logit, lse; [2, n] the two that are as large as logits; [n, V] logits)."""
    logits = _logits(head, hidden)
    index = target.unsqueeze(-1)
    label = logits.gather(-1, index)
    lse = logits.logsumexp(-1)
    # By log-odds, which keep the digits of a log-likelihood near 0, where label - lse has lost them.
    rest = logits.scatter_(-1, index, -torch.inf).logsumexp(-1)
    logits.scatter_(-1, index, label)
    label = label.squeeze(-1)
    return torch.stack([logsigmoid(label - rest), label, lse]), torch.stack([label, lse]), logits


def _logits(head: Head, hidden: Tensor) -> Tensor:
    """[n, V] float32, block by block of the vocabulary: a narrow matrix is never widened as a whole."""
    vocabulary, width = head.matrix.shape
    size = max(1, _chunk(hidden.device) // width)
    logits = torch.empty(len(hidden), vocabulary, device=hidden.device)
    for start in range(0, vocabulary, size):
        block = slice(start, start + size)
        bias = None if head.bias is None else head.bias[block]
        logits[:, block] = Head(head.matrix[block], bias, head.softcap).logits(hidden)
    return logits


def _chunk(where: torch.device) -> int:
    return CHUNK_ELEMENTS.get(where.type, CHUNK_ELEMENTS["cpu"])


def _load(folder: Path, options: ShiftOptions) -> Policy:
    """The model with parameters in the compute type: nothing is trained, so no float32 masters."""
    dtype, where = torch_dtype(options.dtype), device()
    model = load_model(folder, dtype, padded_attention(folder, options.attention), options.trust_remote_code, where)
    policy = Policy(model.requires_grad_(False), dtype).to(where)
    check_parts(policy, str(folder))
    return policy


def _long_positions(folder: Path, longest: int) -> bool:
    """Whether rotary frequencies depend on the longest sequence of a micro-batch (LongRoPE), so each has to go alone."""
    config = read_config(folder)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    short = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or _UNBOUNDED
    return (rope.get("rope_type") or rope.get("type")) in ("longrope", "su") and longest > short


def _length(candidate: Candidate) -> int:
    return len(candidate.prompt_ids or ()) + len(candidate.token_ids or ()) - 1


def _document(candidate: Candidate) -> list[int]:
    """What goes through a body: the last token is left out, since nothing is predicted from it."""
    return [*(candidate.prompt_ids or ()), *(candidate.token_ids or ())][:-1]


def _hidden(policy: Policy, batch: Sequence[Candidate], target: Tensor) -> Tensor:
    """[N, H] of the places that predict the responses' tokens, sequences one behind the other (or one alone)."""
    documents = [_document(candidate) for candidate in batch]
    starts = np.cumsum([0, *map(len, documents)]).tolist()
    rows = [range(start, end) for start, end in pairwise(starts)]
    predictor = [token for c, row in zip(batch, rows, strict=True) for token in row[len(c.prompt_ids or ()) - 1 :]]
    where = policy.device
    sequences = Sequences(
        input_ids=torch.tensor([[token for document in documents for token in document]], device=where),
        position_ids=torch.tensor([[place for row in rows for place in range(len(row))]], device=where),
        attention_mask=None,
        rows=rows_of(rows, starts[-1]).to(where) if policy.attends_rows else None,
        predictor=torch.tensor(predictor, device=where),
        target=target,
    )
    return policy(lambda inner: (inner.hidden(sequences),))[0]


def _sequence(candidate: Candidate) -> str:
    """Hash of prompt and response ids: which rows of two measurements are of the same tokens."""
    parts = [np.asarray(ids, np.int32).tobytes() for ids in (candidate.prompt_ids, candidate.token_ids)]
    return hashlib.sha256(b"|".join(parts)).hexdigest()[:32]
