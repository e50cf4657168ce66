"""Records from scored candidates, a shard at a time as Arrow tables.

Only what decides becomes Python objects: ids, rewards, and texts where they are compared.  Token ids and prompts are
taken by row number, so time and memory are those of copying them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bnfctl import shards
from bnfctl.artifact import Artifact
from bnfctl.config import BuildConfig
from bnfctl.data import choosing, filters, pairing
from bnfctl.data.candidates import prompt_starts, whole_prompts
from bnfctl.errors import BnfctlError

COLUMNS = ["prompt_id", "sample", "text", "finish_reason", "prompt", "prompt_ids", "token_ids"]
_RECORDS = 4096
"""Records that are filtered and taken at one time; all-pairs makes many more than that of one shard."""

RELATIVE_SCORERS = ("pairrm", "judge pairwise")
"""Their rewards compare a response with the others of its prompt, and say nothing across prompts."""


def scorer_of(scores: Artifact) -> str:
    """What made the rewards, as in RELATIVE_SCORERS."""
    config = scores.manifest.config
    return f"judge {config['judge_mode']}" if config["scorer"] == "judge" else str(config["scorer"])


class Rewards:
    """The rewards of one score artifact, in step with its candidates."""

    def __init__(self, scores: Artifact) -> None:
        self._ref = scores.ref
        self._tables = (shards.read_table(path, ["prompt_id", "sample", "reward"]) for path in scores.shards())
        self._rest: pa.Table | None = None

    def next(self, candidates: pa.Table) -> pa.Array:
        """[C] The rewards of the next candidates; null where there is none, or no finite number.

        BnfctlError where the next rows are those of other candidates.
        """
        found = [self._rest] if self._rest is not None else []
        while sum(table.num_rows for table in found) < candidates.num_rows:
            table = next(self._tables, None)
            if table is None:
                self._refuse(candidates["prompt_id"][-1].as_py())
            found.append(table)
        together = pa.concat_tables(found)
        rows, self._rest = together.slice(0, candidates.num_rows), together.slice(candidates.num_rows)
        for name in ("prompt_id", "sample"):
            same = pc.equal(rows[name], candidates[name])
            if not pc.all(same).as_py():
                self._refuse(candidates["prompt_id"][pc.index(same, False).as_py()].as_py())
        reward = rows["reward"].combine_chunks()
        return pc.if_else(pc.fill_null(pc.is_finite(reward), False), reward, pa.scalar(None, pa.float64()))

    def end(self) -> None:
        """BnfctlError where there are rewards for more candidates than there are."""
        extra = next((table for table in (self._rest, *self._tables) if table is not None and table.num_rows), None)
        if extra is not None:
            self._refuse(extra["prompt_id"][0].as_py())

    def _refuse(self, prompt_id: str) -> None:
        raise BnfctlError(
            "scores and candidates do not match", where=f"{self._ref}, prompt {prompt_id}", hint="score again"
        )


def records(
    config: BuildConfig, candidates: Artifact, scores: Sequence[Artifact], gate: Artifact | None, counts: Counter[str]
) -> Iterator[pa.Table]:
    """Tables of pairing.SCHEMA; `counts` gets prompts, candidates and what was left out (see filters)."""
    rewards = [Rewards(artifact) for artifact in scores]
    passes = Rewards(gate) if gate is not None else None
    tables = (shards.read_table(path, COLUMNS) for path in candidates.shards())
    endings = filters.Endings()
    for table in whole_prompts(tables):
        found = [each.next(table) for each in rewards]
        block = _Block(config, table, found, passes.next(table) if passes else None, counts)
        endings.add(block.column("finish_reason"))
        proposals = block.proposals()
        while batch := list(islice(proposals, _RECORDS)):
            yield block.take(batch)
        if counts["prompts"] == config.limit:
            break
    else:
        for each in (*rewards, *([passes] if passes else [])):
            each.end()
    endings.say(config)


Proposal = tuple[int, int | None, int | None]
"""(number of the prompt, row of the chosen response, row of the rejected one)."""


@dataclass
class _Block:
    """Whole prompts, their candidates and rewards."""

    config: BuildConfig
    table: pa.Table
    rewards: list[pa.Array]
    gate: pa.Array | None
    counts: Counter[str]
    starts: list[int] = field(init=False)
    """[P + 1] The first row of each prompt, and the end."""
    prompts: list[str] = field(init=False)
    samples: list[int] = field(init=False)
    values: list[float | None] = field(init=False)
    """[C] The reward that decides."""

    def __post_init__(self) -> None:
        starts = prompt_starts(self.table["prompt_id"]).tolist()
        room = None if self.config.limit is None else self.config.limit - self.counts["prompts"]
        self.starts = [*starts, self.table.num_rows][: None if room is None else room + 1]
        size = self.starts[-1]
        self.table = self.table.slice(0, size)
        self.prompts = self.table["prompt_id"].take(pa.array(self.starts[:-1], pa.int64())).to_pylist()
        self.samples = self.table["sample"].to_pylist()
        given = [rewards.slice(0, size).to_pylist() for rewards in self.rewards]
        self.values = given[0] if len(given) == 1 else self._combined(given)
        self.counts["prompts"] += len(self.prompts)
        self.counts["candidates"] += size

    def _combined(self, given: list[list[float | None]]) -> list[float | None]:
        weights = self.config.weights or (1.0,) * len(given)
        values: list[float | None] = []
        for low, high in pairwise(self.starts):
            values += choosing.combine([row[low:high] for row in given], weights, self.config.combine)
        return values

    def column(self, name: str) -> pa.Array:
        """A column as one array."""
        column = self.table[name]
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def proposals(self) -> Iterator[Proposal]:
        """What the rule takes of each prompt, of the responses that no filter leaves out."""
        rewarded = pa.array([value is not None for value in self.values], pa.bool_())
        gate = None if self.gate is None else self.gate.slice(0, len(self.values))
        out = filters.codes(self.config, self.column("text"), self.column("finish_reason"), rewarded, gate)
        for code, number in enumerate(np.bincount(out, minlength=len(filters.REASONS)).tolist()):
            if code and number:
                self.counts[f"left_out_{filters.REASONS[code]}"] += number
        keeps = (out == 0).tolist()
        lengths = self._lengths() if self.config.length_balance is not None else None
        single = self.config.choose == "threshold"
        for number, (low, high) in enumerate(pairwise(self.starts)):
            rows = [row for row in range(low, high) if keeps[row]]
            if len(rows) < (1 if single else 2):
                known = sum(value is not None for value in self.values[low:high])
                self.counts["dropped_too_few" if known >= (1 if single else 2) else "dropped_no_reward"] += 1
            elif single:
                yield from self._labelled(number, rows, low, high)
            else:
                yield from self._pairs(number, rows, lengths)

    def _lengths(self) -> tuple[list[int | None], list[int]]:
        """[C] Tokens, None where the ids are not known, and characters."""
        tokens, characters = pc.list_value_length(self.column("token_ids")), pc.utf8_length(self.column("text"))
        return tokens.to_pylist(), characters.to_pylist()

    def _pairs(
        self, number: int, rows: list[int], lengths: tuple[list[int | None], list[int]] | None
    ) -> Iterator[Proposal]:
        rewards = [value for row in rows if (value := self.values[row]) is not None]
        sizes: list[int] = []
        if lengths is not None:
            tokens = [count for row in rows if (count := lengths[0][row]) is not None]
            sizes = tokens if len(tokens) == len(rows) else [lengths[1][row] for row in rows]
        for pair in choosing.pairs(self.config, self.prompts[number], rewards, sizes):
            margin = choosing.margin(rewards, pair)
            reason = filters.margin_reason(margin, self.config.min_margin, self.config.max_margin)
            if reason is None:
                yield number, rows[pair[0]], rows[pair[1]]
            else:
                self.counts[f"dropped_{reason}"] += 1

    def _labelled(self, number: int, rows: list[int], low: int, high: int) -> Iterator[Proposal]:
        known = [value for value in self.values[low:high] if value is not None]
        mean = choosing.mean(known)
        for row in rows:
            side = choosing.label(self.config, self.values[row] or 0.0, mean)
            if side is None:
                self.counts["left_out_between"] += 1
            else:
                yield number, row if side == "chosen" else None, row if side == "rejected" else None

    def take(self, proposals: Sequence[Proposal]) -> pa.Table:
        """Records of these proposals, without the pairs whose texts are too much alike, masked and split."""
        numbers: list[int] = []
        sides: dict[str, list[int | None]] = {side: [] for side in pairing.SIDES}
        names, splits = [], []
        for number, chosen, rejected in self._distinct(proposals):
            name = self._name(number, chosen, rejected)
            kept: tuple[str, ...] = pairing.SIDES
            if chosen is not None and rejected is not None and self.config.pairing_ratio < 1:
                kept = pairing.kept_sides(self.config.seed, name, self.config.pairing_ratio)
            sides["chosen"].append(chosen if "chosen" in kept else None)
            sides["rejected"].append(rejected if "rejected" in kept else None)
            names.append(name)
            numbers.append(number)
            splits.append(pairing.split_of(self.config.seed, self.prompts[number], self.config.test_fraction))
        first = pa.array([self.starts[number] for number in numbers], pa.int64())
        columns: dict[str, Any] = {
            "record_id": pa.array(names, pa.string()), "prompt_id": self.column("prompt_id").take(first),
            "split": pa.array(splits, pa.string()), "prompt": self.column("prompt").take(first),
            "prompt_ids": self.column("prompt_ids").take(first),
        }  # fmt: skip
        values = pa.array(self.values, pa.float64())
        for side, chosen_rows in sides.items():
            rows = pa.array(chosen_rows, pa.int64())
            for name, column in (("text", "text"), ("ids", "token_ids"), ("finish", "finish_reason")):
                columns[f"{side}_{name}"] = self.column(column).take(rows)
            columns[f"{side}_reward"] = values.take(rows)
        return pa.table([columns[name] for name in pairing.SCHEMA.names], schema=pairing.SCHEMA)

    def _name(self, number: int, chosen: int | None, rejected: int | None) -> str:
        samples = [None if row is None else self.samples[row] for row in (chosen, rejected)]
        return choosing.record_name(self.config, self.prompts[number], *samples)

    def _distinct(self, proposals: Sequence[Proposal]) -> Iterator[Proposal]:
        if self.config.choose == "threshold":
            yield from proposals
            return
        text = self.column("text")
        chosen, rejected = (
            text.take(pa.array([proposal[side] for proposal in proposals], pa.int64())).to_pylist() for side in (1, 2)
        )
        for proposal, reason in zip(
            proposals, filters.text_reasons(chosen, rejected, self.config.min_edit), strict=True
        ):
            if reason is None:
                yield proposal
            else:
                self.counts[f"dropped_{reason}"] += 1
