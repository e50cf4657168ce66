"""The build benchmark on a few prompts: its input is one that build takes, and its table says what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bnfctl.artifact import Store
from tests.benchmarks import building

PROMPTS = 40


def test_its_input_builds(tmp_path: Path) -> None:
    building.make_input(tmp_path, PROMPTS)
    (candidates,) = Store(tmp_path).artifacts("generate")
    rows = list(candidates.rows())
    assert len(rows) == PROMPTS * building.RESPONSES
    assert [(row["prompt_id"], row["sample"]) for row in rows[:6]] == [("prompt-0000000", i) for i in range(5)] + [
        ("prompt-0000001", 0)
    ]
    assert 250 < np.mean([len(row["token_ids"]) for row in rows]) < 350
    assert all(len(row["text"]) == building.CHARS * len(row["token_ids"]) for row in rows)
    outcome = building.measure(tmp_path, "best-worst", cpu_time=False, threads=None)
    (made,) = Store(tmp_path).artifacts("build")
    assert outcome.records == made.manifest.summary["records"] == PROMPTS
    assert outcome.seconds > 0 and outcome.peak_mib >= outcome.start_mib > 0


def test_the_table_compares_few_with_many() -> None:
    few = building.Outcome(0.5, 200, 80, 6_000, 46, "best-worst")
    many = building.Outcome(5.0, 300, 80, 60_000, 460, "best-worst")
    text = building.report({6_000: few, 60_000: many})
    assert "10 times the rows: 10.0 times the seconds, 1.50 times the memory" in text
    assert "300,000: met" in text
    slow = building.Outcome(25.0, 300, 80, 60_000, 460, "best-worst")
    assert "300,000: missed" in building.report({6_000: few, 60_000: slow})
    assert "goal" not in building.report({6_000: few, 12_000: few})
