"""The reference: one log-odds per trained token, from the policy as it starts.

*cached*: made in one pass without gradients through the policy's own code path, and kept as artifacts that every later
run shares: rows are found by the hash of (prompt ids, response ids) among the artifacts of the same model and code
path, so other losses, seeds, masks and splits of the same responses make no pass.  *live*: a second model in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bnfctl import console, shards
from bnfctl.artifact import Artifact, Draft, Pinned, Plan, Store
from bnfctl.config import ReferenceConfig
from bnfctl.data.records import Record, Side
from bnfctl.errors import BnfctlError
from bnfctl.model.policy import Policy
from bnfctl.options import fingerprint
from bnfctl.training.batches import Layout, MicroBatch, Work, all_sides
from bnfctl.training.objective import forward
from bnfctl.training.world import World

STAGE, VERSION = "reference", 1
SCHEMA = pa.schema([("response", pa.binary(16)), ("log_odds", pa.list_(pa.float32()))])
UNITS_PER_PART = 16
"""Micro-batches between two saves of an unfinished pass."""

Splits = Mapping[str, Work]
"""Name -> records, and which of their sides take part."""
Names = Mapping[str, list[list[bytes]]]
"""Split -> for each record the hashes of its sides that take part."""


class Reference(Protocol):
    """Where a run gets reference log-odds from."""

    def log_odds(self, split: str, batch: MicroBatch) -> Tensor:
        """[N] float32 of a micro-batch's trained tokens, on the policy's device; `batch` is there too."""


@dataclass(frozen=True, eq=False)
class Live:
    """A second model in memory, or the same one with its adapter off: the paper's set-up."""

    policy: Policy
    without_adapter: Callable[[], AbstractContextManager[None]] = nullcontext

    def log_odds(self, split: str, batch: MicroBatch) -> Tensor:
        with self.without_adapter():
            return forward(self.policy, batch, None, entropy=False).tokens.log_odds


class Cached:
    """Stored log-odds of all splits, in the order of their records."""

    def __init__(self, names: Names, rows: Mapping[bytes, np.ndarray], device: torch.device) -> None:
        """rows: response hash -> its log-odds [|y|]."""
        self.device = device
        self.values = {
            split: [torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *map(rows.__getitem__, record)]))
                    for record in records]
            for split, records in names.items()
        }  # fmt: skip

    def log_odds(self, split: str, batch: MicroBatch) -> Tensor:
        parts = [self.values[split][position] for position in batch.positions]
        return torch.cat([torch.zeros(0), *parts]).to(self.device)


def _kept(record: Record, work: Work) -> list[Side]:
    return [side for side in record.sides if work.keep(side)]


def response_hash(record: Record, side: Side) -> bytes:
    """128 bits of SHA-256 over the prompt's and the response's token ids."""
    digest = hashlib.sha256(np.asarray(record.prompt_ids, np.int32).tobytes())
    digest.update(b"|" + np.asarray(side.ids, np.int32).tobytes())
    return digest.digest()[:16]


