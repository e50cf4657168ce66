"""What a build is like: rewards, margins, lengths, pairs that are nearly equal, labels, and a few records to read.

Streams: a few numbers per bin, and the texts of a fixed sample, are all that is in memory.  The sample is drawn by
hash of the record ids, so that the same build gives the same report.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bnfctl import console
from bnfctl.artifact import Artifact
from bnfctl.data.pairing import SIDES, uniform

BINS = 10
NEAR = 0.1
"""Pairs with a smaller edit distance, as a share of the longer text, are nearly equal."""
EXAMPLES = 10
SAMPLE = 2000
"""Pairs whose edit distance is computed at most: it grows with the square of their length."""
LABELS = {"chosen": "+1", "rejected": "-1"}
_WIDTH = 120
"""Characters of an example's line."""
_BAR = 24
_BATCH = 2048

Numbers = np.ndarray[Any, np.dtype[np.float64]]


def report(artifact: Artifact) -> dict[str, Any]:
    """The whole report as data; parts that the build says nothing about (rewards, pairs) are None."""
    paths = list(artifact.shards())
    rewards, margins = Histogram(SIDES), Histogram(("pairs",))
    for batch in _batches(paths, [f"{side}_reward" for side in SIDES]):
        for side, values, gap in _rewards(batch):
            rewards.widen(side, values)
            margins.widen("pairs", gap)
    lengths, pairs, examples = _Lengths(), _Sample(SAMPLE), _Sample(EXAMPLES)
    labels: dict[str, Counter[str]] = {}
    columns = [
        "record_id",
        "split",
        "prompt",
        *(f"{side}_{name}" for side in SIDES for name in ("text", "ids", "reward")),
    ]
    for batch in _batches(paths, columns):
        for side, values, gap in _rewards(batch):
            rewards.add(side, values)
            margins.add("pairs", gap)
        paired = pc.and_(pc.is_valid(batch["chosen_text"]), pc.is_valid(batch["rejected_text"]))
        lengths.add(batch)
        draws = [uniform(0, "show", record_id) for record_id in batch["record_id"].to_pylist()]
        pairs.add(draws, batch, paired.to_pylist(), ("chosen_text", "rejected_text"))
        examples.add(draws, batch, None, ("record_id", "split", "prompt", "chosen_text", "rejected_text",
                                          "chosen_reward", "rejected_reward"))  # fmt: skip
        for side in SIDES:
            known = pc.is_valid(batch[f"{side}_text"])
            for split, count in Counter(batch["split"].filter(known).to_pylist()).items():
                labels.setdefault(split, Counter())[LABELS[side]] += count
    return {
        "rewards": rewards.document(), "margins": margins.document(), "length": lengths.document(),
        "near_equal": _near_equal(pairs.rows(), lengths.pairs),
        "labels": {split: {label: counts[label] for label in LABELS.values()} for split, counts in sorted(labels.items())},
        "examples": [_example(row) for row in examples.rows()],
    }  # fmt: skip


def _batches(paths: Sequence[Path], columns: list[str]) -> Iterator[pa.RecordBatch]:
    for path in paths:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield from file.iter_batches(batch_size=_BATCH, columns=columns)


def _rewards(batch: pa.RecordBatch) -> Iterator[tuple[str, Numbers, Numbers]]:
    """(side, its known rewards, margins of the pairs whose rewards are known: with the first side only)."""
    chosen, rejected = (batch[f"{side}_reward"].to_numpy(zero_copy_only=False).astype(float) for side in SIDES)
    with np.errstate(over="ignore"):
        gap = chosen - rejected
    yield "chosen", chosen[np.isfinite(chosen)], gap[np.isfinite(gap)]
    yield "rejected", rejected[np.isfinite(rejected)], gap[:0]


