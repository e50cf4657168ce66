"""Errors that a user can act on: what went wrong, where, and what to type next.

Exit codes are part of the command-line contract: 1 the stage failed, 2 usage or configuration (nothing
was started), 3 a gate failed, 130 / 143 interrupted by SIGINT / SIGTERM (the same command resumes).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BnfctlError(Exception):
    """The stage failed (exit 1)."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def as_dict(self) -> dict[str, str | int | None]:
        """The JSON form, as printed under ``--json`` and written to a child's result.json."""
        return {"error": self.what, "where": self.where, "hint": self.hint, "exit_code": self.exit_code}


class UsageError(BnfctlError):
    """Bad flag, configuration or input (exit 2): nothing was started."""

    exit_code = 2


class GateError(BnfctlError):
    """A ``--require`` condition does not hold (exit 3)."""

    exit_code = 3


class Interrupted(BnfctlError):  # noqa: N818  (a stop is no error)
    """Stopped by a signal after saving what was done; the same command resumes (exit 130 or 143)."""

    def __init__(self, signum: int) -> None:
        super().__init__("interrupted", hint="the same command resumes where this one stopped")
        self.exit_code = 128 + signum


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