@dataclass(frozen=True, eq=False)
class Maker:
    """What a reference pass needs beside the policy."""

    store: Store
    model: Pinned
    config: ReferenceConfig
    """The code path: rows of another one are not taken."""
    layout: Layout
    budget: int
    world: World

    def cached(self, policy: Policy, splits: Splits) -> tuple[Cached, list[str]]:
        """All rows of the splits, made where the store lacks them; and the artifacts they came from.

        Collective; the policy must be as it was loaded.
        """
        wanted: dict[bytes, tuple[Record, Side]] = {}
        names: dict[str, list[list[bytes]]] = {}
        for split, work in splits.items():
            named = [[(response_hash(record, side), side) for side in _kept(record, work)] for record in work.records]
            names[split] = [[hash_ for hash_, _ in sides] for sides in named]
            for record, sides in zip(work.records, named, strict=True):
                wanted |= {hash_: (record, side) for hash_, side in sides}
        found: dict[bytes, np.ndarray] = {}
        sources = self._find(wanted, found) if self.world.main else []
        missing = [hash_.hex() for hash_ in wanted if hash_ not in found] if self.world.main else []
        missing = self.world.broadcast_json(missing)
        read = len(sources)  # by this rank, already
        if missing:
            sources.append(self._make(policy, [wanted[bytes.fromhex(hash_)] for hash_ in missing]))
        elif self.world.main:
            console.say(f"reference: all {len(wanted)} responses are in {', '.join(sources)}: no pass")
        sources = self.world.broadcast_json(sources)
        for ref in sources[read:]:
            _read(Artifact(self.store.path(*ref.split("/"))), wanted, found)
        return Cached(names, found, policy.device), sources

    def _find(self, wanted: Mapping[bytes, object], found: dict[bytes, np.ndarray]) -> list[str]:
        """The artifacts of this model and code path that have wanted rows."""
        sources = []
        for artifact in self.store.artifacts(STAGE):
            manifest = artifact.manifest
            same = manifest.stage_version == VERSION and manifest.config == asdict(self.config)
            if same and manifest.inputs["model"]["digest"] == self.model.digest:
                before = len(found)
                _read(artifact, wanted, found)
                if len(found) > before:
                    sources.append(artifact.ref)
        return sources

    def _make(self, policy: Policy, missing: Sequence[tuple[Record, Side]]) -> str:
        """One pass over the missing responses; publishes them as an artifact."""
        records = _grouped(missing)
        hashes = sorted(response_hash(record, side) for record in records for side in record.sides)
        versions = {"responses": hashlib.sha256(b"".join(hashes)).hexdigest()}
        plan = Plan(STAGE, VERSION, self.config, {"model": self.model}, versions=versions)
        with self._drafted(plan) as draft:
            again = self.store.get(STAGE, plan.key) if self.world.main else None
            if self.world.broadcast_json(again is not None):
                return f"{STAGE}/{plan.key[:12]}"  # another run made it while this one waited
            folder = self.store.draft_path(STAGE, plan.key)
            if draft is not None:
                console.say(f"reference: one pass over {len(hashes)} responses")
                draft.open()
            self.world.barrier()
            work = Work(records, all_sides, self.layout, self.budget)
            units = _units(work)
            parts = folder / "scratch" / f"parts-{_digest(work, units)[:12]}"
            self._pass(policy, work, units, parts)
            self.world.barrier()
            if draft is not None:
                tokens = _publish_rows(parts, folder / "rows", hashes)
                draft.publish({"responses": len(hashes), "tokens": tokens, **asdict(self.config)})
            self.world.barrier()
        return f"{STAGE}/{plan.key[:12]}"

    @contextmanager
    def _drafted(self, plan: Plan) -> Iterator[Draft | None]:
        """The plan's draft on the main rank, once no other process has it.  Collective, and so is a stop meanwhile."""
        if not self.world.main:
            while self._still(False):
                pass
            yield None
            return
        with self.store.draft(plan, wait=lambda: self._still(True)) as draft:
            self._still(False)
            yield draft

    def _still(self, waiting: bool) -> bool:
        """Whether the main rank waits; the others ask it in turn, so that no rank is in one collective for hours."""
        (waiting,) = self.world.any(waiting)
        if waiting:
            self.world.check_stop()
        return waiting

    def _pass(self, policy: Policy, work: Work, units: list[list[list[int]]], parts: Path) -> None:
        """The units that an earlier process has not left in `parts`, each on one of the ranks."""
        parts.mkdir(parents=True, exist_ok=True)
        todo = [u for u in range(len(units)) if not (parts / f"{u:07d}.parquet").exists()]
        todo = self.world.broadcast_json(todo)
        with console.Progress(len(todo), "parts of the reference", quiet=not self.world.main) as progress:
            for start in range(0, len(todo), self.world.size):
                mine = todo[start + self.world.rank :][:1] if start + self.world.rank < len(todo) else []
                longest = max(len(units[u]) for u in todo[start : start + self.world.size])
                self._unit(policy, work, units[mine[0]] if mine else [], longest, parts, mine)
                progress.advance(min(self.world.size, len(todo) - start))
                self.world.check_stop()

    def _unit(
        self, policy: Policy, work: Work, groups: list[list[int]], count: int, parts: Path, name: list[int]
    ) -> None:  # fmt: skip
        """`count` forwards (a sharded model needs the same number on every rank), and this rank's rows on the disk."""
        rows: dict[bytes, np.ndarray] = {}
        for index in range(count):
            batch = work.collate(groups[index] if index < len(groups) else []).to(policy.device)
            values = forward(policy, batch, None, entropy=False).tokens.log_odds.cpu().numpy()
            start = 0
            for position in batch.positions:
                record = work.records[position]
                for side in record.sides:
                    row = rows[response_hash(record, side)] = values[start : start + len(side.ids)]
                    start += len(side.ids)
                    if not np.isfinite(row).all():
                        what = "the reference log-odds of a response are not finite"
                        raise BnfctlError(what, where=f"record {record.id}", hint="try --dtype float32")
        if name:
            shards.write_table(parts / f"{name[0]:07d}.parquet", _table(list(rows), list(rows.values())))


