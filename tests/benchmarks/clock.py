"""Time one function of somebody else's code while it runs inside a larger call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def clocked(owner: Any, name: str) -> Iterator[list[float]]:
    """Seconds of every call of `owner.name` inside the block."""
    inner, seconds = getattr(owner, name), []

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        setattr(owner, name, inner)
