"""Answers that were paid for, kept in a SQLite file: durable before they are used, found again after a crash."""

from __future__ import annotations

import json
import sqlite3
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnfctl import durable
from bnfctl.errors import BnfctlError


class Answers:
    """Key -> answer (JSON).  Owned by one process; any thread may call.

    Raises BnfctlError where the file is held by another process, is no such file, or the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._where = str(path)
        self._lock = threading.Lock()
        try:
            self._file = sqlite3.connect(path, check_same_thread=False, timeout=1)
            # A write-ahead log without shared memory also works on network file systems.
            self._file.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=FULL")
            with self._file:
                self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer BLOB NOT NULL)")
        except sqlite3.Error as error:
            raise self._error(error) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer under `key`, if there is one."""
        try:
            with self._lock:
                row = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            found: dict[str, Any] | None = json.loads(zlib.decompress(row[0])) if row else None
        except (sqlite3.Error, zlib.error, ValueError) as error:
            raise self._error(error) from error
        return found

    def put(self, items: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Keep them all, in one transaction that is on the disk on return."""
        rows = [(key, zlib.compress(json.dumps(answer, separators=(",", ":")).encode(), 1)) for key, answer in items]
        durable.boundary("before answers")
        try:
            with self._lock, self._file:
                self._file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise self._error(error) from error
        durable.boundary("after answers")

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _error(self, error: Exception) -> BnfctlError:
        return BnfctlError(
            f"cannot keep the servers' answers: {error}", where=self._where,
            hint="free the disk, or end the other process that uses the file; a broken file can be removed",
        )  # fmt: skip