class Histogram:
    """Counts of several sets of numbers over the same bins; of a few distinct numbers, one bin each."""

    def __init__(self, names: Sequence[str], bins: int = BINS, few: int = BINS) -> None:
        """few: the most distinct numbers that get a bin each; at least 1, and no more than `bins`."""
        self._bins, self._few = bins, few
        self._low, self._high = math.inf, -math.inf
        self._distinct: set[float] = set()
        self._counts = dict.fromkeys(names, np.zeros(bins, np.int64))
        self._totals = dict.fromkeys(names, (0, 0.0))

    def widen(self, name: str, values: Numbers) -> None:
        """First pass: the range, how many there are, and their sum."""
        if not len(values):
            return
        self._low, self._high = min(self._low, values.min().item()), max(self._high, values.max().item())
        if len(self._distinct) <= self._few:
            self._distinct.update(np.unique(values)[: self._few + 1].tolist())
        count, total = self._totals[name]
        with np.errstate(over="ignore"):
            self._totals[name] = count + len(values), total + values.sum().item()

    def add(self, name: str, values: Numbers) -> None:
        """Second pass: the counts."""
        if len(self._distinct) <= self._few:
            place = np.searchsorted(sorted(self._distinct), values)
        else:
            place = np.searchsorted(self._edges()[1:-1], values, side="right")
        self._counts[name] = self._counts[name] + np.bincount(place, minlength=self._bins)

    def _edges(self) -> Numbers:
        """[bins + 1]"""
        share = np.linspace(0, 1, self._bins + 1)
        return self._low * (1 - share) + self._high * share  # no difference, which may overflow

    def document(self) -> dict[str, Any] | None:
        """Bins as [low, high], the last one with its end; None where there is no number."""
        if not self._distinct:
            return None
        if len(self._distinct) <= self._few:
            bins = [[value, value] for value in sorted(self._distinct)]
        else:
            bins = [list(edge) for edge in pairwise(self._edges().tolist())]
        counts = {name: found[: len(bins)].tolist() for name, found in self._counts.items()}
        means = {name: total / count if count and math.isfinite(total) else None
                 for name, (count, total) in self._totals.items()}  # fmt: skip
        return {"bins": bins, "counts": counts, "means": means}


class _Lengths:
    """Lengths of the responses: tokens where all ids are known, else characters."""

    def __init__(self) -> None:
        self.pairs = 0
        self._known = True
        self._responses = np.zeros(2, np.int64)
        self._sums = {unit: np.zeros(4) for unit in ("tokens", "characters")}
        """Per unit: chosen, rejected, pairs whose chosen is longer, pairs whose rejected is longer."""

    def add(self, batch: pa.RecordBatch) -> None:
        there = [batch[f"{side}_text"].is_valid() for side in SIDES]
        ids = [batch[f"{side}_ids"].is_valid() for side in SIDES]
        self.pairs += pc.sum(pc.and_(*there)).as_py()
        self._responses += [pc.sum(mask).as_py() for mask in there]
        self._known &= ids == there
        for unit, name, measure in (("tokens", "ids", pc.list_value_length), ("characters", "text", pc.utf8_length)):
            if unit == "characters" or self._known:
                chosen, rejected = (measure(batch[f"{side}_{name}"]) for side in SIDES)
                found = chosen, rejected, pc.greater(chosen, rejected), pc.less(chosen, rejected)
                self._sums[unit] += [pc.sum(values).as_py() or 0 for values in found]

    def document(self) -> dict[str, Any]:
        """Means over all responses of a side, None where it has none; shares of the pairs, None where there are none."""
        unit = "tokens" if self._known else "characters"
        total = self._sums[unit].tolist()
        chosen, rejected = (
            sums / count if count else None for sums, count in zip(total, self._responses.tolist(), strict=False)
        )
        longer, shorter = (count / self.pairs if self.pairs else None for count in total[2:])
        difference = None if chosen is None or rejected is None else chosen - rejected
        return {"unit": unit, "chosen": chosen, "rejected": rejected, "difference": difference,
                "pairs": self.pairs, "chosen_longer": longer, "rejected_longer": shorter}  # fmt: skip


