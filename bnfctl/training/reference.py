"""The reference: one log-odds per trained token, computed once from the policy as it starts.

It goes through the code and the micro-batches of the first epoch, so that at step 0 the policy's log-odds are
the reference's to the last bit: any error there would push BNF's coefficient below 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bnfctl import console, durable
from bnfctl.data.records import Record
from bnfctl.model.loading import Policy
from bnfctl.training.batches import Kept, MicroBatch, Plan, all_sides, micro_batches

FILE = "scratch/reference.safetensors"
"""In the work folder, beside the checkpoints."""


class LogOdds:
    """Reference log-odds of one split, found by record position."""

    def __init__(self, records: Sequence[Record], keep: Kept) -> None:
        self.starts: list[int] = []
        total = 0
        for record in records:
            self.starts.append(total)
            total += sum(len(side.ids) for side in record.sides if keep(side))
        self.values = torch.empty(total, dtype=torch.float32)
        """[all trained tokens of the split], nats, in data order."""
        self._ends = [*self.starts[1:], total]

    def take(self, positions: Sequence[int]) -> Tensor:
        """[N] the log-odds of a micro-batch's records, in its order of tokens."""
        return torch.cat([self.values[self.starts[p] : self._ends[p]] for p in positions])

    def put(self, positions: Sequence[int], values: Tensor) -> None:
        start = 0
        for p in positions:
            size = self._ends[p] - self.starts[p]
            self.values[self.starts[p] : self._ends[p]] = values[start : start + size]
            start += size


@dataclass(frozen=True)
class Reference:
    """Of both splits; the test split takes part with all its sides."""

    train: LogOdds
    test: LogOdds


@torch.no_grad()
def token_log_odds(policy: Policy, batch: MicroBatch) -> Tensor:
    """[N] float32 log-odds of a micro-batch's trained tokens under the policy, on the CPU."""
    moved = batch.to(policy.device)
    hidden = policy.hidden(moved.input_ids, moved.attention_mask)
    return policy.head(hidden.flatten(0, 1).index_select(0, moved.predictor), moved.target).log_odds.cpu()


def prepare(policy: Policy, plan: Plan, keep: Kept, test_set: Sequence[Record], work: Path) -> Reference:
    """The stored reference of this run, or a new one from the policy, which must be as it was loaded."""
    reference = Reference(LogOdds(plan.records, keep), LogOdds(test_set, all_sides))
    path = work / FILE
    mark = _fingerprint(plan.records, test_set, keep)
    if path.exists() and _load(path, mark, reference):
        return reference
    compute(policy, plan, keep, test_set, reference)
    tensors = {"train": reference.train.values, "test": reference.test.values}
    durable.write_file(path, lambda temporary: save_file(tensors, temporary, metadata={"records": mark}))
    return reference


def compute(policy: Policy, plan: Plan, keep: Kept, test_set: Sequence[Record], reference: Reference) -> None:
    """One pass without gradients over both splits."""
    budget = plan.config.micro_tokens
    with console.Progress(len(plan.records) + len(test_set), "reference records") as progress:
        for positions in plan.epoch(0):
            for batch in micro_batches(plan.records, positions, keep, budget):
                reference.train.put(batch.positions, token_log_odds(policy, batch))
                progress.advance(len(batch.positions))
                console.check_stop()
        for batch in micro_batches(test_set, range(len(test_set)), all_sides, budget):
            reference.test.put(batch.positions, token_log_odds(policy, batch))
            progress.advance(len(batch.positions))
            console.check_stop()


def _load(path: Path, mark: str, reference: Reference) -> bool:
    """Fill the reference from the file; False where the file is of other data."""
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("records") != mark:
            return False
        reference.train.values.copy_(file.get_tensor("train"))
        reference.test.values.copy_(file.get_tensor("test"))
    return True


def _fingerprint(train: Sequence[Record], test: Sequence[Record], keep: Kept) -> str:
    """SHA-256 of the token ids that the log-odds belong to, in order."""
    digest = hashlib.sha256()
    for records, kept in ((train, keep), (test, all_sides)):
        for record in records:
            sides = [(side.label, side.ids) for side in record.sides if kept(side)]
            digest.update(repr((record.id, record.prompt_ids, sides)).encode())
        digest.update(b"\0")
    return digest.hexdigest()
