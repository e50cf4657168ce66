"""Answers that were paid for, kept in a SQLite file: durable before they are used, found again after a crash.

Several processes may use one file at once: `claim` says which of them asks.  Every row carries a checksum of its key and
its answer, so what a broken disk or file system makes of it is never read as an answer, and whole rows may be taken
from wherever they are found.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from bnfctl import console, durable
from bnfctl.client import salvage
from bnfctl.client.sharing import Locks, Reserve
from bnfctl.errors import BnfctlError

RESERVE = 32 << 20
"""Bytes kept free for the answers that are on their way when the disk is full: some hundred long ones."""
_SHOWN = 5
"""Damaged rows that get a line of their own."""
_SUM = 16
"""Bytes of a checksum."""
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
"""The latter where a quota is used up."""

Result = TypeVar("Result")


class Answers:
    """Key (hexadecimal) -> answer (JSON), shared with other processes.  Any thread may call.

    Raises BnfctlError where the file cannot be used, this process uses it already, or the disk is full.
    """

    def __init__(self, path: Path, reserve: int = RESERVE) -> None:
        """reserve: bytes to keep free, see RESERVE."""
        self.path = path
        self._lock = threading.Lock()
        self._damaged = 0
        self._reserve = Reserve(path.with_name(path.name + "-reserve"), reserve)
        self.full = False
        """Whether the disk was full: all answers so far are kept, and there is room for those on their way, but not more."""
        self._file, self._inode = sqlite3.connect(":memory:"), -1  # until `_follow` opens the real one
        try:
            self._locks = Locks(path.with_name(path.name + "-locks"))
        except OSError as error:
            raise self._error(error) from error
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        self._do(_check)
        with self._locks.turn():
            room = self._hold()
        if not room:
            raise BnfctlError(
                f"less than {self._reserve.size >> 20} MB are free to keep the servers' answers", where=str(self.path),
                hint="free some space; the same command goes on where this one stopped",
            )  # fmt: skip

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer under `key`, if there is one; a damaged one is none."""
        row = self._do(lambda file: file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone())
        if row is None:
            return None
        found = _unpacked(key, row[0])
        if found is None:
            self._damaged += 1
            if self._damaged <= _SHOWN:
                console.say(f"{self.path}: a kept answer is damaged and will be asked again (key {key[:12]})")
        return found

    def put(self, items: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Keep them all, in one transaction that is on the disk on return; their claims end."""
        rows = [(key, _packed(key, answer)) for key, answer in items]
        durable.boundary("before answers")
        try:
            self._do(lambda file: _insert(file, rows))
        except BnfctlError as error:
            if not (_code(error.__cause__) in _NO_ROOM and self._give_back()):
                raise
            self._do(lambda file: _insert(file, rows))
        with self._lock, self._locks.turn():
            self.full = not self._hold()
        durable.boundary("after answers")
        for key, _ in items:
            self._locks.drop(key)

    def claim(self, key: str) -> bool:
        """Whether this process is to ask for `key`; False while another one does.  Until `put`, `release` or its end.

        Look with `get` after it: the other may have been answered just before.
        """
        try:
            return self._locks.take(key)
        except OSError as error:
            raise self._error(error) from error

    def release(self, key: str) -> None:
        """End a claim without an answer to keep."""
        self._locks.drop(key)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Safe to call twice; claims end."""
        with self._lock:
            self._file.close()
            self._reserve.give_back()
            self._locks.close()
        if self._damaged > _SHOWN:
            console.say(f"{self.path}: {self._damaged} kept answers were damaged in all")
            self._damaged = 0

    def _do(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Work on the file when no other process does, repaired where it is damaged."""
        try:
            with self._lock, self._locks.turn():
                try:
                    self._follow()
                    return work(self._file)
                except sqlite3.DatabaseError as error:
                    if _code(error) not in _DAMAGED:
                        raise
                    self._repair(error)
                    return work(self._file)
        except (sqlite3.Error, OSError) as error:
            raise self._error(error) from error

    def _follow(self) -> None:
        """Open the file where it is not open yet, or where another process has put a repaired one in its place."""
        if self._inode != _inode(self.path):
            self._file.close()
            self._file = _connect(self.path)
            _prepare(self._file)
            self._inode = _inode(self.path)

    def _repair(self, reason: sqlite3.Error) -> None:
        """Put the damaged file aside, and one with all its whole rows in its place; a crash leaves one of the two."""
        self._file.close()
        fresh, aside = self.path.with_name(self.path.name + "-fresh"), _aside(self.path)
        try:
            count = _rebuild(self.path, fresh)
            os.link(self.path, aside)
            journal = self.path.with_name(self.path.name + "-journal")
            if journal.exists() and journal.stat().st_size:  # it would be played back into the new file
                journal.replace(aside.with_name(aside.name + "-journal"))
            durable.rename(fresh, self.path)
        finally:
            fresh.unlink(missing_ok=True)
        console.say(
            f"{self.path}: damaged ({reason}); kept as {aside.name}, {count} answers recovered, others are asked again"
        )
        self._inode = -1
        self._follow()

    def _hold(self) -> bool:
        try:
            return self._reserve.hold()
        except OSError as error:
            raise self._error(error) from error

    def _give_back(self) -> bool:
        """Free the reserve; whether there was one."""
        with self._lock, self._locks.turn():
            return self._reserve.give_back()

    def _error(self, error: Exception) -> BnfctlError:
        return BnfctlError(
            f"cannot keep the servers' answers: {error}", where=str(self.path),
            hint="free some space, or see who may write there; the same command goes on where this one stopped",
        )  # fmt: skip


def _connect(path: Path) -> sqlite3.Connection:
    """A file that begins no transactions by itself."""
    return sqlite3.connect(path, check_same_thread=False, timeout=30, isolation_level=None)


def _prepare(file: sqlite3.Connection, journal: str = "TRUNCATE") -> None:
    # No write-ahead log: its index is shared memory, which no network file system has.
    file.execute(f"PRAGMA page_size={salvage.PAGE}")
    file.execute(f"PRAGMA journal_mode={journal}")
    file.execute("PRAGMA synchronous=FULL")
    file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer BLOB NOT NULL)")


def _check(file: sqlite3.Connection) -> None:
    """DatabaseError for damage that would hide answers without a word; half a second for 100,000 of them."""
    file.execute("SELECT key, answer FROM answers WHERE key = ''").fetchone()
    found = file.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        error = sqlite3.DatabaseError(" ".join(str(found).rpartition("***")[2].split()))
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error


def _insert(file: sqlite3.Connection, rows: Iterable[tuple[str, bytes]]) -> None:
    """In one transaction."""
    file.execute("BEGIN IMMEDIATE")
    try:
        file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
        file.execute("COMMIT")
    except BaseException:
        if file.in_transaction:  # SQLite itself has ended it where the disk is full
            file.execute("ROLLBACK")
        raise


def _rebuild(damaged: Path, fresh: Path) -> int:
    """Write the whole rows of one file to a new one; how many there are."""
    fresh.unlink(missing_ok=True)
    with closing(_connect(fresh)) as file:
        _prepare(file, journal="MEMORY")  # a crash leaves a file that nobody reads
        _insert(file, ((row[0].decode(), row[1]) for row in salvage.rows(damaged) if _is_whole(row)))
        return int(file.execute("SELECT count(*) FROM answers").fetchone()[0])


def _packed(key: str, answer: dict[str, Any]) -> bytes:
    """Checksum and compressed JSON."""
    content = zlib.compress(json.dumps(answer, separators=(",", ":")).encode(), 1)
    return _sum(key.encode(), content) + content


def _unpacked(key: str, kept: Any) -> dict[str, Any] | None:
    """The answer; None where it is damaged, or that of another key."""
    if not (isinstance(kept, bytes) and _is_whole((key.encode(), kept))):
        return None
    answer: dict[str, Any] = json.loads(zlib.decompress(kept[_SUM:]))
    return answer


def _is_whole(row: tuple[bytes, ...]) -> bool:
    return len(row) == 2 and row[1][:_SUM] == _sum(row[0], row[1][_SUM:])


def _sum(key: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_SUM, key=key[:64]).digest()


def _aside(path: Path) -> Path:
    """A free name beside the file."""
    names = (path.with_name(f"{path.name}-damaged-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _inode(path: Path) -> int:
    """0 where there is no file."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _code(error: BaseException | None) -> int | None:
    """SQLite's primary result code."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF if isinstance(error, sqlite3.Error) else None
