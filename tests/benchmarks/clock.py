"""The clock of a benchmark's process, and a way to time one function while it runs inside a larger call."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_clock = time.perf_counter


def count_cpu_time() -> None:
    """From here on `now` counts the CPU seconds of all threads of this process: other load matters less to it."""
    global _clock
    _clock = time.process_time


def now() -> float:
    """Seconds, of use as differences only."""
    return _clock()


def resident_mib() -> float:
    """Peak resident memory of this process so far (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def clocked(owner: Any, name: str, then: Callable[[], object] = lambda: None) -> Iterator[list[float]]:
    """Seconds of every call of `owner.name` inside the block; `then` is called after each."""
    inner, seconds = getattr(owner, name), []

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = now()
        try:
            return inner(*args, **kwargs)
        finally:
            seconds.append(now() - started)
            then()

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        setattr(owner, name, inner)
