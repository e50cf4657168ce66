"""The prompts of the shift analysis: WildBench's first thousand, a file's, the lab's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bnfctl import tasks
from bnfctl.artifact import Store
from bnfctl.data.records import Prompt, Reward
from bnfctl.errors import UsageError
from bnfctl.tasks.shift_prompts import COUNT, ShiftPrompts, pin_prompts
from tests.tasks.judged_world import wild_row, write


def test_the_first_thousand_of_wildbench(tmp_path: Path) -> None:
    write(tmp_path / "wildbench.jsonl", [wild_row(n, turns=1 + 2 * (n % 2)) for n in range(COUNT + 24)])
    task = ShiftPrompts(tmp_path)
    assert [prompt.id for prompt in task.requests(None)] == [f"s{n}" for n in range(1000)]
    assert len(task.requests(1024)) == 1024 and [prompt.id for prompt in task.requests(2)] == ["s0", "s1"]
    assert [turn["role"] for turn in task.requests(2)[1].messages] == ["user", "assistant", "user"]
    assert task.source.local(tmp_path) == tmp_path / "wildbench.jsonl"


def test_prompts_of_a_file(tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": f"q{n}", "prompt": f"Question {n}"} for n in range(COUNT + 5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [rows[0], *rows]))
    task = ShiftPrompts(shift_prompts=pin_prompts(str(tmp_path / "prompts.jsonl"), store))
    assert [prompt.id for prompt in task.requests(None)] == [f"q{n}" for n in range(COUNT)]
    assert "left out: 1" in capsys.readouterr().err
    assert task.requests(3)[2].messages == ({"role": "user", "content": "Question 2"},)


def test_the_lab_gives_prompts_that_no_training_has_seen(store: Store) -> None:
    pinned = pin_prompts("lab:chat", store)
    found = ShiftPrompts(shift_prompts=pinned).requests(20)
    assert [prompt.id for prompt in found] == [f"lab-chat-test-{n:06d}" for n in range(20)]
    with pytest.raises(UsageError, match="did you mean 'chat'") as caught:
        pin_prompts("lab:chatt", store)
    assert "--shift-prompts lab:chatt" in (caught.value.where or "")


def test_prompts_that_are_not_there(tmp_path: Path, store: Store) -> None:
    with pytest.raises(UsageError, match="no such file") as caught:
        pin_prompts(str(tmp_path / "none.jsonl"), store)
    assert caught.value.where == "--shift-prompts"
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UsageError, match="no prompts"):
        ShiftPrompts(shift_prompts=pin_prompts(str(tmp_path / "empty.jsonl"), store)).requests(None)
    with pytest.raises(UsageError, match=r"no wildbench.jsonl"):
        ShiftPrompts(tmp_path).requests(None)


def test_it_is_decoded_greedily_and_not_graded() -> None:
    assert tasks.takes("shifts") == {"data_dir", "pinned", "shift_prompts"}
    task = tasks.make("shifts")
    assert (task.name, task.binary, task.decoding.temperature, task.decoding.max_tokens) == ("shifts", False, 0.0, 4096)
    assert task.grade(Prompt("a", ()), "text") == Reward(None) and task.aggregate([]) == {}
