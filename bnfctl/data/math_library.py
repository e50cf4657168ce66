"""The library math-verify (extra `math`): imported where it is asked for, quiet, and stopped where that can be."""

from __future__ import annotations

import logging
import threading
from functools import lru_cache
from importlib.metadata import version as installed_version
from typing import Any

from bnfctl.errors import UsageError

SECONDS = 5
"""For a reading, and again for a comparison: a tower of powers would take for ever."""


def library(where: str) -> Any:
    """The module, with its `errors`.  UsageError that names `where`, a flag, where the library is missing."""
    try:
        return _imported()
    except ImportError as error:
        raise UsageError(
            f"math-verify cannot be imported: {error}", where=where, hint="pip install 'bnfctl[math]'"
        ) from error


def version(where: str) -> str:
    """As keys have it.  Raises as `library`."""
    library(where)
    return f"math-verify {installed_version('math-verify')}"


def seconds() -> int | None:
    """What to give the library as its timeout: it can be stopped in a process's main thread only, else None."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None


@lru_cache(maxsize=1)
def _imported() -> Any:
    import math_verify
    import math_verify.errors

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns where its timeout is off, with whole texts
    return math_verify
