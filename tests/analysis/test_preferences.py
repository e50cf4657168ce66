"""The report of a build: counts by hand, on any cut into shards, and nothing that a terminal would obey."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bnfctl import shards
from bnfctl.analysis import preferences
from bnfctl.analysis.preferences import as_text, one_line, report
from bnfctl.artifact import Artifact, Plan, Store
from bnfctl.config import BuildConfig
from bnfctl.data import pairing
from tests.conftest import Done

Row = dict[str, Any]


def row(name: str, split: str = "train", **sides: tuple[str, float | None, list[int] | None]) -> Row:
    made: Row = {
        "record_id": name,
        "prompt_id": name,
        "split": split,
        "prompt": [{"role": "user", "content": f"{name}?"}],
    }
    for side, (text, reward, ids) in sides.items():
        made |= {f"{side}_text": text, f"{side}_reward": reward, f"{side}_ids": ids}
    return made


def publish(store: Store, rows: list[Row], seed: int = 0) -> Artifact:
    with store.draft(Plan("build", 2, BuildConfig(input="x", seed=seed), {})) as draft:
        draft.open()
        shards.write_shards(draft.path / "rows", rows, pairing.SCHEMA)
        return draft.publish({"records": len(rows)})


ROWS = [
    row("a", chosen=("good", 1.0, [1, 2, 3, 4]), rejected=("bad", 0.0, [1, 2])),
    row("b", chosen=("the sum is 12.", 1.0, [1, 2]), rejected=("the sum is 13.", 0.5, [1, 2, 3])),
    row("c", "test", chosen=("yes", 0.5, [1]), rejected=("no", 0.0, [2])),
    row("d", chosen=("alone", None, None)),
    row("e", rejected=("alone too", 0.0, [1])),
]


def test_every_part_by_hand(store: Store) -> None:
    found = report(publish(store, ROWS))
    assert found["rewards"] == {
        "bins": [[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]], "counts": {"chosen": [0, 1, 2], "rejected": [3, 1, 0]},
        "means": {"chosen": pytest.approx(2.5 / 3), "rejected": pytest.approx(0.125)},
    }  # fmt: skip
    assert found["margins"] == {
        "bins": [[0.5, 0.5], [1.0, 1.0]],
        "counts": {"pairs": [2, 1]},
        "means": {"pairs": pytest.approx(2 / 3)},
    }
    assert found["length"] == {  # the single responses count as characters, and one of them has no ids
        "unit": "characters", "chosen": pytest.approx((4 + 14 + 3 + 5) / 4), "rejected": pytest.approx((3 + 14 + 2 + 9) / 4),
        "difference": pytest.approx(-0.5), "pairs": 3, "chosen_longer": pytest.approx(2 / 3), "rejected_longer": 0,
    }  # fmt: skip
    assert found["near_equal"] == {"below": 0.1, "share": pytest.approx(1 / 3), "sampled": 3, "pairs": 3}
    assert found["labels"] == {"test": {"+1": 1, "-1": 1}, "train": {"+1": 3, "-1": 3}}
    examples = {example["record_id"]: example for example in found["examples"]}
    assert set(examples) == set("abcde")
    assert examples["d"] == {
        "record_id": "d",
        "split": "train",
        "prompt": "d?",
        "chosen": {"text": "alone", "reward": None},
    }


def test_lengths_are_tokens_where_all_ids_are_known(store: Store) -> None:
    found = report(publish(store, [one for one in ROWS if one["record_id"] != "d"]))
    assert found["length"] == {
        "unit": "tokens", "chosen": pytest.approx(7 / 3), "rejected": pytest.approx(7 / 4),
        "difference": pytest.approx(7 / 12), "pairs": 3, "chosen_longer": pytest.approx(1 / 3),
        "rejected_longer": pytest.approx(1 / 3),
    }  # fmt: skip
    assert (
        "length in tokens, on average: chosen 2.3, rejected 1.8, a difference of +0.6; chosen is longer in 33.3%"
        in as_text(found)
    )
    one_side = report(publish(store, ROWS[4:], seed=1))
    assert "length in tokens, on average: rejected 1.0\n" in as_text(one_side)


def test_many_values_fall_into_ten_bins(store: Store) -> None:
    rows = [row(f"r{i}", chosen=("x", i / 99, None), rejected=("y", -1.0, None)) for i in range(100)]
    rewards = report(publish(store, rows))["rewards"]
    assert rewards["bins"][0][0] == -1 and rewards["bins"][-1][1] == 1 and len(rewards["bins"]) == 10
    assert rewards["counts"]["rejected"] == [100] + [0] * 9
    assert rewards["counts"]["chosen"] == [0] * 5 + [20] * 5
    assert all(before[1] == after[0] for before, after in zip(rewards["bins"], rewards["bins"][1:], strict=False))


def test_rewards_at_the_ends_of_the_range_have_bins_too(store: Store) -> None:
    rows = [row(f"r{i}", chosen=("x", i * 1e307, None), rejected=("y", -i * 1e307, None)) for i in range(1, 13)]
    found = report(publish(store, rows))
    rewards = found["rewards"]
    json.dumps(found, allow_nan=False)
    assert "rewards" in as_text(found)
    assert rewards["bins"][0][0] == -1.2e308 and rewards["bins"][-1][1] == 1.2e308
    assert rewards["counts"]["chosen"] == [0, 0, 0, 0, 0, 2, 2, 3, 2, 3]


def test_shards_and_batches_leave_no_trace(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(f"r{i}", "train" if i % 9 else "test", chosen=(f"answer {i}" * (i % 5 + 1), i % 7 / 3, [1] * (i % 11)),
                rejected=(f"answer {i + 1}", -i % 13 / 5, [1] * (i % 6))) for i in range(300)]  # fmt: skip
    whole = report(publish(store, rows))  # the last digit of a mean may depend on the order of its sum
    monkeypatch.setattr(shards, "SHARD_ROWS", 37)
    monkeypatch.setattr(preferences, "_BATCH", 10)
    cut = report(publish(store, rows, seed=1))
    assert as_text(cut) == as_text(whole) and cut["rewards"]["counts"] == whole["rewards"]["counts"]
    assert len(whole["examples"]) == 10
    monkeypatch.setattr(preferences, "SAMPLE", 25)
    sampled = report(publish(store, rows, seed=1))["near_equal"]
    assert (sampled["sampled"], sampled["pairs"]) == (25, 300)
    assert "25 of 300 pairs, drawn by hash" in as_text({**whole, "near_equal": sampled})


def test_a_build_of_single_responses_without_rewards(store: Store) -> None:
    found = report(publish(store, [row("a", chosen=("x", None, None)), row("b", rejected=("y", None, None))]))
    assert (found["rewards"], found["margins"], found["near_equal"]) == (None,) * 3
    lines = as_text(found).splitlines()
    assert "rewards: no rewards in this build" in lines and "nearly equal: no pairs" in lines
    assert "50.0%" in next(line for line in lines if line.startswith(" train"))


def test_bars_are_as_long_as_the_counts(store: Store) -> None:
    rows = [row(f"r{i}", chosen=("x", float(i % 4 == 0), None)) for i in range(16)]
    lines = as_text(report(publish(store, rows))).splitlines()
    bars = {int(cells[1]): cells[2] for line in lines if (cells := line.split()) and cells[0] in ("0", "1")}
    assert bars == {12: "#" * 24, 4: "#" * 8}


def test_examples_are_one_line_and_obey_no_terminal(store: Store) -> None:
    hostile = "two\nlines\x1b[31m red \u202e back \u200b end " + "long " * 100
    assert one_line("a\tb\x1b[0m\u202eé字") == "a\\tb\\x1b[0m\\u202eé字"
    text = as_text(report(publish(store, [row("r\n1", chosen=(hostile, 1.0, None), rejected=("fine", 0.0, None))])))
    example = text[text.index("examples") :].splitlines()
    assert len(example) == 5 and all(len(line) <= 123 for line in example)
    assert example[2].startswith("r\\n1 (train): r\\n1?")
    assert example[3].startswith("  +1 [1] two\\nlines\\x1b[31m red \\u202e back \\u200b end") and example[3].endswith(
        "..."
    )
    assert all(character.isprintable() or character == "\n" for character in text)


def test_show_prints_the_report_and_gives_it_as_data(bnfctl: Callable[..., Done], tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")
    made = publish(store, ROWS)
    shown = bnfctl("show", made.ref)
    assert shown.code == 0 and shown.err == ""
    assert "\nexamples, drawn by hash\n" in shown.out and "nearly equal: 33.3%" in shown.out
    document = bnfctl("show", made.ref, "--json").json
    assert document["report"] == json.loads(json.dumps(report(made)))
    assert document["key"] == made.manifest.key
