"""What the torch-free stages and the lab's prompts give, pinned row by row.

`pytest --update-golden` rewrites the files, together with a version bump.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bnfctl import tables
from bnfctl.artifact import Artifact, Store
from bnfctl.config import BuildConfig, GenerateConfig, ScoreConfig
from bnfctl.lab.world import FAMILIES, SPLITS, prompts
from bnfctl.stages import build, generate, score
from bnfctl.tasks import make
from tests.golden.compare import FOLDER, compare
from tests.stages.chain import run, write_jsonl

RESPONSES: list[dict[str, Any]] = [
    {"prompt_id": "sum", "prompt": "What is 2 + 2?", "answer": 4,
     "responses": [{"text": "4", "model": "a"}, {"text": "2 + 2 = 4.", "model": "b"}, {"output": '{"answer": "5"}'}]},
    {"id": 7, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Half of 5?"}],
     "answer": "2.5", "responses": ["two", "5/2", "2½ \ud83d", "#### 2.50"]},
    {"prompt": "Capitale de l’Islande ? 🏔", "answer": "Reykjavík", "response": "Reykjavi\u0301k."},
    {"prompt": "Capitale de l’Islande ? 🏔", "answer": "Reykjavík", "response": "Oslo", "model": "c"},
    {"id": "open", "prompt": "Say hi.", "responses": ["hi", "hello", ""]},
]  # fmt: skip
RULES: dict[str, dict[str, str]] = {
    "exact": {}, "numeric": {}, "regex": {"pattern": r"(?:=|answer\": \"|#### )\s*(\S+?)[.\"]*$"}, "lab": {},
}  # fmt: skip
PREFERENCES: list[dict[str, Any]] = [
    *({"id": f"r{i}", "prompt": f"Question {i}", "chosen": f"right {i}", "rejected": f"wrong {i}"} for i in range(24)),
    {"prompt": "Hi", "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
     "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]},
]  # fmt: skip


@pytest.fixture
def candidates(store: Store, tmp_path: Path) -> Artifact:
    path = write_jsonl(tmp_path / "responses.jsonl", RESPONSES)
    return run(GenerateConfig(prompts=str(path), sampler="file"), store)


def test_generate_from_a_file(candidates: Artifact, update_golden: bool) -> None:
    rows = {"rows": list(candidates.rows()), "summary": candidates.manifest.summary}
    compare(FOLDER / "generate.json", generate.VERSION, rows, update_golden)


def test_score_with_every_rule(candidates: Artifact, store: Store, update_golden: bool) -> None:
    # math-verify's rewards are those of a library, whose version is in the key
    assert set(RULES) == set(tables.RULES) - {"math-verify"}
    rows = {}
    for rule, changes in RULES.items():
        made = run(ScoreConfig(input=candidates.ref, rule=rule, **changes), store)
        rows[rule] = {"rows": list(made.rows()), "summary": made.manifest.summary}
    compare(FOLDER / "score.json", score.VERSION, rows, update_golden)


def test_build_from_scores_and_from_preferences(
    candidates: Artifact, store: Store, tmp_path: Path, update_golden: bool
) -> None:
    scores, exact = (run(ScoreConfig(input=candidates.ref, rule=rule), store) for rule in ("numeric", "exact"))
    prefs = write_jsonl(tmp_path / "prefs.jsonl", PREFERENCES)
    rows = {}
    for name, source, changes in (
        ("scores", scores.ref, {"test_fraction": 0.5}),
        ("preferences", str(prefs), {"test_fraction": 0.25}),
        ("masked", str(prefs), {"pairing_ratio": 0.25, "seed": 1}),
        ("all-pairs", scores.ref, {"choose": "all-pairs", "pairing_ratio": 0.5}),
        ("top-bottom", scores.ref, {"choose": "top-bottom", "top_k": 2}),
        ("best-random", scores.ref, {"choose": "best-random", "seed": 1}),
        ("balanced", scores.ref, {"length_balance": 1.0}),
        ("threshold", scores.ref, {"choose": "threshold", "good": 0.2, "bad": -0.2, "min_chars": 2}),
        ("summed", scores.ref, {"also": (exact.ref,), "weights": (1.0, 0.5)}),
    ):
        made = run(BuildConfig(input=source, **changes), store)
        rows[name] = {"rows": list(made.rows()), "summary": made.manifest.summary}
    compare(FOLDER / "build.json", build.VERSION, rows, update_golden)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_labs_first_prompts(family: str, update_golden: bool) -> None:
    rows = {split: list(prompts(family, split, 8)) for split in SPLITS}
    compare(FOLDER / f"lab-{family}.json", make(f"lab-{family}").version, rows, update_golden)


def test_rows_may_change_only_with_the_version(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    with pytest.raises(pytest.fail.Exception, match="stored version none, here 1"):
        compare(path, 1, [{"a": 1}], False)
    compare(path, 1, [{"a": 1}], True)
    compare(path, 1, [{"a": 1}], False)
    for update in (False, True):
        with pytest.raises(pytest.fail.Exception, match="the rows changed and the version did not: 1 -> 2"):
            compare(path, 1, [{"a": 2}], update)
    with pytest.raises(pytest.fail.Exception, match="stored version 1, here 2: pytest --update-golden"):
        compare(path, 2, [{"a": 2}], False)
    compare(path, 2, [{"a": 2}], True)
    compare(path, 2, [{"a": 2}], False)
