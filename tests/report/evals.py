"""Eval artifacts with known grades and verdicts: what all of the report is tested on.  Their summaries are the real ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bnfctl import shards
from bnfctl.artifact import Artifact, Pinned, Plan, Store
from bnfctl.config import EvalConfig
from bnfctl.evaluation import shifting
from bnfctl.evaluation.figures import figures, with_holm
from bnfctl.evaluation.rows import SCHEMA
from bnfctl.tasks.arena_hard import ArenaHard
from bnfctl.tasks.judging import Fingerprint
from bnfctl.tasks.shift_prompts import ShiftPrompts
from bnfctl.tasks.wildbench import WildBench
from bnfctl.tasks.wildbench_pairs import WildBenchPairs

BASE = Pinned("hub-model", "owner/base@5f0b02c75b57", "b" * 64)
VERSION = "1"


class Grades:
    """A task with a grade for each item."""

    def __init__(self, name: str, binary: bool, version: str = VERSION) -> None:
        self.name, self.binary, self.version = name, binary, version

    def aggregate(self, grades: Sequence[Any]) -> dict[str, Any]:
        return {}


BINARY = ("gsm8k", "crux")


def judge(name: str = "stub", protocol: str = "protocol") -> Fingerprint:
    parameters = {"temperature": 0.0, "max_tokens": None, "token_field": "max_tokens", "json_mode": True}
    return Fingerprint(protocol, "abc", name, "vllm 0.32", (name,), parameters)


def row(
    task: str, item: int, grade: float | None, response: str, extra: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """A row without its model, which `publish` adds; more: other columns."""
    prompt = [{"role": "user", "content": f"Question {item}?"}]
    return {
        "task": task, "item_id": f"{task}-{item:03}", "prompt": prompt, "response": response,
        "tokens": len(response.split()), "finish_reason": "stop", "grade": grade,
        "extra": None if extra is None else json.dumps(extra), "answers": None if extra is None else "{}",
        **more,
    }  # fmt: skip


def graded(task: str, grades: Sequence[float | None], first: int = 0, words: int = 5) -> list[dict[str, Any]]:
    """Rows of a task without a judge; items are numbered from `first`."""
    return [row(task, first + n, grade, "word " * words) for n, grade in enumerate(grades)]


def arena(
    verdicts: Sequence[tuple[str | None, str | None]], lengths: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Rows of arena-hard: the verdicts of both games; the baseline's responses have 100 characters."""
    rows = []
    for n, pair in enumerate(verdicts):
        length = (lengths or [100])[n % len(lengths or [100])]
        nulls = {f"game{game}": "no label" for game, verdict in enumerate(pair, 1) if verdict is None}
        extra = {
            "verdicts": list(pair), "nulls": nulls, "unit": "characters", "length": length, "baseline_length": 100,
            "characters": length, "baseline_characters": 100,
        }  # fmt: skip
        rows.append(row("arena-hard", n, 0.5, "x" * length, extra))
    return rows


def wild(scores: Sequence[float | None], tags: Sequence[str] = ("Math",), length: int = 200) -> list[dict[str, Any]]:
    """Rows of wildbench."""
    rows = []
    for n, score in enumerate(scores):
        nulls = {"score": "no JSON object"} if score is None else {}
        extra = {"length": length, "whole": True, "tags": list(tags), "nulls": nulls}
        rows.append(row("wildbench", n, score, "y" * length, extra))
    return rows


def pairs(choices: Sequence[dict[str, str | None]], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of wildbench-pairs: for each item the choices against the references, the model as A, they 500 characters long."""
    rows = []
    for n, mine in enumerate(choices):
        games = {
            reference: {"choice": choice, "model_is_a": True, "other_length": 500, "whole": True}
            for reference, choice in mine.items()
        }
        nulls = {reference: "no JSON object" for reference, choice in mine.items() if choice is None}
        extra = {"games": games, "nulls": nulls, "length": lengths[n], "tags": ["Math"]}
        rows.append(row("wildbench-pairs", n, 0.0, "z" * lengths[n], extra))
    return rows


def publish(
    store: Store, models: dict[str, list[dict[str, Any]]] | list[dict[str, Any]], model: Pinned | None = BASE,
    judged_by: Fingerprint | None = None, base: Artifact | None = None, version: str = VERSION, seed: int = 0,
    shifts: Iterable[dict[str, Any]] = (), responses: str = "reference",
) -> Artifact:  # fmt: skip
    """An eval of version 2: of one model, or of several that files hold (model None).

    shifts: rows of `analysis.shifts.SCHEMA`, of the one model against BASE, on `responses` (--shift-responses).
    """
    if isinstance(models, list):
        assert model is not None
        models = {model.ref: models}
    rows = [{**one, "model": name} for name, mine in models.items() for one in mine]
    tasks: dict[str, Any] = {}
    for name in dict.fromkeys(one["task"] for one in rows):
        made = {
            "arena-hard": lambda: ArenaHard(draws=50),
            "wildbench": lambda: WildBench(draws=50),
            "wildbench-pairs": lambda: WildBenchPairs(draws=50),
        }
        task: Any = made[name]() if name in made else Grades(name, name in BINARY, version)
        mine = [one for one in rows if one["task"] == name]
        tasks[name] = figures(task, mine, base, dict.fromkeys(models, judged_by or judge()))
    inputs = {"model": model} if model is not None else {"responses-0": Pinned("file", "file.jsonl", "f" * 64)}
    inputs |= {"base": base.pinned()} if base is not None else {}
    config = EvalConfig(
        tasks=tuple(tasks), model=model.ref if model else None, seed=seed, responses=() if model else ("file.jsonl",),
        base=str(base.path) if base else None,
    )  # fmt: skip
    shifts = list(shifts)
    if shifts:
        config = replace(config, tasks=(*tasks, "shifts"), shift_responses=responses)
        inputs["reference"] = BASE
    versions = {name: f"{found['version']} {hash_of(rows)}" for name, found in tasks.items()}
    plan = Plan("eval", 2, config, inputs, versions=versions)
    with store.draft(plan) as draft:
        draft.open()
        shards.write_shards(draft.path / "rows", rows, SCHEMA)
        if shifts:
            (name,) = models
            tasks["shifts"] = shift_figures(draft.path / shifting.FOLDER, name, shifts, responses)
        return draft.publish({"models": list(models), "tasks": with_holm(tasks)})


def shift_figures(folder: Path, model: str, rows: list[dict[str, Any]], responses: str) -> dict[str, Any]:
    """Writes the rows; the summary of the task."""
    from bnfctl.analysis.shifts import SCHEMA

    shards.write_shards(folder, rows, SCHEMA)
    found = shifting.figures(folder)
    return {"version": ShiftPrompts.version, "reference": BASE.ref, "responses": responses, "models": {model: found}}


def hash_of(rows: list[dict[str, Any]]) -> int:
    """So that two evals of other rows have other keys, as those of other inputs have."""
    return sum(len(json.dumps(one)) * (n + 1) for n, one in enumerate(rows)) + sum(map(ord, json.dumps(rows)))
