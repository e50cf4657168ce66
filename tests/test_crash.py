"""Crashes: a kill at every durable step of every stage, and seeded random kills of a whole pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.processes import alive, until

SMOKE = REPOSITORY / "pipelines" / "smoke.yaml"
ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}


def script(name: str, *arguments: str) -> Any:
    """What a script of tests/ prints as JSON."""
    command = [sys.executable, str(REPOSITORY / "tests" / name), *arguments]
    done = subprocess.run(command, env={**os.environ, **ENV}, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("stage", "least"),
    [
        ("score", 16),
        ("build", 12),
        pytest.param("generate", 20, marks=pytest.mark.slow),
        pytest.param("eval", 16, marks=pytest.mark.slow),
        pytest.param("train", 40, marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_every_fsync_and_rename_leaves_the_same_result(stage: str, least: int, tmp_path: Path) -> None:
    result = script("crashes.py", stage, str(tmp_path))
    assert result["bad"] == []
    assert result["steps"] >= least, "fewer boundaries than this stage has durable steps: is the hook still called?"


@pytest.mark.slow
def test_random_kills_of_the_smoke_pipeline_change_no_digest(tmp_path: Path) -> None:
    """One run, killed again and again, and each time going on where the last one stopped."""
    result = script("crashes.py", "kills", str(SMOKE), str(tmp_path), "5")
    assert result["bad"] == []
    assert result["kills"] >= 4, "it was over before most of the kills"
    drafts = (tmp_path / "killed" / ".drafts").glob("*")
    assert not [path for path in drafts if path.is_dir()], "no draft is left behind"


@pytest.mark.slow
@pytest.mark.parametrize("what", [("2", "ddp"), ("3", "fsdp"), ("torchrun",)])
def test_two_ranks_killed_or_stopped_end_with_the_same_digest(what: tuple[str, ...], tmp_path: Path) -> None:
    assert script("rank_kills.py", str(tmp_path), *what)["bad"] == []


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys, time, signal\n"
        "from bnfctl.ranks import die_with_parent\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    die_with_parent(os.getppid())\n"
        "    open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "    os._exit(0)\n"
        "while not os.path.exists(sys.argv[1]) or not open(sys.argv[1]).read():\n"
        "    time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    mark = tmp_path / "pid"
    subprocess.run([sys.executable, "-c", code, str(mark)], check=False, env={**os.environ, **ENV}, timeout=60)
    child = int(mark.read_text())
    until(lambda: not alive(child), 10, "it outlives its parent")
