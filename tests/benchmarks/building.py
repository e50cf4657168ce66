"""build of 300,000 scored candidates (60,000 prompts of 5 responses, about 300 tokens each), and of a tenth of them:

    python -m tests.benchmarks.building [--prompts 60000] [--choose best-worst] [--runs 2]

Each input is made and each build runs in a process of its own.  The tenth says whether time grows with the rows and
memory does not.  Times are the fastest of the runs, of the stage alone: reading, choosing, writing, hashing, fsync.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bnfctl.console import table
from tests.benchmarks.clock import count_cpu_time, now, resident_mib

ROOT = Path(__file__).resolve().parents[2]
RESPONSES, TOKENS, CHARS = 5, 300, 4
"""Per prompt; per response, on average; per token."""
PROMPT_TOKENS = 150
SECONDS, MIB = 20.0, 1000.0
"""The goal at 60,000 prompts."""


@dataclass(frozen=True)
class Outcome:
    """What one build took."""

    seconds: float
    peak_mib: float
    start_mib: float
    """Peak before the build: Python, Arrow and bnfctl."""
    records: int
    input_mib: float
    choose: str


def make_input(home: Path, prompts: int) -> None:
    """A generate and a score artifact of random candidates; the same for the same number of prompts."""
    from bnfctl import shards
    from bnfctl.artifact import Artifact, Pinned, Plan, Store
    from bnfctl.config import GenerateConfig, ScoreConfig
    from bnfctl.data import candidates

    store = Store(home)

    def publish(
        stage: str, config: object, inputs: dict[str, Pinned], tables: Iterator[pa.Table], schema: pa.Schema
    ) -> Artifact:
        with store.draft(Plan(stage, 1, config, inputs)) as draft:
            draft.open()
            shards.write_tables(draft.path / "rows", shards.recut(tables, schema))
            return draft.publish({"prompts": prompts, "candidates": prompts * RESPONSES, "tokenizer": None})

    made = publish("generate", GenerateConfig(prompts="synthetic"), {}, candidate_tables(prompts), candidates.SCHEMA)
    schema = pa.schema(
        [("prompt_id", pa.string()), ("sample", pa.int32()), ("reward", pa.float64()), ("extra", pa.string())]
    )
    publish("score", ScoreConfig(input=made.ref), {"input": made.pinned()}, score_tables(prompts), schema)


def _parts(prompts: int) -> Iterator[tuple[list[str], int, np.random.Generator]]:
    """(prompt ids, candidates, generator) of 2,000 prompts at a time."""
    for start in range(0, prompts, 2000):
        ids = [f"prompt-{number:07d}" for number in range(start, min(start + 2000, prompts))]
        yield ids, len(ids) * RESPONSES, np.random.default_rng(start)


def candidate_tables(prompts: int) -> Iterator[pa.Table]:
    """Tables of candidates.SCHEMA, made without a Python object per token."""
    from bnfctl import shards
    from bnfctl.data import candidates

    for ids, count, draw in _parts(prompts):
        of_prompt = np.repeat(np.arange(len(ids)), RESPONSES)
        tokens = draw.integers(TOKENS // 2, TOKENS * 3 // 2, count)
        asked = draw.integers(PROMPT_TOKENS // 2, PROMPT_TOKENS * 3 // 2, len(ids))
        content = _texts(draw, asked * CHARS)
        turns = pa.StructArray.from_arrays([pa.array(["user"] * len(ids)), content], ["role", "content"])
        messages = pa.ListArray.from_arrays(pa.array(np.arange(len(ids) + 1), pa.int32()), turns)
        columns = {
            "prompt_id": pa.array(ids).take(pa.array(of_prompt)),
            "prompt": messages.cast(shards.MESSAGES).take(pa.array(of_prompt)),
            "sample": pa.array(np.tile(np.arange(RESPONSES), len(ids)), pa.int32()),
            "text": _texts(draw, tokens * CHARS),
            "token_ids": _ids(draw, tokens),
            "finish_reason": pa.array(["stop", "length"]).take(pa.array((draw.random(count) < 0.05).astype(np.int64))),
            "prompt_ids": _ids(draw, asked).take(pa.array(of_prompt)),
        }
        empty = {field.name: pa.nulls(count, field.type) for field in candidates.SCHEMA if field.name not in columns}
        yield pa.table({**columns, **empty}).select(candidates.SCHEMA.names).cast(candidates.SCHEMA)


def score_tables(prompts: int) -> Iterator[pa.Table]:
    """One reward per candidate, normally distributed, one in a hundred missing."""
    for ids, count, draw in _parts(prompts):
        yield pa.table({
            "prompt_id": pa.array(ids).take(pa.array(np.repeat(np.arange(len(ids)), RESPONSES))),
            "sample": pa.array(np.tile(np.arange(RESPONSES), len(ids)), pa.int32()),
            "reward": pa.array(draw.normal(size=count), mask=draw.random(count) < 0.01),
            "extra": pa.nulls(count, pa.string()),
        })  # fmt: skip


def _texts(draw: np.random.Generator, lengths: np.ndarray) -> pa.Array:
    """Random words of letters and spaces with these numbers of characters."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    letters = np.frombuffer(b"etaoin shrdlu  cmfwyp", np.uint8)[draw.integers(0, 21, offsets[-1], np.uint8)]
    return pa.StringArray.from_buffers(len(lengths), pa.py_buffer(offsets), pa.py_buffer(letters))


