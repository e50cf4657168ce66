"""ls, show, verify, rm, gc: look at the artifact store, and clear it."""

from __future__ import annotations

import fcntl
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfctl import console
from bnfctl.artifact import Artifact, Store
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.pipeline import headline


def size_of(path: Path) -> int:
    """Bytes under a path."""
    if path.is_file():
        return path.stat().st_size
    return sum(found.stat().st_size for found in path.rglob("*") if found.is_file())


def human(size: float) -> str:
    """Bytes for people: 96.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def ls(store: Store, stage: str | None) -> list[dict[str, Any]]:
    """Every artifact: ref, names, age, size, what it gave."""
    names: dict[str, list[str]] = {}
    for name, ref in store.names().items():
        names.setdefault(ref, []).append(name)
    return [
        {
            "ref": artifact.ref,
            "names": names.get(artifact.ref, []),
            "path": str(artifact.path),
            "digest": artifact.manifest.digest,
            "created": artifact.manifest.provenance.get("created"),
            "bytes": size_of(artifact.path),
            "result": headline(artifact),
        }
        for artifact in store.artifacts(stage)
    ]


def ls_table(rows: list[dict[str, Any]]) -> str:
    """`ls` for people."""
    cells = [
        [row["ref"], " ".join(row["names"]), _age(row["created"]), human(row["bytes"]), row["result"]] for row in rows
    ]
    return console.table("", ["artifact", "names", "age", "size", "result"], cells, right=(2, 3))


def _age(created: float | None) -> str:
    seconds = time.time() - (created or 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def show(artifact: Artifact) -> str:
    """What an artifact is, for people: config, inputs, result, provenance."""
    manifest = artifact.manifest
    created = manifest.provenance.get("created")
    when = {"created": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(created))} if created else {}
    lines = [f"{artifact.ref}  {artifact.path}", f"digest {manifest.digest}", ""]
    for title, values in (
        ("inputs", {name: f"{raw['ref']}  {str(raw['digest'])[:12]}" for name, raw in manifest.inputs.items()}),
        ("config", manifest.config),
        ("summary", manifest.summary),
        ("provenance", manifest.provenance | when),
    ):
        lines.append(f"{title}:")
        shown = {name: _plain(value) for name, value in values.items() if value not in (None, [], {})}
        lines += [f"  {name}: {text}" for name, text in shown.items() if text]
    lines.append(f"files: {len(manifest.files)}, {human(sum(entry['size'] for entry in manifest.files))}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """Numbers to four digits, and one level of names, so that a line stays a line; --json has everything."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items() if not isinstance(part, dict))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)


def rows(artifact: Artifact, count: int) -> Iterator[str]:
    """The first rows as JSON lines; a train artifact's are its metrics."""
    metrics = artifact.path / "metrics.jsonl"
    if metrics.exists():
        with open(metrics, encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in itertools.islice(file, count))
    elif (artifact.path / "rows").is_dir():
        for row in itertools.islice(artifact.rows(), count):
            yield json.dumps(row, ensure_ascii=False, default=bytes.hex)  # a reference's rows are named by hashes
    else:
        raise UsageError(f"{artifact.ref} has no rows", where="--rows")


def lineage(artifact: Artifact, store: Store) -> dict[str, Any]:
    """The artifact and, recursively, what it was made from."""
    inputs = {}
    for name, raw in artifact.manifest.inputs.items():
        parent = store.search(raw["ref"]) if raw["kind"] == "artifact" else None
        inputs[name] = lineage(parent, store) if parent else {"ref": raw["ref"], "digest": raw["digest"], "inputs": {}}
    return {"ref": artifact.ref, "digest": artifact.manifest.digest, "inputs": inputs}


def lineage_lines(tree: dict[str, Any], name: str = "", indent: str = "") -> Iterator[str]:
    """A lineage as an indented tree."""
    label = f"{name}: " if name else ""
    yield f"{indent}{label}{tree['ref']}  {str(tree['digest'])[:12]}"
    for key, parent in tree["inputs"].items():
        yield from lineage_lines(parent, key, indent + "  ")


