"""From records to micro-batches: which records make a step, who computes them, and their tensors.

Order and steps depend on (seed, epoch, record ids) alone; who computes what, and in which micro-batches, on the
layout, the token budget and the number of ranks, none of which changes a gradient.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnfctl.config import TrainConfig
from bnfctl.data.records import Record, Side
from bnfctl.model.attention import rows_of
from bnfctl.model.policy import Sequences

Kept = Callable[[Side], bool]
"""Which sides of a record take part (a loss of chosen responses alone skips the others)."""


def all_sides(side: Side) -> bool:
    return True


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
            order = shuffled(self.records, self.config.seed, epoch)
            for step in range(max(0, first - epoch * self.per_epoch), self.per_epoch):
                yield order[step * self.config.batch_size : (step + 1) * self.config.batch_size]


@dataclass(frozen=True)
class StepData:
    """The responses of one step, from which a loss's denominator is known before any forward.  [R] each, CPU."""

    label: Tensor
    length: Tensor
    pair: Tensor


def step_data(records: Sequence[Record], positions: Iterable[int], keep: Kept) -> StepData:
    """What the loss divides by, over the whole step."""
    rows = [row for index, position in enumerate(positions) for row in _sides(records[position], index, keep)]
    return StepData(
        label=torch.tensor([float(side.label) for side, _ in rows]),
        length=torch.tensor([float(len(side.ids)) for side, _ in rows]),
        pair=torch.tensor([pair for _, pair in rows], dtype=torch.int64),
    )


@dataclass(frozen=True)
class Layout:
    """How sequences stand in a forward."""

    packed: bool
    """One row without padding; else a sequence a row, padded to the longest."""
    rows: bool = False
    """Packed for `model.attention`, which wants to know where the sequences are."""
    share: bool = False
    """The responses of a record have their prompt in common (with `rows` only)."""

    def tokens(self, record: Record, keep: Kept) -> int:
        """Tokens that a record computes, without padding."""
        sides = [len(side.ids) - 1 for side in record.sides if keep(side)]
        prompts = min(len(sides), 1) if self.share else len(sides)
        return prompts * len(record.prompt_ids) + sum(sides)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Whole records in one forward, and the R responses that its N trained tokens belong to; R may be 0."""

    positions: list[int]
    """Which records (positions in the data)."""
    sequences: Sequences
    segment: Tensor
    """[N] the response 0..R-1 that a token belongs to."""
    label: Tensor
    """[R] float32."""
    length: Tensor
    """[R] float32, |y|."""
    pair: Tensor
    """[R] index of the record for both sides of a pair, -1 for one without a partner."""

    def to(self, device: torch.device) -> MicroBatch:
        moved: MicroBatch = _moved(self, device)
        return moved


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor, or a dataclass of tensors, on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value):
        return type(value)(**{name: _moved(part, device) for name, part in vars(value).items()})  # type: ignore[misc]
    return value


@dataclass(frozen=True)
class Work:
    """How records are computed: planned on every rank from the data alone, so nothing has to be agreed on."""

    records: Sequence[Record]
    keep: Kept
    layout: Layout
    budget: int
    """Tokens of a micro-batch, padding included; one record may exceed it alone."""
    rank: int = 0
    size: int = 1

    def micro_batches(self, positions: Iterable[int]) -> Iterator[MicroBatch]:
        """This rank's; every rank gets the same number, with empty ones at the end of some."""
        shares = [self.groups(share) for share in self._shares(positions)]
        mine = shares[self.rank]
        for index in range(max(map(len, shares))):
            yield self.collate(mine[index] if index < len(mine) else [])

    def largest(self) -> MicroBatch:
        """The one that needs most memory: the longest records of all, up to the budget."""
        return self.collate(self.groups(self.longest_first(range(len(self.records))))[0])

    def groups(self, positions: Sequence[int]) -> list[list[int]]:
        """Whole records, in the order given, filled up to the budget."""
        groups: list[list[int]] = []
        for position in positions:
            if groups and self._cost([*groups[-1], position]) <= self.budget:
                groups[-1].append(position)
            else:
                groups.append([position])
        return groups

    def longest_first(self, positions: Iterable[int]) -> list[int]:
        return sorted(positions, key=lambda position: self._cost([position]), reverse=True)

    def collate(self, positions: list[int]) -> MicroBatch:
        """The tensors of one micro-batch; without positions one of a single token that trains nothing."""
        sides = [
            (self.records[position], *row)
            for index, position in enumerate(positions)
            for row in _sides(self.records[position], index, self.keep)
        ]
        maker = _Packed(self.layout) if self.layout.packed else _Padded()
        for record, side, _ in sides:
            maker.add(record, side)
        return MicroBatch(
            positions=positions,
            sequences=maker.sequences(torch.tensor([token for _, side, _ in sides for token in side.ids]).long()),
            segment=torch.tensor([row for row, (_, side, _) in enumerate(sides) for _ in side.ids]).long(),
            label=torch.tensor([float(side.label) for _, side, _ in sides]),
            length=torch.tensor([float(len(side.ids)) for _, side, _ in sides]),
            pair=torch.tensor([pair for _, _, pair in sides]).long(),
        )

    def _shares(self, positions: Iterable[int]) -> list[list[int]]:
        """Records of each rank: the longest first, each to the rank that has least to do."""
        shares: list[list[int]] = [[] for _ in range(self.size)]
        loads = [0] * self.size
        for position in self.longest_first(positions):
            rank = loads.index(min(loads))
            shares[rank].append(position)
            loads[rank] += self._cost([position])
        return shares

    def _cost(self, positions: Sequence[int]) -> int:
        """Tokens that these records compute together, padding included."""
        if self.layout.packed:
            return sum(self.layout.tokens(self.records[p], self.keep) for p in positions)
        sides = [(self.records[p], side) for p in positions for side in self.records[p].sides if self.keep(side)]
        return len(sides) * max(len(record.prompt_ids) + len(side.ids) - 1 for record, side in sides)


