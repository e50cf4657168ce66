"""Shared fixtures: an artifact store, and a way to run the command line in this process's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bnfctl import console
from bnfctl.artifact import Artifact, Plan, Store
from bnfctl.config import BuildConfig
from bnfctl.data import pairing
from bnfctl.shards import write_shards
from tests import warm

REPOSITORY = Path(__file__).parent.parent

# Tiny tensors: a second thread only waits for a core, and two workers of pytest-xdist share two.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden (with a version bump)")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is never asked, whatever the machine's network allows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("BNFCTL_HOME", raising=False)


@pytest.fixture(autouse=True)
def nothing_was_said() -> None:
    """Each test is its own process to `say_once`."""
    console.say_once.cache_clear()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


@pytest.fixture
def make_build(store: Store) -> Callable[..., Artifact]:
    """A small build artifact, made without running a stage; `seed` makes distinct ones."""

    def make(seed: int = 0, **summary: Any) -> Artifact:
        plan = Plan("build", 1, BuildConfig(input="file.jsonl", seed=seed), {})
        row = {
            "record_id": "r", "prompt_id": "r", "split": "train", "prompt": [{"role": "user", "content": "Say hi."}],
            "chosen_text": "hi", "rejected_text": "no",
        }  # fmt: skip
        with store.draft(plan) as draft:
            draft.open()
            write_shards(draft.path / "rows", [row], pairing.SCHEMA)
            return draft.publish({"records": 1, "tokenizer": None, "model": None, **summary})

    return make


@pytest.fixture
def stop_signal() -> Iterator[Callable[[int], None]]:
    """Pretend that a signal has arrived; taken back afterwards."""

    def arrive(signum: int) -> None:
        console._signal = signum

    yield arrive
    console._signal = None


class Done:
    """A finished command: exit code, stdout, stderr."""

    def __init__(self, process: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = process.returncode, process.stdout, process.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def bnfctl(tmp_path: Path) -> Callable[..., Done]:
    """Run `bnfctl ARGS` as its own process, with the store in tmp_path/artifacts."""

    def run(*args: str | Path, env: dict[str, str] | None = None, timeout: float = 300) -> Done:
        command = [sys.executable, "-m", "bnfctl", *map(str, args)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment(tmp_path, env), cwd=REPOSITORY, timeout=timeout,
            check=False,
        )  # fmt: skip
        return Done(done)

    return run


@pytest.fixture
def warm_bnfctl(tmp_path: Path) -> Callable[..., Done]:
    """As `bnfctl`, in a process that has torch and transformers imported already: where they are not the matter."""

    def run(*args: str | Path, env: dict[str, str] | None = None, timeout: float = 300) -> Done:
        return Done(warm.bnfctl([*map(str, args)], environment(tmp_path, env), REPOSITORY, timeout))

    return run


def environment(tmp_path: Path, more: dict[str, str] | None) -> dict[str, str]:
    return {**os.environ, "BNFCTL_HOME": str(tmp_path / "artifacts"), "HF_HUB_OFFLINE": "1", **(more or {})}