def verify(store: Store, refs: list[str]) -> dict[str, list[str]]:
    """Problems per artifact, of those named or of all; manifests that can't be read count too."""
    if refs:
        return {artifact.ref: artifact.verify() for artifact in map(store.find, refs)}
    problems = {}
    for folder in store.folders():
        try:
            artifact = Artifact(folder)
        except UsageError as error:
            problems[f"{folder.parent.name}/{folder.name}"] = [f"unreadable manifest: {error.what}"]
        else:
            problems[artifact.ref] = artifact.verify()
    return problems


def rm(store: Store, refs: list[str], force: bool) -> list[str]:
    """Delete artifacts, and their names; UsageError if another artifact was made from one, unless forced.

    One whose manifest can't be read goes too: deleting it is the cure.
    """
    doomed = list(dict.fromkeys(store.locate(ref) or store.find(ref).path for ref in refs))
    for path in doomed:
        if not store.holds(path):
            raise UsageError(
                "not an artifact of this store", where=str(path), hint=f"the store is {store.home}; see --home"
            )
    going = {f"{path.parent.name}/{path.name}" for path in doomed}
    users = _made_of(store, going) if not force else []
    if users:
        what = f"{', '.join(users)} {'was' if len(users) == 1 else 'were'} made of it"
        raise UsageError(what, where=", ".join(refs), hint=f"bnfctl rm {' '.join([*refs, *users])}, or --force")
    for path in doomed:
        for name, ref in store.names().items():
            if ref == f"{path.parent.name}/{path.name}":
                store.set_name(name, None)
        # The manifest goes first: a folder without one is no artifact, so a crash leaves nothing half-deleted.
        (path / "manifest.json").unlink()
        shutil.rmtree(path)
    return sorted(going)


def _made_of(store: Store, refs: set[str]) -> list[str]:
    """The artifacts that were made of these, or of what was made of these; inputs first."""
    gone, found, all_ = set(refs), [], list(store.artifacts())
    while users := [one.ref for one in all_ if one.ref not in gone and gone & _inputs(one)]:
        found += users
        gone.update(users)
    return found


def _inputs(artifact: Artifact) -> set[str]:
    return {raw["ref"] for raw in artifact.manifest.inputs.values()}


@dataclass(frozen=True)
class Waste:
    """Something that `gc` can free."""

    path: Path
    what: str
    bytes: int


def waste(store: Store, checkpoints_only: bool) -> tuple[list[Waste], list[str]]:
    """(what can be freed, the drafts that a running process holds).

    Old checkpoints are those of a draft that a newer whole one replaces; the newest stays, so the run can
    resume.  Without `checkpoints_only`, drafts that no process holds go as a whole, and so do leftovers.
    """
    found, busy = [], []
    for draft in sorted(path for path in (store.home / ".drafts").glob("*") if path.is_dir()):
        if _held(draft.parent / f"{draft.name}.lock"):
            busy.append(draft.name)
            continue
        if not checkpoints_only:
            found.append(Waste(draft, f"draft {draft.name}", size_of(draft)))
            continue
        checkpoints = sorted((draft / "scratch" / "checkpoints").glob("step-*"))
        found += [Waste(old, f"old checkpoint {old.name} of {draft.name}", size_of(old)) for old in checkpoints[:-1]]
    if not checkpoints_only:
        halves = [path for path in store.folders(whole=False) if not (path / "manifest.json").exists()]
        halves += [path / "scratch" for path in store.folders() if (path / "scratch").is_dir()]
        found += [Waste(path, f"leftover {path.relative_to(store.home)}", size_of(path)) for path in halves]
    return found, busy


def free(found: list[Waste]) -> int:
    """Delete what `waste` found and no process has taken since; returns the bytes freed."""
    freed = 0
    for item in found:
        lock = item.path.with_name(f"{item.path.name}.lock")
        try:
            if lock.exists():
                with open(lock, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(item.path)
            else:
                shutil.rmtree(item.path)
        except (BlockingIOError, FileNotFoundError):
            console.say(f"left alone, in use by now: {item.what}")
            continue
        except OSError as error:
            raise BnfctlError(
                f"could not delete: {error}", where=str(item.path), hint="check its permissions"
            ) from None
        freed += item.bytes
    return freed


def _held(lock: Path) -> bool:
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