class _Packed:
    """Sequences one behind the other.  The last token of each is left out: nothing is predicted from it."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.ids: list[int] = []
        self.places: list[int] = []
        self.rows: list[list[int]] = []
        self.predictor: list[int] = []
        self._last: tuple[Record, range] | None = None

    def add(self, record: Record, side: Side) -> None:
        shared = self._last[1] if self.layout.share and self._last and self._last[0] is record else None
        prompt = shared or self._append(record.prompt_ids, 0)
        self._last = (record, prompt)
        rest = self._append(side.ids[:-1], len(prompt))
        self.predictor += [prompt[-1], *rest]
        if rest or shared is None:
            self.rows.append([*prompt, *rest])

    def _append(self, ids: list[int], place: int) -> range:
        start = len(self.ids)
        self.ids += ids
        self.places += range(place, place + len(ids))
        return range(start, len(self.ids))

    def sequences(self, target: Tensor) -> Sequences:
        if not self.ids:
            self.rows.append([*self._append([0], 0)])
        return Sequences(
            input_ids=torch.tensor([self.ids]),
            position_ids=torch.tensor([self.places]),
            attention_mask=None,
            rows=rows_of(self.rows, len(self.ids)) if self.layout.rows else None,
            predictor=torch.tensor(self.predictor).long(),
            target=target,
        )


class _Padded:
    """A sequence a row, right-padded with 0."""

    def __init__(self) -> None:
        self.rows: list[tuple[list[int], int]] = []

    def add(self, record: Record, side: Side) -> None:
        self.rows.append((record.prompt_ids + side.ids[:-1], len(record.prompt_ids)))

    def sequences(self, target: Tensor) -> Sequences:
        rows = self.rows or [([0], 2)]
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
        attention_mask = torch.zeros(len(rows), width, dtype=torch.int64)
        predictor: list[int] = []
        for row, (ids, prompt) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
            predictor += range(row * width + prompt - 1, row * width + len(ids))
        places = torch.arange(width).expand(len(rows), width)
        return Sequences(input_ids, places, attention_mask, None, torch.tensor(predictor).long(), target)


def _sides(record: Record, index: int, keep: Kept) -> list[tuple[Side, int]]:
    """The sides that take part, each with the pair it belongs to (-1: none)."""
    sides = [side for side in record.sides if keep(side)]
    return [(side, index if len(sides) == 2 else -1) for side in sides]
