"""The parts of the training benchmark that need no training, and (marked bench) a small run of it."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from tests.benchmarks import padded, peers, shapes, training
from tests.benchmarks.job import Job, Outcome

TINY = shapes.SHAPES["tiny"]


def test_records_are_seeded_ragged_and_the_first_of_a_longer_draw(tmp_path: Path) -> None:
    records = shapes.draw_records(TINY, 8)
    assert records == shapes.draw_records(TINY, 20)[:8] != shapes.draw_records(TINY, 8, seed=1)
    assert len({len(r.prompt_ids) for r in records}) > 1
    assert all(side.ids.index(shapes.EOS) == len(side.ids) - 1 for r in records for side in r.sides)
    shapes.write_records(tmp_path / "r.json", records)
    assert shapes.read_records(tmp_path / "r.json") == records


def test_prompts_and_responses_have_the_lengths_of_the_shape() -> None:
    shape = shapes.SHAPES["head-heavy"]
    counts = shapes.count(shape, shapes.draw_records(shape, 2000))
    assert counts.response / 4000 == pytest.approx(shape.response, rel=0.03)
    assert counts.tokens / 4000 == pytest.approx(shape.prompt + shape.response, rel=0.03)


def test_words_mean_the_ids_after_a_prompt_too(tmp_path: Path) -> None:
    tokenizer = shapes.make_tokenizer(tmp_path, TINY.vocabulary)
    record = shapes.draw_records(TINY, 1)[0]
    words = shapes.text(record.prompt_ids) + shapes.text(record.sides[0].ids)
    assert tokenizer(words)["input_ids"] == record.prompt_ids + record.sides[0].ids


def test_model_flops_of_one_record_by_hand() -> None:
    record = shapes.Record("r", [3] * 5, (shapes.Side(1, [4, 1]), shapes.Side(-1, [5, 6, 1])))
    body = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    counts = shapes.count(TINY, [record])
    assert (counts.tokens, counts.response) == (15, 5)
    rest = 6 * 64 * 32 * 5
    attention = 6 * 32 * 2
    assert counts.flops == 6 * body * 15 + rest + attention * (7**2 + 8**2)
    assert counts.flops_shared == 6 * body * 10 + rest + attention * (7**2 + 8**2 - 5**2)


def test_collated_targets_are_the_responses() -> None:
    records = shapes.draw_records(TINY, 3)
    batch = padded.collate(records, "cpu")
    sides = [r.sides[0] for r in records] + [r.sides[1] for r in records]
    for row, side in enumerate(sides):
        assert batch.target[row][batch.trained[row]].tolist() == side.ids
        assert batch.label[row] == side.label


def test_rows_divide_a_step() -> None:
    assert peers.rows_to_try("trl-sft", 8) == (1, 2, 4, 8, 16)
    assert peers.rows_to_try("trl-kto", 8) == (2, 4, 8, 16)
    assert peers.rows_to_try("trl-dpo", 8) == padded.rows_to_try(8) == (1, 2, 4, 8)
    assert padded.rows_to_try(6) == (1, 2)


def test_table_and_csv(tmp_path: Path) -> None:
    outcomes = {
        "bnf": Outcome(train=2.0, reference=0.5, peak_mib=100, start_mib=50),
        "trl-dpo": Outcome(train=10.0, peak_mib=300, start_mib=60, rows=4, note="live"),
        "trl-kto": Outcome(problem="not run: needs trl"),
    }
    counts = shapes.Counts(tokens=1000, response=500, flops=4e12, flops_shared=2e12)
    rows = training.rows_of(outcomes, counts, 10.0, True)
    assert [row.tokens_per_s for row in rows[:2]] == [400, 100]
    assert (rows[1].total_ratio, rows[1].step_ratio, rows[1].memory_ratio) == (4, 5, 3)
    assert (rows[0].mfu, rows[1].mfu) == (0.1, 0.04)
    drawn = training.draw_table("title", rows).splitlines()
    assert next(line for line in drawn if "trl-dpo" in line).split() == (
        ["trl-dpo", "4", "-", "10.00", "10.00", "100", "300", "60", "5.00", "4.00", "3.00", "4.0%", "live"]
    )
    training.write_csv(tmp_path / "out.csv", "tiny", "cpu", rows)
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [(line["trainer"], line["total_s"], line["note"]) for line in read] == [
        ("bnf", "2.5", ""), ("trl-dpo", "10.0", "live"), ("trl-kto", "", "not run: needs trl"),
    ]  # fmt: skip


def test_a_job_goes_through_its_file(tmp_path: Path) -> None:
    job = Job("bnf", "/x", "cpu", "float32", 8, 2048, probe=(1, 2))
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job
    Outcome(train=1.0, reference=2.0).write(tmp_path / "outcome.json")
    assert Outcome.read(tmp_path / "outcome.json").total == 3.0
    Outcome(problem="no").write(tmp_path / "outcome.json")
    assert math.isnan(Outcome.read(tmp_path / "outcome.json").total)


@pytest.mark.bench
@pytest.mark.parametrize("part", ["train", "head", "linear"])
def test_a_tiny_run(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = {"train": "bnf,sft-all,sft,dpo,kto,appendix-b", "linear": "bnf"}.get(part)
    more = ["--only", only] if only else []
    training.main(["--shape", "tiny", "--part", part, "--repeat", "1", "--out", str(tmp_path / "out.csv"), *more])
    shown = capsys.readouterr().out
    print(shown)
    assert "failed" not in shown and "died" not in shown
