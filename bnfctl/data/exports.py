"""A build as a data set of TRL's types, which `datasets` opens and `bnfctl build` reads back.

`preference`: prompt, chosen, rejected; `unpaired`: prompt, completion, label; all as lists of chat turns, so that TRL
renders them with the model's own template.  Beside them are the ids and rewards, so that nothing is lost but token ids.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from bnfctl import console, durable, shards
from bnfctl.artifact import Artifact
from bnfctl.data.files import FILE_ENDINGS
from bnfctl.data.pairing import SIDES
from bnfctl.errors import BnfctlError, UsageError, nearest

_IDS = [("record_id", pa.string()), ("prompt_id", pa.string())]
SCHEMAS = {
    "preference": pa.schema(
        [("prompt", shards.MESSAGES), ("chosen", shards.MESSAGES), ("rejected", shards.MESSAGES), *_IDS]
        + [(f"{side}_reward", pa.float64()) for side in SIDES]
    ),
    "unpaired": pa.schema(
        [
            ("prompt", shards.MESSAGES),
            ("completion", shards.MESSAGES),
            ("label", pa.bool_()),
            *_IDS,
            ("reward", pa.float64()),
        ]
    ),
}
"""The columns of an export; one file has `split` too, a folder has a file per split."""

_COLUMNS = [
    "record_id",
    "prompt_id",
    "split",
    "prompt",
    *(f"{side}_{name}" for side in SIDES for name in ("text", "reward")),
]
_BATCH = 1024
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip")
"""Of a file's name that promises what no export writes."""


@dataclass(frozen=True)
class Export:
    """What was written."""

    path: str
    rows: int
    splits: dict[str, int]
    """Rows per split."""
    skipped: int
    """Records with one response only, which a preference set has no place for."""

    @property
    def line(self) -> str:
        """The counts in words."""
        splits = ", ".join(f"{count} {split}" for split, count in self.splits.items())
        more = (
            f"; {self.skipped} records with one response left out: --format unpaired has them" if self.skipped else ""
        )
        return f"{self.rows} rows: {splits}{more}"


def export(artifact: Artifact, path: Path, layout: str, force: bool) -> Export:
    """Write a build artifact: PATH.parquet or PATH.jsonl is one file, anything else a folder with a file per split.

    Whole or not there at all.  UsageError where something is in the way (`force` replaces a file, or a folder that an
    export wrote); BnfctlError where no record fits the layout.
    """
    if layout not in SCHEMAS:
        what = f"unknown format '{layout}'{nearest(layout, SCHEMAS)}"
        raise UsageError(what, where="--format", hint=f"one of: {', '.join(SCHEMAS)}")
    path = path.expanduser().resolve()  # neither a ".." nor a link leads into the store
    ending = path.suffix.lower()
    if ending in _COMPRESSED or (ending in FILE_ENDINGS and ending not in (".parquet", ".jsonl")):
        raise UsageError(f"cannot write {ending}", where="PATH", hint="FILE.parquet, FILE.jsonl or a folder")
    _check_free(path, artifact.path.resolve().parent.parent, force)
    counts: Counter[str] = Counter()
    rows = _rows(artifact, layout, counts)
    try:
        if ending == ".parquet":
            durable.write_file(path, lambda temporary: _write_parquet(temporary, rows, layout))
        elif ending == ".jsonl":
            durable.write_file(path, lambda temporary: _write_lines(temporary, rows))
        else:
            _write_folder(path, rows, layout)
    except OSError as error:  # pyarrow's does not say which file
        hint = "check the path, its permissions and the free disk"
        raise BnfctlError(f"cannot write: {error.strerror or error}", where=str(path), hint=hint) from error
    _clear_leftovers(path)
    skipped = counts.pop("skipped", 0)
    return Export(str(path), counts.total(), dict(sorted(counts.items(), reverse=True)), skipped)


