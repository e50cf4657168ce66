"""Order, steps and micro-batches."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from bnfctl.config import TrainConfig
from bnfctl.data.records import Record, Side
from bnfctl.model.attention import rows_of
from bnfctl.training.batches import Layout, Plan, Work, all_sides, shuffled, step_data
from bnfctl.training.objective import partners
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


LAYOUTS = {
    "padded": Layout(False),
    "packed": Layout(True),
    "rows": Layout(True, True),
    "shared": Layout(True, True, True),
}
MIXED = make_records(17) + make_records(6, seed=1, pairs=False)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("budget", [1, 30, 64, 10_000])
def test_micro_batches_hold_whole_records_within_the_budget(budget: int, layout: str) -> None:
    work = Work(MIXED, all_sides, LAYOUTS[layout], budget)
    batches = list(work.micro_batches(range(23)))
    assert sorted(chain(*(batch.positions for batch in batches))) == list(range(23))
    for batch in batches:
        assert batch.sequences.input_ids.numel() <= budget or len(batch.positions) == 1
        assert len(batch.label) == sum(len(MIXED[p].sides) for p in batch.positions)
    assert len(batches) == {1: 23, 10_000: 1}.get(budget, len(batches))
    most = max(batch.sequences.input_ids.numel() for batch in batches)
    assert work.largest().sequences.input_ids.numel() >= min(most, budget // 2)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_micro_batch_shows_where_each_token_is_predicted(layout: str) -> None:
    records = [Record("a", [5, 6], (Side(1, [7, 8, 9]), Side(-1, [10]))), Record("b", [11], (Side(-1, [12, 13]),))]
    batch = Work(records, all_sides, LAYOUTS[layout], 100).collate([1, 0])
    sequences = batch.sequences
    ids, places = {
        "padded": ([[11, 12, 0, 0], [5, 6, 7, 8], [5, 6, 0, 0]], [[0, 1, 2, 3]] * 3),
        "packed": ([[11, 12, 5, 6, 7, 8, 5, 6]], [[0, 1, 0, 1, 2, 3, 0, 1]]),
        "shared": ([[11, 12, 5, 6, 7, 8]], [[0, 1, 0, 1, 2, 3]]),
    }["packed" if layout == "rows" else layout]
    assert sequences.input_ids.tolist() == ids and sequences.position_ids.tolist() == places
    assert sequences.target.tolist() == [12, 13, 7, 8, 9, 10]
    assert sequences.input_ids.flatten()[sequences.predictor].tolist() == [11, 12, 6, 7, 8, 6]
    if layout == "padded":
        assert sequences.attention_mask is not None
        assert sequences.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    else:
        assert sequences.attention_mask is None
    # The rejected response of one token needs no place beyond the shared prompt.
    rows = {"rows": [[0, 1], [2, 3, 4, 5], [6, 7]], "shared": [[0, 1], [2, 3, 4, 5]]}.get(layout)
    assert (sequences.rows is None) == (rows is None)
    if rows is not None and sequences.rows is not None:
        expected = rows_of(rows, sequences.input_ids.numel())
        assert sequences.rows.shape == expected.shape
        assert torch.equal(sequences.rows.source, expected.source) and torch.equal(sequences.rows.home, expected.home)
    assert batch.segment.tolist() == [0, 0, 1, 1, 1, 2]
    assert (batch.label.tolist(), batch.length.tolist()) == ([-1, 1, -1], [2, 3, 1])
    assert batch.pair.tolist() == [-1, 1, 1]


def test_a_shared_prompt_stands_in_the_rows_of_both_responses() -> None:
    record = Record("a", [5, 6], (Side(1, [7, 8, 9]), Side(-1, [10, 11])))
    rows = Work([record], all_sides, LAYOUTS["shared"], 100).collate([0]).sequences.rows
    assert rows is not None and rows.source.view(rows.shape).tolist() == [[0, 1, 2, 3], [0, 1, 4, 0]]


def test_records_with_equal_prompts_share_nothing() -> None:
    """Only the responses of one record do: two records may be the same object nowhere, but alike."""
    records = [Record(name, [5, 6], (Side(1, [7]),)) for name in "ab"]
    batch = Work(records, all_sides, LAYOUTS["shared"], 100).collate([0, 1])
    assert batch.sequences.input_ids.tolist() == [[5, 6, 5, 6]]


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("size", [1, 2, 3, 30])
def test_ranks_divide_the_records_and_have_as_many_micro_batches(size: int, layout: str) -> None:
    shares = [
        list(Work(MIXED, all_sides, LAYOUTS[layout], 30, rank, size).micro_batches(range(23))) for rank in range(size)
    ]
    assert len({len(share) for share in shares}) == 1
    positions = [position for share in shares for batch in share for position in batch.positions]
    assert sorted(positions) == list(range(23))
    loads = [sum(batch.sequences.input_ids.numel() for batch in share) for share in shares]
    assert size > 3 or max(loads) < 1.25 * min(loads)
    empty = [batch for share in shares for batch in share if not batch.positions]
    assert len(empty) >= 7 if size == 30 else size > 1 or not empty
    for batch in empty:
        assert batch.sequences.input_ids.numel() == 1 and batch.sequences.target.numel() == batch.label.numel() == 0


def test_sides_that_take_no_part_are_not_run() -> None:
    records = make_records(5)

    def chosen(side: Side) -> bool:
        return side.label > 0

    (batch,) = Work(records, chosen, LAYOUTS["shared"], 10_000).micro_batches(range(5))
    assert batch.label.tolist() == [1.0] * 5 and (batch.pair == -1).all()
    data = step_data(records, range(5), chosen)
    assert torch.equal(data.length.sort().values, batch.length.sort().values)


def test_a_micro_batch_moves_whole() -> None:
    moved = Work(make_records(3), all_sides, LAYOUTS["shared"], 100).collate([0, 2]).to(torch.device("meta"))
    assert moved.positions == [0, 2] and moved.sequences.rows is not None
    tensors = (moved.segment, moved.pair, moved.sequences.target, moved.sequences.rows.home)
    assert all(tensor.is_meta for tensor in tensors)


def test_kto_puts_each_prompt_before_the_next_records_responses() -> None:
    pair = Record("a", [5, 6], (Side(1, [7, 8, 9]), Side(-1, [10])))
    single = Record("b", [11, 12, 13], (Side(-1, [14, 15]),))
    last = Record("c", [16], (Side(1, [17] * 9), Side(-1, [18])))
    found = partners([pair, single, last], max_length=6)
    assert [(r.prompt_ids, [side.ids for side in r.sides]) for r in found] == [
        ([5, 6], [[14, 15], [14, 15]]),  # a pair after a single: as many mismatched responses as it has its own
        ([11, 12, 13], [[17] * 3]),  # cut to the room that the prompt leaves
        ([16], [[7, 8, 9], [10]]),  # the last one's partner is the first
    ]
    assert [[side.label for side in r.sides] for r in found] == [[1, -1], [-1], [1, -1]]


def test_kto_takes_partners_with_another_prompt() -> None:
    """A response to the same prompt would not be mismatched, however often and wherever the prompt comes again."""
    one, two = [5, 6], [7]
    records = [Record(str(i), p, (Side(1, [20 + i]),)) for i, p in enumerate([one, two, one, one, [5, 6]])]
    found = partners(records, max_length=9)
    assert [(r.prompt_ids, r.sides[0].ids) for r in found] == [
        (one, [21]), (two, [22]), (one, [21]), (one, [21]), (one, [21]),
    ]  # fmt: skip
    assert partners([records[0], records[2], records[4]], max_length=9) == []
    assert partners(records[:1], max_length=9) == []
