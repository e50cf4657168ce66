"""The rows of the evals, task by task and model by model: only the columns that figures need, lengths in place of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bnfctl.artifact import Artifact
from bnfctl.options import canonical
from bnfctl.report.sources import Run, Sources
from bnfctl.report.table import printable
from bnfctl.tasks.judged_rows import from_row
from bnfctl.tasks.judging import Judged
from bnfctl.tasks.statistics import DRAWS, Array

JUDGED = ("wildbench", "wildbench-pairs", "arena-hard")
SHIFTS = "shifts"
"""A task without items to grade."""
ORDER = ("wildbench", "wildbench-pairs", "arena-hard", "gsm8k", "math-l5", "crux", "mmlu-redux")
"""The paper's columns; tasks of one's own follow."""
TITLES = {
    "wildbench": "Wild-Bench", "wildbench-pairs": "Wild-Bench pairs", "arena-hard": "Arena-Hard", "gsm8k": "GSM8K",
    "math-l5": "MATH", "crux": "CRUX", "mmlu-redux": "MMLU",
}  # fmt: skip
_BATCH = 2048


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one task and model in one artifact; K items."""

    items: tuple[str, ...]
    grades: Array
    """[K]; NaN where there is none."""
    tokens: Array
    """[K]; NaN where they are not known."""
    characters: Array
    """[K] of the responses; NaN where they are not known."""
    judged: tuple[Judged, ...] = ()
    """Of judged tasks; without prompts, responses and the judge's texts."""


@dataclass(frozen=True, eq=False)
class Result:
    """What one eval says about one run on one task."""

    run: Run
    artifact: Artifact
    task: str
    rows: Rows

    @property
    def figures(self) -> Mapping[str, Any]:
        """The summary's figures of this model."""
        found: Mapping[str, Any] = self.table["models"][self.run.name_in(self.artifact)]
        return found

    @property
    def table(self) -> Mapping[str, Any]:
        """The summary of the task."""
        found: Mapping[str, Any] = self.artifact.manifest.summary["tasks"][self.task]
        return found

    @property
    def judge(self) -> Mapping[str, Any] | None:
        """The judge's fingerprint."""
        return self.figures.get("judge")

    @cached_property
    def protocol(self) -> bytes:
        """Results of different protocols do not compare: version, judge, unit of the lengths."""
        judge = self.judge["digest"] if self.judge else None
        units = sorted({row.extra["unit"] for row in self.rows.judged if "unit" in row.extra})
        return canonical([self.table.get("version"), judge, units])

    @property
    def source(self) -> str:
        """Where its numbers come from, for people."""
        return f"{self.artifact.ref}, model {printable(self.run.name_in(self.artifact))}"


class Evidence:
    """The results of all runs; each artifact is read once."""

    def __init__(self, sources: Sources, draws: int = DRAWS) -> None:
        """draws: resamples of the intervals made of it.  Raises BnfctlError where rows are not what they were."""
        self.sources, self.draws = sources, draws
        self.runs = tuple({run.ref: run for method in sources.methods for run in method.runs}.values())
        read = {artifact.ref: _read(artifact) for artifact in sources.evals}
        self._results: list[Result] = []
        for run in self.runs:
            for artifact in run.evals:
                for task in artifact.manifest.summary["tasks"]:
                    rows = read[artifact.ref].get((task, run.name_in(artifact)))
                    if rows is not None:
                        self._results.append(Result(run, artifact, task, rows))

    @property
    def tasks(self) -> list[str]:
        """The tasks with grades, in the paper's order, then by name."""
        found = {result.task for result in self._results}
        return [task for task in ORDER if task in found] + sorted(found - set(ORDER))

    def of_task(self, task: str) -> list[Result]:
        """All results of a task."""
        return [result for result in self._results if result.task == task]

    def protocols(self, task: str, runs: Iterable[Run]) -> dict[bytes, dict[str, Result]]:
        """Protocol by protocol: run's ref -> its result; of two alike the one with more items, then the later one."""
        wanted = {run.ref for run in runs}
        found: dict[bytes, dict[str, Result]] = {}
        for result in self.of_task(task):
            if result.run.ref in wanted:
                mine = found.setdefault(result.protocol, {})
                earlier = mine.get(result.run.ref)
                if earlier is None or len(result.rows.items) >= len(earlier.rows.items):
                    mine[result.run.ref] = result
        return found


def title_of(task: str) -> str:
    """A task's name in a heading."""
    return TITLES.get(task, task)


def _read(artifact: Artifact) -> dict[tuple[str, str], Rows]:
    """(task, model) -> its rows, each in the artifact's order."""
    judged = any(task in JUDGED for task in artifact.manifest.summary["tasks"])
    columns = ["task", "model", "item_id", "grade", "tokens", *(["extra"] if judged else [])]
    tables = []
    for shard in artifact.shards():
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=_BATCH, columns=[*columns, "response"]):
                table = pa.Table.from_batches([batch])
                lengths = pc.utf8_length(table["response"])
                # A judgment of elsewhere may come without the response.
                unknown = pc.and_(pc.equal(lengths, 0), pc.is_null(table["tokens"]))
                lengths = pc.if_else(unknown, None, lengths)
                tables.append(table.select(columns).append_column("characters", lengths))
    if not tables:
        return {}
    whole = pa.concat_tables(tables)
    groups = whole.select(["task", "model"]).group_by(["task", "model"], use_threads=False).aggregate([])
    found = {}
    for group in groups.to_pylist():
        task, model = group["task"], group["model"]
        mine = whole.filter(pc.and_(pc.equal(whole["task"], task), pc.equal(whole["model"], model)))
        found[task, model] = Rows(
            tuple(mine["item_id"].to_pylist()), _numbers(mine["grade"]), _numbers(mine["tokens"]),
            _numbers(mine["characters"]), _judged(mine) if task in JUDGED else (),
        )  # fmt: skip
    return found


def _judged(table: pa.Table) -> tuple[Judged, ...]:
    columns = table.select(["task", "model", "item_id", "grade", "extra"])
    return tuple(from_row({**row, "answers": "{}"}) for row in columns.to_pylist())


def _numbers(column: pa.ChunkedArray) -> Array:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)


def shared_items(results: Sequence[Result]) -> tuple[str, ...]:
    """The items that all of them have, in the order of the first."""
    common = set.intersection(*(set(result.rows.items) for result in results)) if results else set()
    return tuple(item for item in results[0].rows.items if item in common) if results else ()
