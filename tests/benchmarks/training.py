"""A whole training, or the head alone, against other trainers on the same records:

    pip install 'bnfctl[bench]'          (and liger-kernel on a GPU)
    python -m tests.benchmarks.training --shape head-heavy|body-heavy|1b [--part train|head|linear|budget]

Every trainer runs in a process of its own, one pass over the same random records, the same pairs per optimizer
step, no activation checkpointing, no evaluation, nothing saved while the clock runs; float32 on a CPU, bfloat16
over float32 masters on a GPU.  Peers run at their fastest batch size, found by a short probe.  Tokens are prompt +
response of both sequences of every pair, for everyone.  Rounds go through all trainers in turn, and the fastest
round of each counts.  --part linear: half the data should cost half.  --part budget: the largest micro-batch that
fits on the GPU.  On a machine with other load, --threads 1 --cpu-time counts CPU seconds.
The table goes to stdout, the same numbers to --out as CSV.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bnfctl.console import say, table
from tests.benchmarks import heads, ours, padded, peers
from tests.benchmarks.job import Job, Outcome
from tests.benchmarks.shapes import SHAPES, Counts, Shape, count, draw_records, write_records

ROOT = Path(__file__).resolve().parents[2]
TRAINERS = (*ours.NAMES, *padded.NAMES, *peers.NAMES)
PROBE_STEPS = 1
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
HEAD_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class Row:
    """A line of the table and the CSV; ratios are against the first trainer (ours, bnf) of the same run."""

    trainer: str
    rows: int | None
    train_s: float
    reference_s: float | None
    total_s: float
    tokens_per_s: float
    peak_mib: float
    start_mib: float
    step_ratio: float
    """Seconds of the optimizer steps, without a reference pass of its own."""
    total_ratio: float
    memory_ratio: float
    mfu: float | None
    note: str


def rows_of(outcomes: dict[str, Outcome], counts: Counts, peak_tflops: float | None, shared: bool) -> list[Row]:
    """Outcomes as lines.  Model FLOPs count a shared prompt once for our trainers, which may compute it once."""
    base = next(iter(outcomes.values()))
    lines = []
    for name, outcome in outcomes.items():
        peak = peak_tflops * 1e12 if peak_tflops else outcome.peak_flops
        flops = counts.flops_shared if shared and name in ours.NAMES else counts.flops
        lines.append(
            Row(
                trainer=name,
                rows=outcome.rows,
                train_s=outcome.train,
                reference_s=outcome.reference,
                total_s=outcome.total,
                tokens_per_s=counts.tokens / outcome.total,
                peak_mib=outcome.peak_mib,
                start_mib=outcome.start_mib,
                step_ratio=outcome.train / base.train,
                total_ratio=outcome.total / base.total,
                memory_ratio=outcome.peak_mib / base.peak_mib,
                mfu=flops / outcome.train / peak if peak else None,
                note=outcome.problem or outcome.note,
            )
        )
    return lines


def draw_table(title: str, rows: Sequence[Row]) -> str:
    """The lines for people; "-" where there is nothing to say."""
    columns = ("trainer", "rows", "reference s", "steps s", "total s", "tokens/s", "peak MiB", "of it imports",
               "steps x", "total x", "memory x", "MFU", "")  # fmt: skip
    cells = [
        (
            row.trainer, _cell(row.rows), _cell(row.reference_s, ".2f"), _cell(row.train_s, ".2f"),
            _cell(row.total_s, ".2f"), _cell(row.tokens_per_s, ",.0f"), _cell(row.peak_mib, ",.0f"),
            _cell(row.start_mib, ",.0f"), _cell(row.step_ratio, ".2f"), _cell(row.total_ratio, ".2f"),
            _cell(row.memory_ratio, ".2f"), _cell(row.mfu, ".1%"), row.note,
        )
        for row in rows
    ]  # fmt: skip
    return table(title, columns, cells, right=range(1, 12))


def write_csv(path: Path, shape: str, device: str, rows: Sequence[Row]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["shape", "device", *Row.__dataclass_fields__])
        for row in rows:
            values = vars(row).values()
            writer.writerow([shape, device, *("" if _missing(value) else value for value in values)])


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _cell(value: float | None, form: str = "") -> str:
    return "-" if _missing(value) else format(value, form)


class Bench:
    """A folder with the model and the records, and the processes that work on it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.shape = args, folder, SHAPES[args.shape]
        self.records = draw_records(self.shape, args.pairs or self.shape.pairs)
        write_records(folder / "records.json", self.records)
        made = self.run(self.job(args.shape))
        if made.problem:
            raise SystemExit(f"the model could not be made: {made.problem}")

    def job(self, name: str) -> Job:
        return Job(
            name=name,
            folder=str(self.folder / "model"),
            device=self.args.device,
            dtype="float32" if self.args.device == "cpu" else "bfloat16",
            batch_pairs=self.args.batch_pairs,
            micro_tokens=self.args.micro_tokens or (HEAD_TOKENS[self.args.device] if name in heads.NAMES else None),
            share_prompt=self.args.share_prompt,
            cpu_time=self.args.cpu_time,
        )

    def run(self, job: Job) -> Outcome:
        """The job in a new process; its output is shown where it fails."""
        asked, answer = self.folder / "job.json", self.folder / "outcome.json"
        job.write(asked)
        answer.unlink(missing_ok=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
                       "HF_HOME": str(self.folder / "hf"),
                       "OMP_NUM_THREADS": str(self.args.threads)}  # fmt: skip
        if job.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        else:
            environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with more, the peers would spread over them
        command = [sys.executable, "-m", "tests.benchmarks.child", str(asked), str(answer)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        outcome = Outcome.read(answer) if answer.exists() else Outcome(problem=f"died with {done.returncode}")
        if done.returncode:
            say("\n".join(done.stderr.strip().splitlines()[-6:]))
        return outcome

    def rows(self, name: str) -> tuple[int | None, str]:
        """(rows per forward pass of a peer, why it cannot run)."""
        if name in peers.NAMES:
            tried = peers.rows_to_try(name, self.args.batch_pairs)
        elif name in padded.NAMES:
            tried = padded.rows_to_try(self.args.batch_pairs)
        else:
            return None, ""
        if self.args.rows:
            return self.args.rows, ""
        found = self.run(replace(self.job(name), probe=tried, limit=PROBE_STEPS * self.args.batch_pairs))
        say(f"{name} by rows per forward pass: {found.problem or found.note}")
        return found.rows, found.problem


def compare(bench: Bench, names: Sequence[str]) -> dict[str, Outcome]:
    """The fastest round of each trainer."""
    jobs: dict[str, Job] = {}
    best: dict[str, Outcome] = {}
    for name in names:
        rows, problem = bench.rows(name)
        best[name] = Outcome(problem=problem)
        if not problem:
            jobs[name] = replace(bench.job(name), rows=rows)
    for round_ in range(bench.args.repeat):
        for name, job in jobs.items():
            outcome = bench.run(job)
            say(f"round {round_ + 1}: {name} {outcome.problem or f'{outcome.total:.2f} s, {outcome.peak_mib:.0f} MiB'}")
            if math.isnan(best[name].total) or outcome.total < best[name].total:
                best[name] = outcome
    return best


def linear(bench: Bench, name: str) -> str:
    """Seconds for all, half and a quarter of the records."""
    lines = []
    for share in (1, 2, 4):
        pairs = len(bench.records) // share
        tokens = count(bench.shape, bench.records[:pairs]).tokens
        runs = [bench.run(replace(bench.job(name), limit=pairs)) for _ in range(bench.args.repeat)]
        fastest = min(runs, key=lambda outcome: outcome.total)
        lines.append((pairs, tokens, fastest.total))
    whole = lines[0][2] / lines[0][1]
    cells = [(p, f"{t:,}", f"{s:.2f}", f"{1e3 * s / t:.4f}", f"{s / t / whole:.2f}") for p, t, s in lines]
    return table(f"{name}: cost by size of the data", ("pairs", "tokens", "s", "ms/token", "x"), cells, right=range(5))


def budget(bench: Bench, names: Sequence[str]) -> str:
    """The largest micro-batch that finishes one optimizer step: doubled until the GPU's memory is out."""
    tokens = count(bench.shape, bench.records).tokens
    mean = tokens / (2 * len(bench.records))
    cells = []
    for name in names:
        mine = name in ours.NAMES
        in_one = 1.0 if mine else mean * peers.SEQUENCES.get(name, 2)  # tokens of one row, ours: of one token
        size, fits, why = (4096 if mine else 1), 0, "all the data fits in one"
        while size * in_one <= tokens:
            one_step = replace(bench.job(name), batch_pairs=len(bench.records))
            outcome = bench.run(replace(one_step, micro_tokens=size) if mine else replace(one_step, rows=size))
            if outcome.problem:
                why = f"{size}: {outcome.problem}"
                break
            fits, size = size, size * 2
        cells.append((name, f"{fits} {'tokens' if mine else 'rows'}", f"{round(fits * in_one):,}", why))
    return table("largest micro-batch", ("trainer", "size", "tokens", "ended by"), cells, right=(1, 2))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.benchmarks.training", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), required=True)
    parser.add_argument("--part", choices=("train", "head", "linear", "budget"), default="train")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--only", help=f"comma-separated, the first is what ratios are against; of {', '.join(TRAINERS)}"
    )
    parser.add_argument("--pairs", type=int, help="default: the shape's")
    parser.add_argument("--batch-pairs", type=int, default=8, help="pairs per optimizer step")
    parser.add_argument("--micro-tokens", type=int, help="ours: tokens per micro-batch; for heads: tokens")
    parser.add_argument("--no-share-prompt", dest="share_prompt", action="store_false", help="ours: as it says")
    parser.add_argument("--rows", type=int, help="peers: rows per forward pass, without a probe")
    parser.add_argument("--repeat", type=int, default=2, help="rounds; the fastest counts")
    parser.add_argument("--threads", type=int, default=CORES, help="of every process")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, for a busy machine; with --threads 1")
    parser.add_argument("--peak-tflops", type=float, help="of the device, where it is not known")
    parser.add_argument("--out", type=Path, help="CSV")
    args = parser.parse_args(argv)
    known = heads.NAMES if args.part == "head" else TRAINERS
    default = ("bnf", "trl-sft", "trl-dpo", "trl-kto") if args.part == "budget" else known
    args.names = tuple(args.only.split(",")) if args.only else default
    unknown = [name for name in args.names if name not in known]
    if unknown:
        parser.error(f"--only: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    if args.part == "budget" and args.device == "cpu":
        parser.error("--part budget needs --device cuda")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        if args.part == "linear":
            print(linear(bench, args.names[0]))
            return
        if args.part == "budget":
            print(budget(bench, args.names))
            return
        outcomes = compare(bench, args.names)
        counts = count(bench.shape, bench.records)
        title = f"{args.shape}, {args.device}: {len(bench.records)} pairs, {counts.tokens:,} tokens, {counts.response:,} in responses"
        if args.part == "head":
            n = bench.job(heads.NAMES[0]).micro_tokens or 0
            counts = head_counts(bench.shape, n)
            title = f"the head of {args.shape}, {args.device}: {n:,} tokens"
        rows = rows_of(outcomes, counts, args.peak_tflops, args.share_prompt and args.part == "train")
        print(draw_table(title, rows))
        if args.out:
            write_csv(args.out, args.shape, args.device, rows)


def head_counts(shape: Shape, n: int) -> Counts:
    """One head, forward and backward, over `n` tokens."""
    flops = 6.0 * shape.head_parameters * n
    return Counts(tokens=n, response=n, flops=flops, flops_shared=flops)


if __name__ == "__main__":
    main()