def _ids(draw: np.random.Generator, lengths: np.ndarray) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = (128000 * draw.random(offsets[-1]) ** 3).astype(np.int32)  # frequent ids are small ones
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def measure(home: Path, choose: str, cpu_time: bool, threads: int | None) -> Outcome:
    """Build once in this process."""
    from bnfctl import launch
    from bnfctl.artifact import Store
    from bnfctl.config import BuildConfig
    from bnfctl.stages import build

    if threads is not None:
        pa.set_cpu_count(threads)
        pa.set_io_thread_count(threads)
    if cpu_time:
        count_cpu_time()
    store = Store(home)
    (scores,) = store.artifacts("score")
    (candidates,) = store.artifacts("generate")
    assert build.STAGE == "build"  # loaded before the clock starts
    thresholds: dict[str, Any] = {"good": 1.0, "bad": -1.0} if choose == "threshold" else {}
    config = BuildConfig(input=scores.ref, choose=choose, **thresholds)
    start, started = resident_mib(), now()
    made = launch.execute("build", config, store, force=True).artifact
    seconds = now() - started
    size = sum(entry["size"] for entry in candidates.manifest.files) / 2**20
    return Outcome(seconds, resident_mib(), start, made.manifest.summary["records"], size, choose)


def _child(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.benchmarks.building", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def report(outcomes: dict[int, Outcome]) -> str:
    """The table, and what it says about the goal."""
    rows = [
        [f"{prompts * RESPONSES:,}", outcome.choose, f"{outcome.input_mib:.0f}", f"{outcome.records:,}", f"{outcome.seconds:.2f}",
         f"{prompts * RESPONSES / outcome.seconds:,.0f}", f"{outcome.peak_mib:.0f}", f"{outcome.start_mib:.0f}"]
        for prompts, outcome in outcomes.items()
    ]  # fmt: skip
    columns = ["candidates", "rule", "input MiB", "records", "seconds", "candidates/s", "peak MiB", "at start"]
    few, many = (outcomes[prompts] for prompts in (min(outcomes), max(outcomes)))
    times = max(outcomes) / min(outcomes)
    lines = [
        table("", columns, rows, right=(0, 2, 3, 4, 5, 6, 7)),
        f"{times:g} times the rows: {many.seconds / few.seconds:.1f} times the seconds, "
        f"{many.peak_mib / few.peak_mib:.2f} times the memory",
    ]
    if max(outcomes) == 60_000 and many.choose == "best-worst":
        met = many.seconds < SECONDS and many.peak_mib < MIB
        lines.append(f"goal: under {SECONDS:g} s and {MIB:g} MiB for 300,000: {'met' if met else 'missed'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60_000)
    parser.add_argument("--choose", default="best-worst")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of Arrow")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds: other load matters less")
    parser.add_argument("--folder", type=Path, help="keep the inputs here, to use them again")
    parser.add_argument("--only", choices=("input", "build"), help="what a child does")
    options = parser.parse_args()
    if options.only == "input":
        make_input(options.folder, options.prompts)
    elif options.only == "build":
        print(json.dumps(asdict(measure(options.folder, options.choose, options.cpu_time, options.threads))))
    elif options.folder is not None:
        print(report(_compare(options.folder, options)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            print(report(_compare(Path(folder), options)))


def _compare(folder: Path, options: argparse.Namespace) -> dict[int, Outcome]:
    more = ["--cpu-time"] * options.cpu_time + (["--threads", str(options.threads)] if options.threads else [])
    outcomes: dict[int, Outcome] = {}
    for prompts in (max(1, options.prompts // 10), options.prompts):
        home = str(folder.absolute() / str(prompts))
        if not Path(home, "score").is_dir():
            _child("--only", "input", "--folder", home, "--prompts", str(prompts))
        for _ in range(options.runs):
            lines = _child("--only", "build", "--folder", home, "--choose", options.choose, *more).splitlines()
            outcome = Outcome(**json.loads(lines[-1]))
            best = outcomes.get(prompts, outcome)
            outcomes[prompts] = min(best, outcome, key=lambda found: found.seconds)
    return outcomes


if __name__ == "__main__":
    main()
