"""Writes that survive a crash: fsync, then one rename.

Every durable step passes through `boundary`, so a test can kill the process at each one of them in turn.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

_passed = 0


def boundary(name: str) -> None:
    """The fault hook: BNFCTL_FAULT_AT=N kills this process, as `kill -9` would, at its Nth durable step.

    Only the crash tests set the variable.  `BNFCTL_FAULT_LOG` names a file that gets a line per step,
    which is how those tests learn how many steps there are.
    """
    global _passed
    _passed += 1
    if log := os.environ.get("BNFCTL_FAULT_LOG"):
        with open(log, "a", encoding="utf-8") as out:
            out.write(f"{name}\n")
    if os.environ.get("BNFCTL_FAULT_AT") == str(_passed):
        os.kill(os.getpid(), signal.SIGKILL)


def sync_file(path: Path) -> None:
    """Flush one file's content to the disk."""
    boundary(f"before fsync {path.name}")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    boundary(f"after fsync {path.name}")


def sync_dir(path: Path) -> None:
    """Flush a folder's entries, so that a rename or a new file in it is durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it."""
    for path in sorted(folder.rglob("*")):
        sync_dir(path) if path.is_dir() else sync_file(path)
    sync_dir(folder)


def rename(source: Path, target: Path) -> None:
    """Atomic rename (files or folders on one file system), durable on return."""
    boundary(f"before rename {target.name}")
    source.replace(target)
    sync_dir(target.parent)
    boundary(f"after rename {target.name}")


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling, then publish it under `path`: whole or not there at all.

    A failing `write` (a full disk) leaves no temporary file behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync_file(temporary)
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` atomically and durably."""
    write_file(path, lambda temporary: _put(temporary, data))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically and durably."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(data)
