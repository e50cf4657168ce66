"""eval with --judge, where the server is one that the run starts: its answers count, its death is told, it is gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bnfctl.artifact import Store
from bnfctl.config import EvalConfig
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.evaluation import asking
from bnfctl.launch import execute
from bnfctl.stages import eval as stage
from tests import models
from tests.fake_server import FAKE, be_quick, gone, notes
from tests.tasks.judged_world import answer_row, arena, write

COUNT = 3


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    be_quick(monkeypatch)


@pytest.fixture
def config(tmp_path: Path) -> EvalConfig:
    data = arena(tmp_path, COUNT, 2024).data_dir
    file = write(tmp_path / "theirs.jsonl", [answer_row(n, f"text {n}", "theirs", 2024) for n in range(COUNT)])
    models.make_tokenizer(tmp_path / "judge")
    (tmp_path / "judge" / "config.json").write_text("{}")
    return EvalConfig(
        tasks=("arena-hard",), responses=(str(file),), data_dir=str(data), judge=str(tmp_path / "judge"), concurrency=1,
        retries=0,
    )  # fmt: skip


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Have the fake in vLLM's place; returns what it was asked to serve, once it was."""
    (tmp_path / "notes").mkdir()
    asked: dict[str, Any] = {}

    def put(*arguments: str) -> dict[str, Any]:
        def command(folder: Path, name: str, **settings: Any) -> tuple[list[str], dict[str, str]]:
            asked.update(settings, folder=folder, name=name)
            return [*FAKE, "--name", name, "--notes", str(tmp_path / "notes"), *arguments], {}

        monkeypatch.setattr(asking, "server_command", command)
        monkeypatch.setattr(stage, "check_server", lambda where, instead: None)
        return asked

    return put


def test_the_judge_is_served_for_the_time_of_the_run(
    config: EvalConfig, store: Store, serve: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    asked = serve()
    artifact = execute("eval", config, store).artifact
    assert gone(tmp_path)
    digest = artifact.manifest.inputs["judge"]["digest"][:12]
    assert (asked["folder"], asked["name"]) == (tmp_path / "judge", f"judge@{digest}")
    assert "--server" in asked["instead"]
    rows = list(artifact.rows())
    assert [json.loads(row["extra"])["verdicts"] for row in rows] == [["A>>B", "A>>B"]] * COUNT
    figures = artifact.manifest.summary["tasks"]["arena-hard"]["models"]["theirs"]
    assert figures["mean"] == 0.5 and figures["judge"]["served_model"] == f"judge@{digest}"
    assert (artifact.path / "log" / "judge.log").is_file()
    key = notes(tmp_path)[0]["key"]
    assert not [path for path in store.home.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]


def test_a_judge_that_dies_is_told_and_the_next_run_goes_on(
    config: EvalConfig, store: Store, serve: Callable[..., dict[str, Any]], tmp_path: Path, capfd: Any
) -> None:
    serve("--calls", "4")
    with pytest.raises(
        BnfctlError, match=r"the server of judge@\w{12} ended \(exit code 5\): MemoryError: no room"
    ) as caught:
        execute("eval", config, store)
    assert (caught.value.where or "").endswith("/log/judge.log")
    assert gone(tmp_path)
    serve()
    execute("eval", config, store)
    assert "2 calls, 4 answered before" in capfd.readouterr().err


def test_another_model_in_the_same_folder_is_another_judge(
    config: EvalConfig, store: Store, serve: Callable[..., dict[str, Any]], tmp_path: Path, capfd: Any
) -> None:
    serve()
    first = execute("eval", config, store).artifact
    (tmp_path / "judge" / "config.json").write_text('{"hidden_size": 8}')
    second = execute("eval", config, store).artifact
    assert capfd.readouterr().err.count("6 calls, 0 answered before") == 2
    judges = [made.manifest.summary["tasks"]["arena-hard"]["models"]["theirs"]["judge"] for made in (first, second)]
    assert judges[0]["digest"] != judges[1]["digest"]


def test_without_vllm_nothing_starts(config: EvalConfig, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="vLLM is not installed") as caught:
        stage.plan(config, store)
    assert caught.value.where == "--judge"
    assert "bnfctl[vllm]" in str(caught.value.hint) and "--server http" in str(caught.value.hint)
