"""Other processes, as tests see them: whether they are there, wait for what they do, and end them for certain."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def until(reached: Callable[[], bool], seconds: float = 60.0, what: str = "it never happened") -> None:
    """Wait for it; AssertionError, with `what` it means, where it doesn't happen in time."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and that nobody has waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(process: subprocess.Popen[Any]) -> None:
    """`kill -9` of a process in the middle of its work: AssertionError where it has ended by itself."""
    assert process.poll() is None, "it was over before the kill"
    process.kill()
    assert process.wait() == -signal.SIGKILL


def processes_with(text: str) -> list[int]:
    """Of this text in their command line, and those in the same sessions: vLLM renames its engine's process."""
    sessions, found = set(), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            pid, line = int(path.name), (path / "cmdline").read_bytes().decode("utf-8", "replace")
            session = os.getsid(pid)
        except (OSError, ValueError):
            continue
        found.append((pid, session))
        if text in line and session != os.getsid(0):
            sessions.add(session)
    return [pid for pid, session in found if session in sessions]
