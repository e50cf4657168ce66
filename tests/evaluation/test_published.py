"""Files as they were published give the figures as they were published, by the command that a user types.

BNFCTL_PUBLISHED names a folder with such files: zeroeval/{gsm,math-l5,crux}/MODEL.json (WildEval/ZeroEval, result_dirs) and
wildbench/MODEL.json (allenai/WildBench, eval_results/v2.0625/score.v2/eval=gpt-4o-2024-05-13).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Done

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("BNFCTL_PUBLISHED" not in os.environ, reason="BNFCTL_PUBLISHED names no folder with files"),
]
ZEROEVAL = [
    ("gsm", "Meta-Llama-3-8B-Instruct", "78.47", "0.00", "429.39", {"mathverify": "78.39"}),
    ("gsm", "gemma-2-9b-it", "87.41", "0.00", "394.83", {"mathverify": "87.34"}),
    ("math-l5", "Meta-Llama-3-8B-Instruct", "7.91", "11.93", "770.32", {"mathverify": "7.77"}),
    ("math-l5", "gemma-2-9b-it", "19.42", "0.69", "979.22", {"mathverify": "19.14"}),
    ("crux", "Meta-Llama-3-8B-Instruct", "37.75", "0.25", "411.52", {"zeroeval-20240801": "36.62", "literal": "38.50"}),
    ("crux", "gemma-2-9b-it", "46.00", "0.00", "484.51", {"zeroeval-20240801": "44.88", "literal": "47.62"}),
]
"""Accuracy, no answer (per cent) and characters are ZeroEval's; the other graders' accuracies are this package's."""
WILDBENCH = [("gemma-2b-it", "4.738", "-0.525", "1590.08")]
"""Score, adjusted score and characters."""


def graded(warm_bnfctl: Callable[..., Done], task: str, file: Path, *flags: str) -> dict[str, Any]:
    """The figures of the file's only model."""
    done = warm_bnfctl("eval", "--tasks", task, "--responses", file, "--json", *flags)
    assert done.code == 0, done.err
    (found,) = done.json["summary"]["tasks"][task]["models"].values()
    return dict(found)


@pytest.mark.parametrize(("name", "model", "accuracy", "unanswered", "characters", "others"), ZEROEVAL)
def test_zeroeval(
    name: str, model: str, accuracy: str, unanswered: str, characters: str, others: dict[str, str],
    warm_bnfctl: Callable[..., Done],
) -> None:  # fmt: skip
    task = "gsm8k" if name == "gsm" else name
    flags = ["--mathverify"] if "mathverify" in others else []
    found = graded(
        warm_bnfctl, task, Path(os.environ["BNFCTL_PUBLISHED"]) / "zeroeval" / name / f"{model}.json", *flags
    )
    percent = {figure: f"{found[figure] * 100:.2f}" for figure in ("mean", "no_answer", *(f"acc_{o}" for o in others))}
    assert percent == {"mean": accuracy, "no_answer": unanswered, **{f"acc_{other}": p for other, p in others.items()}}
    assert f"{found['reasoning_characters']:.2f}" == characters


@pytest.mark.parametrize(("model", "score", "adjusted", "characters"), WILDBENCH)
def test_wildbench(model: str, score: str, adjusted: str, characters: str, warm_bnfctl: Callable[..., Done]) -> None:
    found = graded(warm_bnfctl, "wildbench", Path(os.environ["BNFCTL_PUBLISHED"]) / "wildbench" / f"{model}.json")
    assert [f"{found['score']:.3f}", f"{found['adjusted']:.3f}"] == [score, adjusted]
    assert f"{found['length']:.2f}" == characters
