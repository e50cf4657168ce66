"""From records to micro-batches: which records make a step, in which order, and their padded tensors.

Order and steps depend on (seed, epoch, record ids) alone; micro-batches only on the token budget.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfctl.config import TrainConfig
from bnfctl.data.records import Record, Side


def shuffled(records: Sequence[Record], seed: int, epoch: int) -> list[int]:
    """Positions of the records in the epoch's order: sorted by a hash of (seed, epoch, record id)."""

    def place(position: int) -> tuple[bytes, int]:
        text = f"{seed}\0{epoch}\0{records[position].id}"
        return hashlib.sha256(text.encode()).digest(), position

    return sorted(range(len(records)), key=place)


@dataclass(frozen=True)
class Plan:
    """All optimizer steps of a run: batches of record positions, the last of an epoch perhaps short."""

    config: TrainConfig
    records: Sequence[Record]

    @property
    def per_epoch(self) -> int:
        return -(-len(self.records) // self.config.batch_size)

    @property
    def steps(self) -> int:
        return self.per_epoch * self.config.epochs

    def batches(self, first: int = 0) -> Iterator[list[int]]:
        """Record positions of the steps first, first + 1, .. to the end."""
        for epoch in range(first // self.per_epoch, self.config.epochs):
            yield from self.epoch(epoch, max(0, first - epoch * self.per_epoch))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[list[int]]:
        """The batches of one epoch, from its step `first` on."""
        order = shuffled(self.records, self.config.seed, epoch)
        for step in range(first, self.per_epoch):
            yield order[step * self.config.batch_size : (step + 1) * self.config.batch_size]


@dataclass(frozen=True)
class StepData:
    """The responses of one step, from which a loss's denominator is known before any forward.  [R] each, CPU."""

    label: Tensor
    length: Tensor
    pair: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Whole records as padded sequences, and where their N trained tokens are predicted."""

    positions: list[int]
    """Which records (positions in the data)."""
    input_ids: Tensor
    """[R, L] prompt + response without its last token (nothing is predicted from it), right-padded with 0."""
    attention_mask: Tensor
    """[R, L] 1 for a token, 0 for padding."""
    predictor: Tensor
    """[N] index into the flattened [R * L] positions: the one that predicts the token."""
    target: Tensor
    """[N] the trained token ids."""
    segment: Tensor
    """[N] the response 0..R-1 that a token belongs to."""
    label: Tensor
    """[R] float32."""
    length: Tensor
    """[R] float32, |y|."""
    pair: Tensor
    """[R] index of the record for both sides of a pair, -1 for one without a partner."""

    def to(self, device: torch.device) -> MicroBatch:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return MicroBatch(positions=self.positions, **moved)


Kept = Callable[[Side], bool]
"""Which sides of a record take part (a loss of chosen responses alone skips the others)."""


def all_sides(side: Side) -> bool:
    return True


def step_data(records: Sequence[Record], positions: Iterable[int], keep: Kept) -> StepData:
    """What the loss divides by, over the whole step."""
    rows = [row for index, position in enumerate(positions) for row in _rows(records[position], index, keep)]
    return StepData(
        label=torch.tensor([float(side.label) for side, _ in rows]),
        length=torch.tensor([float(len(side.ids)) for side, _ in rows]),
        pair=torch.tensor([pair for _, pair in rows], dtype=torch.int64),
    )


def micro_batches(records: Sequence[Record], positions: Sequence[int], keep: Kept, budget: int) -> Iterator[MicroBatch]:
    """Whole records, longest first, filled up to `budget` padded tokens; one record may exceed it alone."""

    def longest(position: int) -> int:
        sides = records[position].sides
        return len(records[position].prompt_ids) + max(len(side.ids) for side in sides if keep(side)) - 1

    group: list[int] = []
    count = width = 0
    for position in sorted(positions, key=longest, reverse=True):
        responses = sum(keep(side) for side in records[position].sides)
        if group and (count + responses) * width > budget:
            yield collate(records, group, keep)
            group, count, width = [], 0, 0
        group.append(position)
        count, width = count + responses, max(width, longest(position))
    if group:
        yield collate(records, group, keep)


def collate(records: Sequence[Record], positions: list[int], keep: Kept) -> MicroBatch:
    """The tensors of one micro-batch."""
    rows = [
        (records[position].prompt_ids, side, pair)
        for index, position in enumerate(positions)
        for side, pair in _rows(records[position], index, keep)
    ]
    width = max(len(prompt) + len(side.ids) - 1 for prompt, side, _ in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.int64)
    predictor: list[int] = []
    target: list[int] = []
    segment: list[int] = []
    for row, (prompt, side, _) in enumerate(rows):
        ids = prompt + side.ids[:-1]
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        attention_mask[row, : len(ids)] = 1
        start = row * width + len(prompt) - 1
        predictor += range(start, start + len(side.ids))
        target += side.ids
        segment += [row] * len(side.ids)
    return MicroBatch(
        positions=positions,
        input_ids=input_ids,
        attention_mask=attention_mask,
        predictor=torch.tensor(predictor),
        target=torch.tensor(target),
        segment=torch.tensor(segment),
        label=torch.tensor([float(side.label) for _, side, _ in rows]),
        length=torch.tensor([float(len(side.ids)) for _, side, _ in rows]),
        pair=torch.tensor([pair for _, _, pair in rows]),
    )


def _rows(record: Record, index: int, keep: Kept) -> list[tuple[Side, int]]:
    """The sides that take part, each with the pair it belongs to (-1: none)."""
    sides = [side for side in record.sides if keep(side)]
    return [(side, index if len(sides) == 2 else -1) for side in sides]
