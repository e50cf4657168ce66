"""A folder with small items of every task in the published schemas, and a judge for them whose verdicts are known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bnfctl.tasks.wildbench_pairs import REFERENCES
from tests.tasks.judged_world import arena_files, by_length, theirs, wild_row, write
from tests.tasks.test_zeroeval import CRUX, GSM, MATH, MMLU

TAGS = (("Math",), ("Coding & Debugging",), ("Creative Writing",), ("Advice seeking",))
EVERY_TASK = ("lab-chat", "lab-reasoning", "lab-math", "gsm8k", "math-l5", "crux", "mmlu-redux", "arena-hard",
              "wildbench", "wildbench-pairs", "shifts")  # fmt: skip


def data(folder: Path, count: int = 4) -> Path:
    """`count` items of each task; what the baselines responded too."""
    for name, rows in (("gsm8k", GSM), ("math-l5", MATH), ("crux", CRUX), ("mmlu-redux", MMLU)):
        write(folder / f"{name}.jsonl", [{**rows[n % len(rows)], "id": f"{name}-{n}"} for n in range(count)])
    arena_files(folder, count, 2024)
    write(folder / "wildbench.jsonl", [wild_row(n, TAGS[n % 4]) for n in range(count)])
    for reference in REFERENCES:
        outputs = [{"session_id": f"s{n}", "output": [theirs(n)], "generator": reference} for n in range(count)]
        write(folder / "wildbench-outputs" / f"{reference}.jsonl", outputs)
    return folder


def say(body: dict[str, Any], child: int) -> str:
    """Arena-Hard: the longer response wins.  WildBench: a score by the item's number; the references always lose a little."""
    text = "".join(message["content"] for message in body["messages"])
    if "assistant A" in text:
        return by_length(body, child)
    if "response A" in text:
        first = re.search(r"<<< response A \w+\n(theirs )?", text)
        assert first
        return json.dumps({"analysis of A": "a", "choice": "B+" if first[1] else "A+"})
    number = re.search(r"Is (\d+) right", text)
    assert number
    return json.dumps({"strengths": "s", "weaknesses": "w", "score": str(1 + int(number[1]) % 10)})
