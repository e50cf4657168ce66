"""The shell scripts of examples/ really run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bnfctl import launch
from bnfctl.artifact import STAGES, Artifact, Store
from bnfctl.config import BuildConfig, TrainConfig
from bnfctl.options import fields
from tests import warm
from tests.conftest import REPOSITORY
from tests.ranks import free_port

SCRIPTS = sorted((REPOSITORY / "examples").glob("*.sh"))


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """As a user has it: `bnfctl` is a command on the PATH."""
    command = tmp_path / "bin" / "bnfctl"
    command.parent.mkdir()
    with warm.program(command):
        yield {
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


def run_script(name: str, *arguments: str, environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPOSITORY / "examples" / name, *arguments], env=environment, cwd=cwd, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip


def test_end_to_end(environment: dict[str, str], tmp_path: Path) -> None:
    done = run_script("end_to_end.sh", "lab", "lab:chat", "6", environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = Artifact(Path(done.stdout.splitlines()[-1]))
    assert last.manifest.stage == "eval" and "gain" in next(
        iter(last.manifest.summary["tasks"]["lab-chat"]["models"].values())
    )
    store = Store(tmp_path / "artifacts")
    assert {stage: len(list(store.artifacts(stage))) for stage in STAGES} == {**dict.fromkeys(STAGES, 1), "eval": 2}
    assert store.names()["aligned"] == last.manifest.inputs["model"]["ref"]


def test_feedback(environment: dict[str, str], tmp_path: Path) -> None:
    done = run_script("feedback.sh", "lab", "thumbs.jsonl", "12", environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained = Artifact(Path(done.stdout.splitlines()[-1]))
    assert trained.manifest.stage == "train" and trained.manifest.summary["records"] > 0
    thumbs = {json.loads(line)["label"] for line in (tmp_path / "thumbs.jsonl").read_text().splitlines()}
    assert thumbs == {True, False}


def test_compare_methods(environment: dict[str, str], tmp_path: Path) -> None:
    arguments = ("lab", "lab:chat", "6", "comparison", "bnf dpo", "0")
    done = run_script("compare_methods.sh", *arguments, environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "comparison/index.html"
    page = (tmp_path / "comparison" / "index.html").read_text()
    assert all(word in page for word in ("BNF", "DPO", "3a. ", "3f. ", "Responses side by side"))
    found = (tmp_path / "comparison" / "tables" / "main.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in found[1:]] == ["Base", "DPO", "BNF"]


def test_end_to_end_stops_where_a_command_fails(environment: dict[str, str], tmp_path: Path) -> None:
    done = run_script("end_to_end.sh", "nowhere", environment=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "error: no model 'nowhere'" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    ("script", "launcher", "options"),
    [
        ("slurm_two_nodes.sh", "srun", ["--kill-on-bad-exit=1", "--cpus-per-task=1", "bnfctl"]),
        (
            "torchrun_two_nodes.sh",
            "torchrun",
            ["--nnodes", "2", "--nproc-per-node", "8", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node1:29500",
             "--rdzv-id", "bnfctl", "--module", "bnfctl"],
        ),
    ],
)  # fmt: skip
def test_scripts_for_two_nodes(
    script: str, launcher: str, options: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    """What they would start, and that bnfctl takes those flags."""
    command = tmp_path / "bin" / launcher
    command.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    command.chmod(0o755)
    env = {name: value for name, value in environment.items() if not name.startswith("SLURM")}
    done = subprocess.run(
        [REPOSITORY / "examples" / script, "--seed", "3"], env={**env, "RDZV": "node1:29500"}, cwd=tmp_path,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    started = done.stdout.splitlines()
    assert started[: len(options)] == options
    stage, *flags = started[len(options) :]
    named = dict(zip(flags[::2], flags[1::2], strict=True))
    assert stage == "train"
    assert named == {"--model": "meta-llama/Meta-Llama-3-8B-Instruct", "--loss": "bnf", "--seed": "3"}
    assert {name[2:] for name in named} <= {field.name for field in fields(TrainConfig)}


def test_torchrun_on_two_nodes_of_one_rank(environment: dict[str, str], tmp_path: Path) -> None:
    """Both nodes are this machine, and its CPU stands for their GPUs."""
    command = tmp_path / "bin" / "torchrun"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
    command.chmod(0o755)
    prefs = tmp_path / "prefs.jsonl"
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(8)]
    prefs.write_text("\n".join(map(json.dumps, rows)))
    store = Store(tmp_path / "artifacts")
    build = launch.execute("build", BuildConfig(input=str(prefs), test_fraction=0.0), store).artifact
    env = {
        **environment,
        "MODEL": "lab",
        "GPUS_PER_NODE": "1",
        "RDZV": f"127.0.0.1:{free_port()}",
        "HF_HUB_OFFLINE": "1",
    }
    script = [REPOSITORY / "examples" / "torchrun_two_nodes.sh", "--data", build.path, "--batch-size", "4"]
    nodes = [
        subprocess.Popen(script, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    (trained,) = store.artifacts("train")
    assert sorted(out for out, _ in said) == ["", f"{trained.path}\n"]
    assert trained.manifest.provenance["ranks"] == 2
