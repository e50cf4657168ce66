"""The artifact store: what was asked (key), what was made (digest), and drafts that survive a crash.

    $BNFCTL_HOME/
      generate/9f2c41d07be3/   manifest.json  config.json  rows/00000.parquet ...   log/
      train/c03b77f1a2d4/      manifest.json  config.json  model/*  metrics.jsonl   log/
      .drafts/generate-9f2c41d07be3/   the same while it is made, and scratch/ with what a resumed run needs
      names.json               {"llama3-bnf.train": "train/c03b77f1a2d4"}

A draft becomes an artifact with one rename, its manifest written last; so an artifact is whole or not there.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from bnfctl import __version__, console, digests, durable
from bnfctl.errors import BnfctlError, UsageError, nearest
from bnfctl.options import as_json, fingerprint, key_fields

SCHEMA_VERSION = 1
STAGES = ("generate", "score", "build", "train", "eval")
KINDS = (*STAGES, "reference")
"""The artifacts of the stages, and the log-odds that trainings share."""
CONTENT = ("rows", "shifts", "model", "metrics.jsonl")
"""What the digest covers.  Everything else in an artifact (logs, provenance) may differ between equal runs."""
KEY_CHARS = 12


@dataclass(frozen=True)
class Pinned:
    """An input that can't change unnoticed: an artifact, a model or a data set, with its digest."""

    kind: str
    """ "artifact", "folder", "file", "hub-model", "hub-data", "lab", or "server" where none says its model."""
    ref: str
    """What was asked for, resolved as far as it can be: an artifact's stage/key, a path, name@commit."""
    digest: str | None
    """None where it could not be resolved (`why` says it): enough for a dry run, not for a run."""
    path: str | None = None
    why: str | None = None


@dataclass(frozen=True)
class Plan:
    """A stage's work, fully resolved before anything starts: its key is known, no model is loaded."""

    stage: str
    version: int
    config: Any
    inputs: dict[str, Pinned]
    notes: tuple[str, ...] = ()
    """What was chosen on the user's behalf, and why."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of what decides the content beside the stage itself (tasks); in the key."""
    hints: dict[str, str] = field(default_factory=dict)
    """Input -> what to type where it is not resolved."""

    @property
    def unresolved(self) -> list[Pinned]:
        return [pinned for pinned in self.inputs.values() if pinned.digest is None]

    def require_resolved(self, where: str) -> None:
        """UsageError where an input could not be pinned, BnfctlError where no server answered."""
        for name, pinned in self.inputs.items():
            if pinned.digest is None and pinned.kind == "server":
                raise BnfctlError(str(pinned.why), where=pinned.ref, hint="is it up? The same command resumes")
            if pinned.digest is None:
                hint = self.hints.get(name, "bnfctl doctor checks the hub access; a folder or a file works without it")
                raise UsageError(f"could not resolve {pinned.ref}: {pinned.why}", where=where, hint=hint)

    def asked(self) -> dict[str, Any]:
        """The document whose fingerprint is the key."""
        return {
            "stage": self.stage,
            "version": self.version,
            "config": key_fields(self.config),
            "inputs": {name: pinned.digest for name, pinned in sorted(self.inputs.items())},
            **({"versions": self.versions} if self.versions else {}),
        }

    @property
    def key(self) -> str:
        return fingerprint(self.asked())


@dataclass(frozen=True)
class Manifest:
    """manifest.json: the last file written, so its presence says that an artifact is whole."""

    schema_version: int
    stage: str
    stage_version: int
    key: str
    digest: str
    config: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    files: list[dict[str, Any]]
    summary: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


