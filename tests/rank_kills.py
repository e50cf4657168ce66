"""Kills a training on two ranks at seeded random moments, resumes it each time, and compares digests.

    PYTHONPATH=. python tests/rank_kills.py FOLDER COUNT ddp|fsdp

A victim is the command itself or one of its ranks.  Prints one JSON line: {"kills": COUNT, "bad": [what went wrong],
"checkpoints": at how many of them a later run went on}.

    PYTHONPATH=. python tests/rank_kills.py FOLDER torchrun

asks a training under torchrun to stop (SIGTERM), lets the same command go on, and compares with an undisturbed one.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bnfctl.artifact import Store
from tests import crashes
from tests.processes import alive, until


def children(pid: int) -> list[int]:
    """Processes that `pid` has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def rank_of(pid: int) -> int:
    """Which rank a process is, from its environment: at the end of a training one may be gone before the other."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK="))


def command(home: Path, data: str, parallel: str) -> list[str]:
    """Some 60 steps, a checkpoint at every fifth."""
    return [
        *(sys.executable, "-m", "bnfctl", "train", "--model", "lab", "--data", data, "--home", str(home)),
        *("--devices", "2", "--parallel", parallel, "--lr", "1e-3", "--batch-size", "2", "--epochs", "20"),
        *("--save-every", "5", "--eval-every", "20"),
    ]


def attempt(argv: list[str], kill_after: float | None, draw: random.Random) -> tuple[int, str, int | None]:
    """(exit code, stderr, victim's rank or -1 for the command itself; None where it ended first)."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, err = process.communicate(timeout=kill_after or 600)
        return process.returncode, err, None
    except subprocess.TimeoutExpired:
        ranks = children(process.pid)
        victim = draw.choice([process.pid, *ranks])
        name = -1 if victim == process.pid else rank_of(victim)
        os.kill(victim, signal.SIGKILL)
        _, err = process.communicate(timeout=90)
        until(lambda: not any(map(alive, ranks)), 60, "a rank outlives its training by a minute")
        return process.returncode, err, name


def digest(home: Path) -> str:
    (made,) = Store(home).artifacts("train")
    assert made.verify() == []
    return made.manifest.digest


def stop_torchrun(folder: Path) -> dict[str, Any]:
    """SIGTERM once there is a checkpoint: every rank stops at the same step, and the same command goes on there."""
    data, homes = stores(folder)
    draw = random.Random(0)
    code, err, _ = attempt(command(homes["calm"], data, "fsdp"), None, draw)
    assert code == 0, err
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*ranks, *command(homes["killed"], data, "fsdp")[1:]]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(homes["killed"].glob(".drafts/train-*/scratch/checkpoints/step-*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stopped = process.communicate(timeout=120)
    code, err, _ = attempt(argv, None, draw)
    bad = [] if process.returncode else ["the stopped training ended with 0"]
    if "stopping after the current shard or checkpoint" not in stopped or "resuming after step" not in err:
        bad.append(f"not stopped and resumed: {stopped[-500:]} {err[-500:]}")
    if code or digest(homes["killed"]) != digest(homes["calm"]):
        bad.append(f"exit {code}: another result than without a stop: {err[-300:]}")
    return {"bad": bad}


def stores(folder: Path) -> tuple[str, dict[str, Path]]:
    """(a build, two stores that hold it)."""
    folder.mkdir(parents=True, exist_ok=True)
    config, before = crashes.prepare("train", folder)
    homes = {name: folder / name for name in ("calm", "killed")}
    for home in homes.values():
        shutil.copytree(before, home)
    return config.data, homes


def main(folder: Path, count: int, parallel: str, seed: int = 0) -> dict[str, Any]:
    data, homes = stores(folder)
    bad: list[str] = []
    draw = random.Random(seed)
    started = time.monotonic()
    code, err, _ = attempt(command(homes["calm"], data, parallel), None, draw)
    assert code == 0, err
    seconds = time.monotonic() - started
    argv = command(homes["killed"], data, parallel)
    kills, resumed = 0, set()
    while kills < count:
        # Half of the time goes into starting; what a kill costs is made up for by the checkpoints.
        code, err, victim = attempt(argv, draw.uniform(0.3, 1.0) * seconds, draw)
        resumed |= set(re.findall(r"resuming after step (\d+)", err))
        if victim is None:
            shutil.rmtree(homes["killed"] / "train")  # it was quicker: start over
            continue
        kills += 1
        if victim >= 0 and (code != 1 or f"rank {victim} was ended by SIGKILL" not in err):
            bad.append(f"kill {kills} of rank {victim}: exit {code}: {err[-300:]}")
    code, err, _ = attempt(argv, None, draw)
    resumed |= set(re.findall(r"resuming after step (\d+)", err))
    if code or digest(homes["killed"]) != digest(homes["calm"]):
        bad.append(f"exit {code}: another result than without kills: {err[-300:]}")
    return {"kills": kills, "bad": bad, "checkpoints": len(resumed), "seconds": round(seconds, 1)}


if __name__ == "__main__":
    place, what = Path(sys.argv[1]), sys.argv[2]
    print(json.dumps(stop_torchrun(place) if what == "torchrun" else main(place, int(what), sys.argv[3])))
