"""A plain padded loop, for arithmetic that has no trainer: Appendix B of the paper, and Liger's fused losses."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bnfctl.data.records import Record
from tests.benchmarks.clock import now
from tests.benchmarks.job import Job, NotRunError, Timing

NAMES = ("appendix-b", "liger-sft", "liger-dpo")
NOTES = {
    "appendix-b": "[B, T, V] logits of policy and live reference",
    "liger-sft": "fused linear cross-entropy, both responses",
    "liger-dpo": "fused linear DPO, live reference",
}
IGNORED = -100


def rows_to_try(batch_pairs: int) -> tuple[int, ...]:
    """Pairs per forward pass."""
    return tuple(n for n in (1, 2, 4, 8) if batch_pairs % n == 0)


def load(job: Job) -> None:
    """Import what a run needs, so that it is not timed."""
    if job.name.startswith("liger"):
        if job.device == "cpu":
            raise NotRunError("not run: needs a GPU")
        if importlib.util.find_spec("liger_kernel") is None:
            raise NotRunError("not run: needs liger-kernel (pip install liger-kernel)")
        import liger_kernel.chunked_loss
        import liger_kernel.transformers  # noqa: F401
    import transformers  # noqa: F401


@dataclass(frozen=True, eq=False)
class Batch:
    """2 P sequences, padded on the right: P chosen, then their P rejected.  Inputs and targets come shifted."""

    ids: Any
    """[2 P, T]"""
    attention: Any
    """[2 P, T] 1 for a token."""
    target: Any
    """[2 P, T] the next token."""
    trained: Any
    """[2 P, T] bool: the target is a response token."""
    label: Any
    """[2 P] +1 or -1."""


def collate(records: list[Record], device: str) -> Batch:
    import torch

    sides = [(r, r.sides[side]) for side in (0, 1) for r in records]
    width = max(len(r.prompt_ids) + len(side.ids) for r, side in sides)
    ids = torch.zeros(len(sides), width, dtype=torch.int64)
    real, response = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (record, side) in enumerate(sides):
        whole = record.prompt_ids + side.ids
        ids[row, : len(whole)] = torch.tensor(whole)
        real[row, : len(whole)] = 1
        response[row, len(record.prompt_ids) : len(whole)] = True
    label = torch.tensor([float(side.label) for _, side in sides])
    parts = (ids[:, :-1], real[:, :-1], ids[:, 1:], response[:, 1:], label)
    return Batch(*(part.to(device) for part in parts))


def train(job: Job, records: list[Record]) -> Timing:
    """One pass in the order of the data."""
    import torch
    from transformers import AutoModelForCausalLM

    assert job.rows is not None

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32).to(job.device)

    policy = model()
    reference = None if job.name == "liger-sft" else model().requires_grad_(False)
    loss = LOSSES[job.name](policy, reference)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=job.lr, weight_decay=0.0)
    started = now()
    for first in range(0, len(records), job.batch_pairs):
        step = records[first : first + job.batch_pairs]
        optimizer.zero_grad(set_to_none=True)
        for begin in range(0, len(step), job.rows):
            part = step[begin : begin + job.rows]
            with torch.autocast(job.device, dtype=torch.bfloat16, enabled=job.dtype == "bfloat16"):
                value = loss(collate(part, job.device))
            (value * (len(part) / len(step))).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    if job.device != "cpu":
        torch.cuda.synchronize()
    return Timing(now() - started, None, NOTES[job.name])


def _appendix_b(policy: Any, reference: Any) -> Callable[[Batch], Any]:
    import torch

    from tests.reference import appendix_b

    def loss(batch: Batch) -> Any:
        with torch.no_grad():
            ref_logits = reference(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits
        logits = policy(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits
        return appendix_b(logits.float(), ref_logits.float(), batch.target, batch.trained, batch.label)

    return loss


def _hidden(model: Any, batch: Batch) -> Any:
    return model.model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).last_hidden_state


def _liger_sft(policy: Any, reference: None) -> Callable[[Batch], Any]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)

    def loss(batch: Batch) -> Any:
        target = batch.target.masked_fill(~batch.trained, IGNORED)
        return fused(policy.lm_head.weight, _hidden(policy, batch).flatten(0, 1), target.flatten())

    return loss


def _liger_dpo(policy: Any, reference: Any, compiled: bool = True) -> Callable[[Batch], Any]:
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    fused = LigerFusedLinearDPOLoss(ignore_index=IGNORED, beta=0.1, compiled=compiled)

    def loss(batch: Batch) -> Any:
        target = batch.target.masked_fill(~batch.trained, IGNORED)
        with torch.no_grad():
            ref_hidden = _hidden(reference, batch)
        hidden, ref_weight = _hidden(policy, batch), reference.lm_head.weight
        return fused(policy.lm_head.weight, hidden, target, ref_input=ref_hidden, ref_weight=ref_weight)[0]

    return loss


LOSSES: dict[str, Callable[..., Callable[[Batch], Any]]] = {
    "appendix-b": _appendix_b,
    "liger-sft": _liger_sft,
    "liger-dpo": _liger_dpo,
}
