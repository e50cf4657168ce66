"""The process that one trainer runs in: python -m tests.benchmarks.child job.json outcome.json"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

from bnfctl.data.records import Record
from tests.benchmarks import heads, ours, padded, peers
from tests.benchmarks.clock import count_cpu_time, resident_mib
from tests.benchmarks.job import MEGA, Job, NotRunError, Outcome, Timing
from tests.benchmarks.shapes import SHAPES, make_model, read_records


def main(job_path: Path, outcome_path: Path) -> None:
    job = Job.read(job_path)
    if job.name in SHAPES:
        make_model(Path(job.folder), SHAPES[job.name])
        Outcome().write(outcome_path)
        return
    if job.cpu_time:
        count_cpu_time()
    try:
        outcome = _measure(job)
    except NotRunError as error:
        outcome = Outcome(problem=str(error))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        outcome = Outcome(problem=f"failed: {type(error).__name__}: {lines[0][:160]}")
        outcome.write(outcome_path)
        raise
    outcome.write(outcome_path)


def _measure(job: Job) -> Outcome:
    import torch

    _load(job)
    records = read_records(Path(job.folder).parent / "records.json")[: job.limit]
    start = resident_mib()
    if job.probe:
        return _fastest(job, records)
    timing = _run(job, records)
    peak = torch.cuda.max_memory_allocated() / MEGA if job.device != "cpu" else timing.peak_mib or resident_mib()
    return Outcome(timing.train, timing.reference, peak, start, _peak_flops(job), job.rows, timing.note)


def _peak_flops(job: Job) -> float | None:
    import torch

    from bnfctl.training.speed import PEAK_FLOPS

    name = torch.cuda.get_device_name() if job.device != "cpu" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def _load(job: Job) -> None:
    if job.name in peers.NAMES:
        peers.load()
    elif job.name in padded.NAMES:
        padded.load(job)
    elif job.name in ours.NAMES:
        ours.load()


def _run(job: Job, records: list[Record]) -> Timing:
    if job.name in peers.NAMES:
        return peers.train(job, records)
    if job.name in padded.NAMES:
        return padded.train(job, records)
    if job.name in heads.NAMES:
        return heads.run(job)
    return ours.train(job, records)


def _fastest(job: Job, records: list[Record]) -> Outcome:
    """The number of rows per forward pass with the least time; one that does not fit is passed over."""
    import torch

    def seconds(rows: int) -> float:
        try:
            return _run(replace(job, rows=rows), records).train
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return math.inf

    seconds(job.probe[0])  # warms up
    tried = {rows: seconds(rows) for rows in job.probe}
    note = ", ".join(f"{rows}: {time:.2f} s" for rows, time in tried.items())
    return Outcome(rows=min(tried, key=tried.__getitem__), note=note)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