def _units(work: Work) -> list[list[list[int]]]:
    """Micro-batches, so many to a part; planned whatever the number of ranks, so that what a crash left fits in."""
    batches = work.groups(work.longest_first(range(len(work.records))))
    return [batches[start : start + UNITS_PER_PART] for start in range(0, len(batches), UNITS_PER_PART)]


def _digest(work: Work, units: list[list[list[int]]]) -> str:
    """Of what each part holds: the same responses may be asked for in other records, another order or budget."""
    named = {p: [response_hash(record, side).hex() for side in record.sides] for p, record in enumerate(work.records)}
    held = [[[named[position] for position in batch] for batch in unit] for unit in units]
    return fingerprint({"share": work.layout.share, "units": held})


def _grouped(missing: Sequence[tuple[Record, Side]]) -> list[Record]:
    """The missing responses as records again, those of one record together (they share their prompt)."""
    sides: dict[int, tuple[Record, list[Side]]] = {}
    for record, side in missing:
        sides.setdefault(id(record), (record, []))[1].append(side)
    return [Record(record.id, record.prompt_ids, tuple(kept)) for record, kept in sides.values()]


def _table(hashes: Sequence[bytes], rows: Sequence[np.ndarray]) -> pa.Table:
    """Rows as Arrow has them, from plain buffers: its converters would import pandas, for 50 MB and nothing else."""
    values = np.concatenate([np.zeros(0, np.float32), *rows]).astype(np.float32)
    ends = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    flat = pa.Array.from_buffers(pa.float32(), len(values), [None, pa.py_buffer(values.tobytes())])
    offsets = pa.py_buffer(ends.tobytes())
    lists = pa.Array.from_buffers(SCHEMA.field("log_odds").type, len(rows), [None, offsets], children=[flat])
    names = pa.Array.from_buffers(pa.binary(16), len(rows), [None, pa.py_buffer(b"".join(hashes))])
    return pa.Table.from_arrays([names, lists], schema=SCHEMA)


def _tables(files: Sequence[Path]) -> Iterator[tuple[list[bytes], np.ndarray, np.ndarray]]:
    """(hashes, offsets, values) of Parquet files: row i is values[offsets[i] : offsets[i + 1]]."""
    for file in files:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            batches = opened.read().to_batches()
        for batch in batches:
            lists = batch.column("log_odds")
            offsets = np.frombuffer(lists.buffers()[1], np.int32)[lists.offset : lists.offset + len(lists) + 1]
            values = np.frombuffer(lists.values.buffers()[1] or b"", np.float32)[lists.values.offset :]
            yield batch.column("response").to_pylist(), offsets, values


def _read(artifact: Artifact, wanted: Mapping[bytes, object], found: dict[bytes, np.ndarray]) -> None:
    """Add an artifact's wanted rows to `found`."""
    for hashes, offsets, values in _tables(list(artifact.shards())):
        for row, hash_ in enumerate(hashes):
            if hash_ in wanted:
                found[hash_] = values[offsets[row] : offsets[row + 1]].copy()


def _publish_rows(parts: Path, target: Path, wanted: list[bytes]) -> int:
    """Parts -> shards in the order of the hashes, `wanted`; returns the number of tokens.

    Raises BnfctlError where the parts hold other rows: an artifact that lacks some would fail every later run.
    """
    rows: dict[bytes, np.ndarray] = {}
    for hashes, offsets, values in _tables(sorted(parts.glob("*.parquet"))):
        for row, hash_ in enumerate(hashes):
            rows[hash_] = values[offsets[row] : offsets[row + 1]]
    if sorted(rows) != wanted:
        what = f"the parts of a reference pass hold {len(rows)} responses that are not the {len(wanted)} asked for"
        raise BnfctlError(what, where=str(parts), hint=f"rm -r {parts}; the same command then makes them again")
    shards.write_tables(target, (_table(part, [rows[hash_] for hash_ in part]) for part in shards.cut(wanted)))
    return sum(len(values) for values in rows.values())
