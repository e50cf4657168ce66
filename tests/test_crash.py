"""Crashes: a kill at every durable step of every stage, and seeded random kills of a whole pipeline."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

SMOKE = REPOSITORY / "pipelines" / "smoke.yaml"
ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}


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
    command = [sys.executable, str(REPOSITORY / "tests" / "crashes.py"), stage, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **ENV}, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bad"] == []
    assert result["steps"] >= least, "fewer boundaries than this stage has durable steps: is the hook still called?"


def run_pipeline(home: Path, kill_after: float | None = None) -> Any:
    """The smoke pipeline's steps as JSON; with `kill_after`, `kill -9` its process after so many seconds (None then)."""
    command = [sys.executable, "-m", "bnfctl", "run", str(SMOKE), "--json", "--set", "vars.sampler=hf"]
    env = {**os.environ, **ENV, "BNFCTL_HOME": str(home)}
    process = subprocess.Popen(
        command,
        env=env,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=kill_after or 600)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)  # the parent only: its child must end by itself
        process.communicate()
        time.sleep(0.2)
        return None
    assert process.returncode == 0, err
    return json.loads(out)["steps"]


@pytest.mark.slow
def test_random_kills_of_the_smoke_pipeline_change_no_digest(tmp_path: Path) -> None:
    started = time.monotonic()
    calm = run_pipeline(tmp_path / "calm")
    seconds = time.monotonic() - started
    rng = random.Random(20240901)
    for kill in range(5):
        # Spread over the whole run, so that every stage gets its share.
        delay = seconds * (kill + rng.random()) / 5
        home = tmp_path / f"killed-{kill}"
        killed = run_pipeline(home, kill_after=max(0.5, delay))
        assert not [path for path in home.rglob("manifest.json") if not path.read_text()]
        steps = run_pipeline(home) if killed is None else killed
        assert {s["step"]: s["digest"] for s in steps} == {s["step"]: s["digest"] for s in calm}
        assert not [path for path in (home / ".drafts").glob("*") if path.is_dir()], "no draft is left behind"


@pytest.mark.slow
@pytest.mark.parametrize("what", [("2", "ddp"), ("3", "fsdp"), ("torchrun",)])
def test_two_ranks_killed_or_stopped_end_with_the_same_digest(what: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "tests" / "rank_kills.py"), str(tmp_path), *what]
    done = subprocess.run(command, env={**os.environ, **ENV}, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bad"] == []


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
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie that nobody has waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