def _check_free(path: Path, home: Path, force: bool) -> None:
    if home in (path, *path.parents):
        raise UsageError("this is inside the artifact store", where=str(path), hint="choose another PATH")
    if not path.exists() or (path.is_dir() and path.suffix.lower() not in FILE_ENDINGS and not any(path.iterdir())):
        return
    if not force:
        raise UsageError("something is there already", where=str(path), hint="--force replaces it")
    if path.is_dir() and (path.suffix.lower() in FILE_ENDINGS or not _is_export(path)):
        raise UsageError(
            "this folder holds more than an export", where=str(path), hint="--force replaces only what export wrote"
        )


def _clear_leftovers(path: Path) -> None:
    """Remove what killed exports to the same place left beside it: after a new one is whole, so nothing is lost."""
    for file in path.parent.iterdir():
        found = re.fullmatch(rf"\.{re.escape(path.name)}\.(\d+)(\.old)?\.tmp", file.name)
        if found is None or _is_alive(int(found[1])):
            continue
        if file.is_dir():
            shutil.rmtree(file, ignore_errors=True)
        else:
            file.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def _is_export(folder: Path) -> bool:
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return all(name.startswith("data/") and "-of-" in name and name.endswith(".parquet") for name in names)


def _rows(artifact: Artifact, layout: str, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Rows of SCHEMAS[layout] and their split; counts rows by split, and "skipped" records."""
    found = False
    for record in artifact.rows(_COLUMNS):
        console.check_stop()
        ids = {name: record[name] for name in ("split", "prompt", "record_id", "prompt_id")}
        there = [side for side in SIDES if record[f"{side}_text"] is not None]
        if layout == "preference" and len(there) < 2:
            counts["skipped"] += 1
            continue
        found = True
        turns = {side: [{"role": "assistant", "content": record[f"{side}_text"]}] for side in there}
        rewards = {side: record[f"{side}_reward"] for side in there}
        if layout == "preference":
            counts[record["split"]] += 1
            yield {**ids, **turns, **{f"{side}_reward": value for side, value in rewards.items()}}
        else:
            counts[record["split"]] += len(there)
            for side in there:
                yield {**ids, "completion": turns[side], "label": side == "chosen", "reward": rewards[side]}
    if not found:
        hint = "--format unpaired takes records with one response"
        raise BnfctlError("no record has both responses", where=artifact.ref, hint=hint)


class _ParquetFile:
    """One Parquet file that is written some rows at a time."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)
        self._pending: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._pending.append(row)
        if len(self._pending) == _BATCH:
            self._flush()

    def close(self) -> None:
        if self._pending:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._pending, schema=self.schema))
        self._pending = []


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]], layout: str) -> None:
    file = _ParquetFile(path, SCHEMAS[layout].append(pa.field("split", pa.string())))
    try:
        for row in rows:
            file.add(row)
    finally:
        file.close()


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    file: IO[str]
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_folder(folder: Path, rows: Iterable[dict[str, Any]], layout: str) -> None:
    """`data/SPLIT-00000-of-0000N.parquet`, as hub repositories have them; made beside the folder, then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(made, ignore_errors=True)
    (made / "data").mkdir(parents=True)
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    try:
        _write_splits(made / "data", rows, layout)
        durable.sync_tree(made)
        if folder.exists():
            durable.rename(folder, old)
        durable.rename(made, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write_splits(folder: Path, rows: Iterable[dict[str, Any]], layout: str) -> None:
    files: dict[str, list[Path]] = {}
    written: Counter[str] = Counter()
    writers: dict[str, _ParquetFile] = {}
    try:
        for row in rows:
            split = row.pop("split")
            if written[split] % (4 * shards.SHARD_ROWS) == 0:
                if split in writers:
                    writers.pop(split).close()
                files.setdefault(split, []).append(folder / f"{split}-{len(files.get(split, [])):05d}")
                writers[split] = _ParquetFile(files[split][-1], SCHEMAS[layout])
            writers[split].add(row)
            written[split] += 1
    finally:
        for writer in writers.values():
            writer.close()
    for parts in files.values():
        for part in parts:
            part.rename(part.with_name(f"{part.name}-of-{len(parts):05d}.parquet"))
