"""What the runs that use one file of answers share: who asks what, one writer at a time, and some room on the disk.

Who asks what is a lock on one byte of a file, far out where nothing is ever written.  Such locks end with their process,
however it ends, take no room, and hold between machines on a network file system that knows locks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

from bnfctl.errors import BnfctlError

_TURN = 0
"""The byte of `Locks.turn`; the keys' bytes come after it."""
_OPEN: weakref.WeakValueDictionary[str, Locks] = weakref.WeakValueDictionary()
"""Of this process, by path: a process has each lock once, and closing one file drops them all."""


class Locks:
    """Locks between processes.  Raises OSError, and BnfctlError where this process has them already.

    Threads of one process don't exclude each other here.
    """

    def __init__(self, path: Path) -> None:
        self._path = os.path.realpath(path)
        if self._path in _OPEN:
            raise BnfctlError(
                "this process uses the file of answers already",
                where=self._path,
                hint="one client for a file at a time",
            )
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _OPEN[self._path] = self

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One process at a time: waits for its turn."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _TURN)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _TURN)

    def take(self, key: str) -> bool:
        """Whether `key` (hexadecimal) is now this process's; never waits."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte(key))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def drop(self, key: str) -> None:
        """Leave `key` to the others."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _byte(key))

    def close(self) -> None:
        """Drop all."""
        if _OPEN.pop(self._path, None) is not None:
            os.close(self._file)


def _byte(key: str) -> int:
    """Among 2^60: two keys that meet only wait for each other."""
    return _TURN + 1 + int(key[:15], 16)


class Reserve:
    """A file that only takes up room, given back when the disk is full: what was asked by then can still be kept."""

    def __init__(self, path: Path, size: int) -> None:
        """size: bytes."""
        self.path, self.size = path, size

    def hold(self) -> bool:
        """Take the room, if it is not taken; whether there was any.  Raises OSError for all but a full disk or quota."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_size >= self.size:
                return True
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.posix_fallocate(file, 0, self.size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            self.give_back()
            return False
        finally:
            os.close(file)
        return True

    def give_back(self) -> bool:
        """Free the room; whether there was a file."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        return True
