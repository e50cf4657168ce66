"""The shell scripts of examples/ really run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bnfctl.artifact import STAGES, Artifact, Store
from tests.conftest import REPOSITORY

SCRIPTS = sorted((REPOSITORY / "examples").glob("*.sh"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """As a user has it: `bnfctl` is a command on the PATH."""
    command = tmp_path / "bin" / "bnfctl"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bnfctl "$@"\n')
    command.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "BNFCTL_HOME": str(tmp_path / "artifacts"),
        "OMP_NUM_THREADS": "1",
    }


def test_there_are_examples() -> None:
    assert "end_to_end.sh" in [path.name for path in SCRIPTS]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_valid_and_stops_at_the_first_error(path: Path) -> None:
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "set -euo pipefail" in path.read_text()
    assert os.access(path, os.X_OK)


def test_end_to_end(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [REPOSITORY / "examples" / "end_to_end.sh", "lab", "lab:chat", "6"], env=environment, cwd=tmp_path,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = Artifact(Path(done.stdout.splitlines()[-1]))
    assert last.manifest.stage == "eval" and "gain" in last.manifest.summary["tasks"]["lab-chat"]
    store = Store(tmp_path / "artifacts")
    assert {stage: len(list(store.artifacts(stage))) for stage in STAGES} == {**dict.fromkeys(STAGES, 1), "eval": 2}
    assert store.names()["aligned"] == last.manifest.inputs["model"]["ref"]


def test_end_to_end_stops_where_a_command_fails(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [REPOSITORY / "examples" / "end_to_end.sh", "nowhere"], env=environment, cwd=tmp_path,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: no model 'nowhere'" in done.stderr and done.stdout == ""