class _Sample:
    """The rows with the smallest draws."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[float, int, dict[str, Any]]] = []
        self._seen = 0

    def add(
        self, draws: Sequence[float], batch: pa.RecordBatch, allowed: Sequence[bool] | None, columns: Sequence[str]
    ) -> None:
        """Take what belongs to the sample so far; only those rows become Python objects."""
        numbers = [i for i in range(len(draws)) if allowed is None or allowed[i]]
        numbers = heapq.nsmallest(self._size, numbers, key=draws.__getitem__)
        if len(self._heap) == self._size:
            numbers = [i for i in numbers if draws[i] < -self._heap[0][0]]
        rows = batch.select(columns).take(pa.array(numbers, pa.int64())).to_pylist()
        for i, row in zip(numbers, rows, strict=True):
            self._seen += 1
            entry = (-draws[i], -self._seen, row)
            if len(self._heap) < self._size:
                heapq.heappush(self._heap, entry)
            elif entry > self._heap[0]:
                heapq.heapreplace(self._heap, entry)

    def rows(self) -> list[dict[str, Any]]:
        """By their draws, the smallest first."""
        return [row for _, _, row in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


def _near_equal(pairs: Sequence[dict[str, Any]], total: int) -> dict[str, Any] | None:
    from rapidfuzz.distance import Levenshtein

    if not pairs:
        return None
    distances = [
        Levenshtein.normalized_distance(row["chosen_text"], row["rejected_text"], score_cutoff=NEAR) for row in pairs
    ]
    share = sum(distance < NEAR for distance in distances) / len(pairs)
    return {"below": NEAR, "share": share, "sampled": len(pairs), "pairs": total}


def _example(row: dict[str, Any]) -> dict[str, Any]:
    sides = {
        side: {"text": row[f"{side}_text"], "reward": row[f"{side}_reward"]}
        for side in SIDES if row[f"{side}_text"] is not None
    }  # fmt: skip
    return {"record_id": row["record_id"], "split": row["split"], "prompt": row["prompt"][-1]["content"], **sides}


def as_text(document: dict[str, Any]) -> str:
    """The report for people."""
    parts = [
        _histogram("rewards", "reward", document["rewards"], "no rewards in this build"),
        _histogram("margins", "chosen - rejected", document["margins"], "no pair with two rewards"),
        _length_line(document["length"]), _near_line(document["near_equal"]), _label_table(document["labels"]),
    ]  # fmt: skip
    return "\n\n".join([*parts, "examples, drawn by hash", *_example_lines(document["examples"])])


def _histogram(title: str, column: str, document: dict[str, Any] | None, missing: str) -> str:
    if document is None:
        return f"{title}: {missing}"
    names = list(document["counts"])
    top = max(max(counts) for counts in document["counts"].values()) or 1
    rows = []
    for index, (low, high) in enumerate(document["bins"]):
        counts = [document["counts"][name][index] for name in names]
        bars = ["#" * math.ceil(_BAR * count / top) for count in counts]
        label = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        rows.append([label, *(cell for both in zip(counts, bars, strict=True) for cell in both)])
    means = {name: mean for name, mean in document["means"].items() if mean is not None}
    said = ", ".join(f"{name} {mean:.4g}" if len(means) > 1 else f"{mean:.4g}" for name, mean in means.items())
    columns = [column, *(cell for name in names for cell in (name, ""))]
    return console.table(f"{title} (mean: {said})", columns, rows, right=(0, 1, 3))


def _length_line(document: dict[str, Any]) -> str:
    means = [f"{side} {document[side]:.1f}" for side in SIDES if document[side] is not None]
    line = f"length in {document['unit']}, on average: {', '.join(means)}"
    if document["difference"] is not None:
        line += f", a difference of {document['difference']:+.1f}"
    if document["pairs"]:
        longer = f"{document['chosen_longer']:.1%} of the pairs, rejected in {document['rejected_longer']:.1%}"
        line += f"; chosen is longer in {longer}"
    return line


def _near_line(document: dict[str, Any] | None) -> str:
    if document is None:
        return "nearly equal: no pairs"
    whole = document["sampled"] == document["pairs"]
    of = f"{document['pairs']} pairs" if whole else f"{document['sampled']} of {document['pairs']} pairs, drawn by hash"
    return f"nearly equal: {document['share']:.1%} (edit distance below {document['below']} of the longer text; {of})"


def _label_table(labels: dict[str, dict[str, int]]) -> str:
    rows = [[split, *counts.values(), f"{counts['+1'] / sum(counts.values()):.1%}"] for split, counts in labels.items()]
    return console.table("labels", ["split", *LABELS.values(), "share of +1"], rows, right=(1, 2, 3))


def _example_lines(examples: Sequence[dict[str, Any]]) -> Iterator[str]:
    for example in examples:
        lines = [f"{one_line(example['record_id'])} ({example['split']}): {one_line(example['prompt'])}"]
        for side in SIDES:
            if side in example:
                reward = example[side]["reward"]
                shown = "" if reward is None else f" [{reward:.4g}]"
                lines.append(f"  {LABELS[side]}{shown} {one_line(example[side]['text'])}")
        yield "\n".join(line[:_WIDTH] + "..." * (len(line) > _WIDTH) for line in lines)


def one_line(text: str) -> str:
    """The beginning of a text with control and format characters escaped: no newline, no terminal code, no reordering."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: _WIDTH + 1])
    return "".join(shown)
