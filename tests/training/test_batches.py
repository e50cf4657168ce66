"""Order, steps and micro-batches."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from bnfctl.config import TrainConfig
from bnfctl.data.records import Record, Side
from bnfctl.training.batches import Plan, all_sides, collate, micro_batches, shuffled, step_data
from tests.training.data import make_records


def test_order_is_a_permutation_that_depends_on_seed_epoch_and_ids_only() -> None:
    records = make_records(40)
    order = shuffled(records, 0, 0)
    assert sorted(order) == list(range(40)) and order != list(range(40))
    assert shuffled(records, 1, 0) != order != shuffled(records, 0, 1)
    turned = records[::-1]
    assert [turned[i].id for i in shuffled(turned, 0, 0)] == [records[i].id for i in order]


def test_every_epoch_sees_every_record_once_in_batches_of_the_asked_size() -> None:
    plan = Plan(TrainConfig(model="m", batch_size=8, epochs=3), make_records(21))
    batches = list(plan.batches())
    assert len(batches) == plan.steps == 9
    assert [len(batch) for batch in batches] == [8, 8, 5] * 3
    for epoch in range(3):
        assert sorted(chain(*batches[3 * epoch : 3 * epoch + 3])) == list(range(21))
    for first in range(plan.steps + 1):
        assert list(plan.batches(first)) == batches[first:]


@pytest.mark.parametrize("budget", [1, 30, 64, 10_000])
def test_micro_batches_hold_whole_records_within_the_budget(budget: int) -> None:
    records = make_records(17) + make_records(6, seed=1, pairs=False)
    batches = list(micro_batches(records, range(23), all_sides, budget))
    assert sorted(chain(*(batch.positions for batch in batches))) == list(range(23))
    for batch in batches:
        assert batch.input_ids.numel() <= budget or len(batch.positions) == 1
        assert len(batch.label) == sum(len(records[p].sides) for p in batch.positions)
    if budget == 10_000:
        assert len(batches) == 1


def test_collate_shows_where_each_token_is_predicted() -> None:
    records = [Record("a", [5, 6], (Side(1, [7, 8, 9]), Side(-1, [10]))), Record("b", [11], (Side(-1, [12, 13]),))]
    batch = collate(records, [1, 0], all_sides)
    assert batch.input_ids.tolist() == [[11, 12, 0, 0], [5, 6, 7, 8], [5, 6, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.target.tolist() == [12, 13, 7, 8, 9, 10]
    assert batch.input_ids.flatten()[batch.predictor].tolist() == [11, 12, 6, 7, 8, 6]
    assert batch.segment.tolist() == [0, 0, 1, 1, 1, 2]
    assert (batch.label.tolist(), batch.length.tolist()) == ([-1, 1, -1], [2, 3, 1])
    assert batch.pair.tolist() == [-1, 1, 1]


def test_sides_that_take_no_part_are_not_run() -> None:
    records = make_records(5)
    (batch,) = micro_batches(records, range(5), lambda side: side.label > 0, 10_000)
    assert batch.label.tolist() == [1.0] * 5 and (batch.pair == -1).all()
    data = step_data(records, range(5), lambda side: side.label > 0)
    assert torch.equal(data.length.sort().values, batch.length.sort().values)
