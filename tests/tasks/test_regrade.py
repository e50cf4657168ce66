"""Responses made elsewhere: files of ZeroEval and plain rows, graded without a model."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bnfctl.errors import UsageError
from bnfctl.tasks.gsm8k import GSM8K
from bnfctl.tasks.imports import read_answers, regrade
from bnfctl.tasks.mmlu_redux import MMLURedux
from bnfctl.tasks.zeroeval import ZeroEvalTask

QUESTIONS = [{"id": f"g{i}", "question": f"{i} + 4?", "answer": f"# {i + 4}"} for i in range(3)]
SAID = ['{"reasoning": "ab", "answer": "4"}', '{"reasoning": "abcd", "answer": "6"}', "no idea"]


def result_rows(model: str = "org/some-model") -> list[dict[str, Any]]:
    """What ZeroEval writes for each item."""
    return [
        {
            "session_id": row["id"], "chat_history": [row["question"]], "model_input": "<s>...", "output": [text],
            "generator": model, "configs": {"engine": "vllm", "temperature": 0.0}, "dataset": "gsm", **row,
        }
        for row, text in zip(QUESTIONS, SAID, strict=True)
    ]  # fmt: skip


def figures(path: Path, task: ZeroEvalTask) -> dict[str, tuple[float, float, float | None]]:
    """model -> accuracy, share without an answer, characters of reasoning."""
    found = {}
    for model, graded in regrade(path, task).items():
        rewards = [reward for _, reward in graded]
        more = task.aggregate(rewards)
        found[model] = fmean(r.value or 0.0 for r in rewards), more["no_answer"] or 0.0, more["reasoning_characters"]
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(json.dumps(rows, indent=2) if path.suffix == ".json" else lines, encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_result_files_need_no_data(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / f"model{ending}", result_rows())
    assert figures(path, GSM8K()) == {"org/some-model": (1 / 3, 1 / 3, 3.0)}
    assert "3 responses of org/some-model; gsm8k has 1319 items" in capsys.readouterr().err


def test_plain_rows_are_joined_with_the_tasks_items(tmp_path: Path) -> None:
    data = write(tmp_path / "gsm.jsonl", QUESTIONS)
    rows = [{"id": row["id"], "response": text} for row, text in zip(QUESTIONS, SAID, strict=True)]
    assert figures(write(tmp_path / "mine.jsonl", rows[::-1]), GSM8K(data)) == {"mine": (1 / 3, 1 / 3, 3.0)}
    answered = list(read_answers(tmp_path / "mine.jsonl", GSM8K(data)))
    assert [one.item.id for one in answered] == ["g2", "g1", "g0"]
    assert answered[0].where == f"{tmp_path / 'mine.jsonl'}:1"


def test_several_models_in_a_row(tmp_path: Path) -> None:
    rows = [
        {"prompt_id": row["id"], "prompt": row["question"], "answer": row["answer"],
         "responses": [{"model": "one", "text": text}, {"model": "two", "text": '{"answer": "5"}'}]}
        for row, text in zip(QUESTIONS, SAID, strict=True)
    ]  # fmt: skip
    found = figures(write(tmp_path / "x.jsonl", rows), GSM8K())
    assert found == {"one": (1 / 3, 1 / 3, 3.0), "two": (1 / 3, 0.0, 0.0)}


def test_multiple_choice_rows_without_choices_are_joined(tmp_path: Path) -> None:
    data = [{"id": "m", "question": "?", "choices": ["x", "y"], "correct_answer": "y"}]
    task = MMLURedux(write(tmp_path / "mmlu-redux.jsonl", data))
    rows = [{"id": "m", "question": "?", "answer": "y", "response": '{"answer": "B"}'}]
    assert figures(write(tmp_path / "x.jsonl", rows), task) == {"x": (1.0, 0.0, 0.0)}


def test_the_name_of_the_file_is_the_models_too(tmp_path: Path) -> None:
    rows = [{**QUESTIONS[0], "generator": "served", "output": ["$\\boxed{4}$"]}]
    assert figures(write(tmp_path / "other.json", rows), GSM8K())["served"][0] == 0.0
    assert figures(write(tmp_path / "Llama-3.1-8B.json", rows), GSM8K())["served"][0] == 1.0


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"id": "g0"}], "no response"),
        ([{"id": "g0", "response": 4}], "no response"),
        ([{"id": "g0", "output": ["a", 4]}], "no response"),
        ([{"id": "g0", "responses": [{"model": "m"}]}], "no response"),
        ([{"response": "x"}], "no id"),
        ([{"id": "g9", "response": "x"}], "gsm8k has no item 'g9' \\(did you mean 'g2'"),
        ([{"id": "g0", "response": "x"}] * 2, "two responses of x to g0"),
        ([], "no responses"),
    ],
)
def test_rows_that_cannot_be_graded(rows: list[dict[str, Any]], what: str, tmp_path: Path) -> None:
    data = write(tmp_path / "gsm.jsonl", QUESTIONS)
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(UsageError, match=what.split(" \\(")[0]) as caught:
        regrade(path, GSM8K(data))
    assert str(path) in str(caught.value.where)
