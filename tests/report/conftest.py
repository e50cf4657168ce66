"""A run with everything that a report shows, and its report: what the page's tests look at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bnfctl import report
from bnfctl.artifact import Artifact, Store
from tests.report.evals import BASE, publish, row
from tests.report.page_world import HOSTILE, publish_build, publish_train, shift_rows

TASKS, ITEMS = ("gsm8k", "crux", "math-l5", "mmlu-redux"), 15
"""Items are of each task; tasks are so many that a set of them hardly has the same order in two processes."""
ANSWERS = {"game1": [{"choices": [{"text": HOSTILE, "finish": "stop"}]}]}


def two_methods(folder: Path) -> tuple[Store, list[Artifact]]:
    """Two losses of two seeds each and their base, all made up; item 3 of gsm8k is hostile, under every model."""
    store = Store(folder / "artifacts")
    build = publish_build(store, records=60)
    policies = [
        (loss, seed, publish_train(store, build, loss, seed).pinned()) for loss in ("bnf", "dpo") for seed in (0, 1)
    ]
    made: list[Artifact] = []
    for number, (loss, seed, model) in enumerate([("", 0, BASE), *policies]):
        rows = [
            row(task, item, float((item + number) % 3 == 0),
                HOSTILE if (task, item) == ("gsm8k", 3) else f"It is {item} plus{number}.",
                answers=json.dumps(ANSWERS) if item == 3 else None)
            for task in TASKS for item in range(ITEMS)
        ]  # fmt: skip
        shifts = shift_rows(loss, seed, 20) if loss else ()
        made.append(publish(store, rows, model, base=made[0] if loss else None, seed=seed, shifts=shifts))
    return store, made


@pytest.fixture(scope="session")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[Artifact], report.Written]:
    """The store, the evals, and the report on them."""
    folder = tmp_path_factory.mktemp("made-run")
    store, artifacts = two_methods(folder)
    return store, artifacts, report.write(artifacts, store, folder / "report")
