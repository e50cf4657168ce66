"""The stages one after the other in this process, on files and models of a few rows."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bnfctl import console, launch
from bnfctl.artifact import Artifact, Store
from bnfctl.config import CONFIGS, BuildConfig, GenerateConfig, ScoreConfig, TrainConfig
from bnfctl.errors import Interrupted


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """One JSON document per line; a text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def run(config: Any, store: Store) -> Artifact:
    """The artifact of the stage that the config belongs to."""
    stage = next(name for name, cls in CONFIGS.items() if type(config) is cls)
    return launch.execute(stage, config, store).artifact


def interrupt(config: Any, store: Store) -> None:
    """Run the stage with a stop signal that is there from the beginning: it saves its first unit, then stops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "_signal", signal.SIGINT)
        with pytest.raises(Interrupted):
            run(config, store)


def stop_after(unit: str, count: int, patch: pytest.MonkeyPatch) -> None:
    """A stop signal that arrives when a progress bar of that unit has reached `count`."""
    advance: Callable[..., None] = console.Progress.advance

    def advancing(self: console.Progress, n: int = 1, note: str = "") -> None:
        advance(self, n, note)
        if self.unit == unit and self.done == count:
            patch.setattr(console, "_signal", signal.SIGTERM)

    patch.setattr(console.Progress, "advance", advancing)


def published(store: Store) -> list[str]:
    """Every artifact of the store, and whatever a write left half done."""
    return [artifact.ref for artifact in store.artifacts()] + [path.name for path in store.home.rglob("*.tmp")]


@dataclass(frozen=True)
class Chain:
    """Candidates of the tiny policy, their scores, and the build made from them, in one store."""

    store: Store
    policy: Path
    candidates: Artifact
    scores: Artifact
    build: Artifact

    def train(self, **changes: Any) -> TrainConfig:
        """A short training of the policy on the build."""
        few: dict[str, Any] = {"lr": 1e-3, "batch_size": 4, "save_every": 0, "dtype": "float32"}
        return TrainConfig(**{"model": str(self.policy), "data": self.build.ref, **few, **changes})

    def copy(self, home: Path) -> Store:
        """The same artifacts in a store of its own."""
        shutil.copytree(self.store.home, home, ignore=shutil.ignore_patterns("train", "eval", ".drafts"))
        return Store(home)


PROMPTS = 16
SAMPLES = 4


def prompt_rows(count: int = PROMPTS) -> list[dict[str, Any]]:
    return [{"id": f"q{i}", "prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(count)]


def make_chain(folder: Path, policy: Path) -> Chain:
    """generate -> score -> build; the reward is whether a response has one of six letters."""
    store = Store(folder / "artifacts")
    prompts = write_jsonl(folder / "prompts.jsonl", prompt_rows())
    candidates = run(
        GenerateConfig(prompts=str(prompts), model=str(policy), sampler="hf", n=SAMPLES, max_tokens=10, chunk=4), store
    )
    scores = run(ScoreConfig(input=candidates.ref, rule="regex", pattern="[a-f]"), store)
    build = run(BuildConfig(input=scores.ref, test_fraction=0.25), store)
    return Chain(store, policy, candidates, scores, build)
