"""SHA-256 of files and folders, remembered by (path, inode, size, mtime) so that 16 GB are read once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfctl.options import fingerprint

CACHE_NAME = ".digests.json"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an artifact's content."""

    path: str
    """Relative to the folder, with forward slashes."""
    size: int
    sha256: str


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entries(root: Path, parts: tuple[str, ...]) -> list[FileEntry]:
    """The files under `parts` (files or folders) of `root`, sorted by path, freshly hashed."""
    found = []
    for part in parts:
        start = root / part
        found += [start] if start.is_file() else [path for path in start.rglob("*") if path.is_file()]
    listed = [(path.relative_to(root).as_posix(), path) for path in found]
    return [FileEntry(name, path.stat().st_size, hash_file(path)) for name, path in sorted(listed)]


def digest_of(files: list[FileEntry]) -> str:
    """The digest of a content: SHA-256 over (path, size, sha256) of its files."""
    return fingerprint([[file.path, file.size, file.sha256] for file in files])


class DigestCache:
    """Digests of input files and folders, kept in one JSON file of the artifact store."""

    def __init__(self, home: Path | None) -> None:
        """home: where to keep them; None remembers nothing beyond this object."""
        self.path = home / CACHE_NAME if home else None
        self._changed = False
        self._known: dict[str, Any] = {}
        if self.path is not None:
            with contextlib.suppress(OSError, ValueError):
                self._known = json.loads(self.path.read_text())

    def _file(self, path: Path) -> str:
        """SHA-256 of a file, from memory when inode, size and mtime are unchanged."""
        stat = path.stat()
        stamp = [stat.st_ino, stat.st_size, stat.st_mtime_ns]
        name = str(path.resolve())
        known = self._known.get(name)
        if known is None or known["stamp"] != stamp:
            known = {"stamp": stamp, "sha256": hash_file(path)}
            self._known[name] = known
            self._changed = True
        return str(known["sha256"])

    def _save(self) -> None:
        """Remember what was hashed.  A cache: atomic, so it is never torn, but not worth an fsync."""
        if self._changed and self.path is not None and self.path.parent.is_dir():
            temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            with contextlib.suppress(OSError):  # a full disk or a read-only store costs time, nothing else
                temporary.write_text(json.dumps(self._known), encoding="utf-8")
                temporary.replace(self.path)
        self._changed = False

    def file(self, path: Path) -> str:
        """SHA-256 of a file's content."""
        digest = self._file(path)
        self._save()
        return digest

    def folder(self, path: Path) -> str:
        """Digest of a folder's visible files, by content: a copy elsewhere has the same."""
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p.relative_to(path))]
        digest = fingerprint([[p.relative_to(path).as_posix(), p.stat().st_size, self._file(p)] for p in files])
        self._save()
        return digest

    def any(self, path: Path) -> str:
        """Digest of a file or of a folder."""
        return self.folder(path) if path.is_dir() else self.file(path)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)