class Artifact:
    """A published artifact: read it, never write it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            raw = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            if raw["schema_version"] != SCHEMA_VERSION:
                what = f"artifact of schema version {raw['schema_version']}; this bnfctl reads {SCHEMA_VERSION}"
                raise UsageError(what, where=str(path), hint="use the bnfctl that made it, or make it again")
            self.manifest = Manifest(**raw)
        except (OSError, ValueError, TypeError, KeyError) as error:
            hint = f"bnfctl rm {path} --force, then make it again"
            raise UsageError(f"not a readable artifact: {error}", where=str(path), hint=hint) from None

    @property
    def ref(self) -> str:
        """stage/key, as it is written in lineages."""
        return f"{self.manifest.stage}/{self.manifest.key[:KEY_CHARS]}"

    def rows(self, columns: list[str] | None = None, folder: str = "rows") -> Iterator[dict[str, Any]]:
        """Its rows, in order; folder: "shifts" for those of an eval artifact, none where it has no such folder."""
        from bnfctl.shards import read_parquet  # pyarrow, which `--help` has no use for

        for shard in self.shards(folder):
            yield from read_parquet(shard, columns)

    def shards(self, folder: str = "rows") -> Iterator[Path]:
        """Its Parquet files, in order, each hashed before it is given out: Parquet alone misses a flipped byte."""
        for entry in self.manifest.files:
            if entry["path"].startswith(f"{folder}/"):
                shard = self.path / entry["path"]
                if not shard.is_file() or digests.hash_file(shard) != entry["sha256"]:
                    what = f"corrupted artifact: {entry['path']} is {'changed' if shard.is_file() else 'missing'}"
                    at = f"{self.ref} --home {self.path.parent.parent}"
                    hint = f"bnfctl verify {at}; then bnfctl rm {at} --force, and make it again"
                    raise BnfctlError(what, where=str(self.path), hint=hint)
                yield shard

    def pinned(self) -> Pinned:
        """This artifact as an input of another."""
        return Pinned("artifact", self.ref, self.manifest.digest, str(self.path))

    def verify(self) -> list[str]:
        """What is wrong: files changed, missing or added, and inputs that are no longer what they were."""
        recorded = {entry["path"]: entry for entry in self.manifest.files}
        found = {entry.path: asdict(entry) for entry in digests.entries(self.path, CONTENT)}
        problems = [f"missing file {name}" for name in recorded if name not in found]
        problems += [f"unexpected file {name}" for name in found if name not in recorded]
        problems += [f"changed file {name}" for name in recorded if name in found and found[name] != recorded[name]]
        if digests.digest_of([digests.FileEntry(**entry) for entry in self.manifest.files]) != self.manifest.digest:
            problems.append("manifest.json: its digest is not that of its files")
        return problems + list(self._changed_inputs())

    def _changed_inputs(self) -> Iterator[str]:
        for name, raw in self.manifest.inputs.items():
            if raw["path"] is None:
                continue
            path = self.input_path(name)
            if not path.exists():
                yield f"input {name} is gone: {path}"
                continue
            artifact = raw["kind"] == "artifact"
            try:
                now = Artifact(path).manifest.digest if artifact else digests.DigestCache(None).any(path)
            except UsageError as error:
                yield f"input {name} can't be read: {error.what}"
                continue
            if now != raw["digest"]:
                yield f"input {name} has changed since: {path}"

    def input_path(self, name: str) -> Path:
        """Where an input lies: beside this artifact (a store may be moved as a whole), else where it was."""
        raw = self.manifest.inputs[name]
        beside = self.path.parent.parent / raw["ref"]
        return beside if raw["kind"] == "artifact" and beside.exists() else Path(raw["path"])


class Draft:
    """What is being made: a folder that one process owns, and that a later one resumes."""

    def __init__(self, store: Store, plan: Plan) -> None:
        self.store, self.plan = store, plan
        self.path = store.draft_path(plan.stage, plan.key)
        self.scratch = self.path / "scratch"
        """Parts, checkpoints: what a resumed run needs and a published artifact does not."""
        self.provenance: dict[str, Any] = {}
        self._started = time.time()

    @property
    def inputs(self) -> dict[str, Pinned]:
        return self.plan.inputs

    def artifact(self, name: str) -> Artifact:
        """The artifact behind an input."""
        path = self.inputs[name].path
        assert path is not None
        return Artifact(Path(path))

    def start_over(self) -> None:
        """Forget what an earlier run left, except its log; once: an interrupted forced run is resumed like any other."""
        if (mark := self.scratch / "forced").exists():
            return
        for path in self.path.glob("*"):
            if path.is_dir() and path.name != "log":
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()
        self.scratch.mkdir(parents=True)
        mark.touch()

    def open(self) -> None:
        """Make the folder, or take over what an interrupted run left in it."""
        for folder in (self.scratch, self.path / "log"):
            folder.mkdir(parents=True, exist_ok=True)
        for torn in self.path.rglob(".*.tmp"):
            shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
        (self.path / "manifest.json").unlink(missing_ok=True)
        durable.write_json(self.path / "config.json", as_json(self.plan.config))

    def publish(self, summary: dict[str, Any]) -> Artifact:
        """Hash and flush the content, write the manifest, rename: from here on it is an artifact."""
        files = digests.entries(self.path, CONTENT)
        for entry in files:
            durable.sync_file(self.path / entry.path)
        digest = digests.digest_of(files)
        now = time.time()
        manifest = Manifest(
            SCHEMA_VERSION, self.plan.stage, self.plan.version, self.plan.key, digest, as_json(self.plan.config),
            {name: asdict(pinned) for name, pinned in self.plan.inputs.items()},
            [asdict(entry) for entry in files], summary,
            {"created": round(now), "seconds": round(now - self._started, 2), "host": platform.node(),
             "bnfctl": __version__, "python": platform.python_version(), **self.provenance},
            self.plan.versions,
        )  # fmt: skip
        durable.write_json(self.path / "manifest.json", asdict(manifest))
        target = self.store.path(self.plan.stage, self.plan.key)
        target.parent.mkdir(parents=True, exist_ok=True)
        durable.sync_dir(self.store.home)
        replaced = None
        if target.exists():
            replaced = self.path.with_name(f"{self.path.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            durable.rename(target, replaced)
        durable.rename(self.path, target)
        shutil.rmtree(target / "scratch", ignore_errors=True)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        return Artifact(target)


class Store:
    """All artifacts under one folder ($BNFCTL_HOME, by default ./artifacts)."""

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        self.digests = digests.DigestCache(self.home)

    def path(self, stage: str, key: str) -> Path:
        return self.home / stage / key[:KEY_CHARS]

    def draft_path(self, stage: str, key: str) -> Path:
        return self.home / ".drafts" / f"{stage}-{key[:KEY_CHARS]}"

    def get(self, stage: str, key: str) -> Artifact | None:
        """The artifact with this key, if it was made."""
        path = self.path(stage, key)
        if not (path / "manifest.json").exists():
            return None
        shutil.rmtree(path / "scratch", ignore_errors=True)
        return Artifact(path)

    def holds(self, path: Path) -> bool:
        """Whether a path is where this store keeps an artifact."""
        kind = path.resolve().parent
        return kind.parent == self.home.resolve() and kind.name in KINDS

    def folders(self, stage: str | None = None, whole: bool = True) -> list[Path]:
        """The folders of artifacts; `whole`: only those with a manifest.  Other folders in the home are not ours."""
        found = [path for name in KINDS if stage in (None, name) for path in sorted((self.home / name).glob("*"))]
        mine = [path for path in found if re.fullmatch(f"[0-9a-f]{{{KEY_CHARS}}}", path.name) and path.is_dir()]
        return [path for path in mine if not whole or (path / "manifest.json").exists()]

    def artifacts(self, stage: str | None = None) -> Iterator[Artifact]:
        """Every artifact, stage by stage, oldest first; unreadable ones are left to `verify`."""
        for name in KINDS if stage is None else (stage,):
            found = [artifact for artifact in map(_readable, self.folders(name)) if artifact is not None]
            yield from sorted(found, key=lambda a: (a.manifest.provenance.get("created", 0), a.ref))

    def names(self) -> dict[str, str]:
        """Name -> stage/key."""
        try:
            return dict(json.loads((self.home / "names.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            where = str(self.home / "names.json")
            raise UsageError(f"broken JSON: {error}", where=where, hint="mend or delete that file") from None

    def set_name(self, name: str, ref: str | None) -> None:
        """Give an artifact a name; None takes the name away."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UsageError(f"'{name}' can't be a name", where="--name", hint="letters, digits, . _ -")
        self.home.mkdir(parents=True, exist_ok=True)
        with _locked(self.home / ".names.lock", "names.json", wait=console.check_stop):
            names = {**self.names(), name: ref}
            kept = {known: target for known, target in names.items() if target is not None}
            durable.write_json(self.home / "names.json", kept)

    def find(self, ref: str, stage: str | tuple[str, ...] | None = None, where: str | None = None) -> Artifact:
        """The artifact behind a name, stage/key, a key's beginning, or a path.

        UsageError if there is none, several, or one of another stage than asked for.
        """
        artifact = self.search(ref)
        if artifact is None:
            known = [*self.names(), *(a.ref for a in self.artifacts())]
            raise UsageError(f"no artifact '{ref}'{nearest(ref, known)}", where=where, hint="bnfctl ls lists them")
        wanted = (stage,) if isinstance(stage, str) else stage
        if wanted and artifact.manifest.stage not in wanted:
            what = f"{ref} is a {artifact.manifest.stage} artifact; this takes {' or '.join(wanted)}"
            raise UsageError(what, where=where, hint=f"bnfctl ls {wanted[0]} lists what fits")
        return artifact

    def search(self, ref: str) -> Artifact | None:
        """As `find`, but None where nothing has that name."""
        path = self.locate(ref)
        return Artifact(path) if path is not None else None

    def locate(self, ref: str) -> Path | None:
        """The folder of an artifact, readable or not."""
        ref = self.names().get(ref, ref)
        path = Path(ref).absolute()
        if (path / "manifest.json").exists() and (self.holds(path) or _readable(path) is not None):
            return path
        stage, _, key = ref.rpartition("/")
        if not re.fullmatch(r"[0-9a-f]{4,}", key) or (stage and stage not in KINDS):
            return None
        found = [
            p for name in ([stage] if stage else KINDS)
            for p in (self.home / name).glob(f"{key[:KEY_CHARS]}*") if (p / "manifest.json").exists()
        ]  # fmt: skip
        if len(found) > 1:
            listed = ", ".join(f"{p.parent.name}/{p.name}" for p in found)
            raise UsageError(f"'{ref}' could be any of: {listed}", hint="type more of the key")
        return found[0] if found else None

    @contextmanager
    def draft(self, plan: Plan, wait: Callable[[], object] | None = None) -> Iterator[Draft]:
        """The draft of a plan, locked; while another process makes it: UsageError, or `wait()` every half second."""
        drafts = self.home / ".drafts"
        drafts.mkdir(parents=True, exist_ok=True)
        draft = Draft(self, plan)
        with _locked(drafts / f"{draft.path.name}.lock", f"{plan.stage}/{plan.key[:KEY_CHARS]}", wait):
            yield draft


def _readable(path: Path) -> Artifact | None:
    with suppress(UsageError):  # `verify` names it; it must not hide the others
        return Artifact(path)
    return None


def _taken(file: IO[str]) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextmanager
def _locked(path: Path, what: str, wait: Callable[[], object] | None = None) -> Iterator[None]:
    """An advisory lock that dies with its process; the file stays, with the pid of its last holder."""
    with open(path, "a+", encoding="utf-8") as file:
        if not _taken(file):
            file.seek(0)
            busy = f"another process (pid {file.read().strip() or 'unknown'}) is making {what}"
            if wait is None:
                raise UsageError(busy, where=str(path), hint="wait for it; the same command then finds its result")
            console.say(f"{busy}: waiting for it")
            while not _taken(file):
                wait()
                time.sleep(0.5)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
