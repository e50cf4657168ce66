"""Servers of `fake_engine.py`, started as the package starts vLLM's; each leaves a note of what belongs to it."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from bnfctl.client import local
from tests.conftest import REPOSITORY
from tests.processes import alive

FAKE = [sys.executable, str(REPOSITORY / "tests" / "fake_engine.py")]


def be_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a fixture of every test that serves: it is seen at once that a server is up, and any process finds bnfctl."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(local, "_POLL_SECONDS", 0.05)


def fake(folder: Path, *arguments: str, **options: Any) -> AbstractContextManager[list[str]]:
    """`local.serving` of fakes, with notes and log in `folder`."""
    (folder / "notes").mkdir(exist_ok=True)
    command = [*FAKE, "--notes", str(folder / "notes"), *arguments]
    return local.serving(command, {"EXTRA": "1"}, "fake", log=folder / "log" / "judge.log", **options)


def notes(folder: Path) -> list[dict[str, Any]]:
    """One of every server that has begun."""
    return [json.loads(path.read_text()) for path in (folder / "notes").glob("*.json")]


def gone(folder: Path) -> bool:
    """Whether nothing is left of them; there must have been one."""
    found = notes(folder)
    assert found
    return not any(alive(pid) for note in found for pid in note["pids"])
