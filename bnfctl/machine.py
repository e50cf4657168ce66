"""What this machine computes with and which rank this process is, asked without importing torch.

`auto` has to be resolved before the key, and a rank has to know that it is one before it says anything.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from bnfctl.errors import UsageError

_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Device files of NVIDIA, AMD and WSL drivers."""
ALONE = "one process"
"""`Place.launcher` where nothing has started this process as a rank."""
SPAWNED = "BNFCTL_SPAWNED"
"""Set for the ranks that bnfctl itself starts."""
_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@dataclass(frozen=True)
class Place:
    """This process among the ranks of one training."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str
    """Who started the ranks, for messages: "one process", "bnfctl", "torchrun", "accelerate launch", "srun", ..."""


def leave(code: int) -> NoReturn:
    """End this process.  One of several ranks that ends with an error skips what comes at a normal exit.

    There torch takes its collectives down, which with a peer gone may abort this process, or wait for it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(UsageError):  # variables of a launcher that make no sense: no rank
        if code and place().size > 1:
            os._exit(code)
    sys.exit(code)


def has_gpu() -> bool:
    """Whether torch will find a GPU: a driver is there, torch is no CPU build, and none of them is hidden."""
    try:
        cpu_build = version("torch").endswith("+cpu")
    except PackageNotFoundError:
        cpu_build = True
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    return not cpu_build and not hidden and any(Path(device).exists() for device in _DEVICES)


def visible_gpus() -> int:
    """How many GPUs this process may use; torch is asked only where the driver has no NVIDIA device files."""
    if not has_gpu():
        return 0
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        # CUDA itself ignores what follows a negative number.
        return len(list(takewhile(lambda name: name and not name.startswith("-"), map(str.strip, listed.split(",")))))
    files = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    if files:
        return len(files)
    import torch

    return torch.cuda.device_count()


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU here, as its driver says; None without one."""
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout
        return min(int(line) for line in told.split()) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def resolve_dtype(name: str) -> str:
    """The compute type that `auto` stands for here: bfloat16 on a GPU, float32 on a CPU."""
    if name != "auto":
        return name
    return "bfloat16" if has_gpu() else "float32"


def place(env: Mapping[str, str] = os.environ) -> Place:
    """Which rank this process is: what torchrun, `accelerate launch`, bnfctl or srun says in the environment.

    UsageError where the environment says half of it, or nonsense.  A batch script of Slurm outside srun is one process.
    """
    # bnfctl's own ranks first, then torchrun's, which may run inside a step of srun.
    if any(name in env for name in _RANK[:3]):
        return _told(env)
    if env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _slurm(env)
    if "ACCELERATE_MIXED_PRECISION" in env:
        if "MASTER_ADDR" in env:
            # Asked for several processes on a CPU, accelerate prepares their meeting point and starts one.
            raise UsageError(
                "accelerate was asked for several processes and started one",
                where="accelerate launch",
                hint="bnfctl train --devices N; or ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes N",
            )
        return Place(0, 1, 0, 1, "accelerate launch")
    return Place(0, 1, 0, 1, ALONE)


def follows() -> bool:
    """Whether this process is a rank behind rank 0: it has nothing to say."""
    try:
        return place().rank > 0
    except UsageError:
        return False


def ranks_here() -> int:
    """How many ranks share this machine; 1 where the environment does not say."""
    try:
        return place().local_size
    except UsageError:
        return 1


def _told(env: Mapping[str, str]) -> Place:
    rank, size, local_rank, local_size = (_number(env, name) for name in _RANK)
    launcher = "a launcher that sets RANK and WORLD_SIZE"
    if SPAWNED in env:
        launcher = "bnfctl"
    elif "ACCELERATE_MIXED_PRECISION" in env:
        launcher = "accelerate launch"
    elif "TORCHELASTIC_RUN_ID" in env:
        launcher = "torchrun"
    _below(rank, size, "RANK", "WORLD_SIZE")
    _below(local_rank, local_size, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    _below(local_size - 1, size, "LOCAL_WORLD_SIZE - 1", "WORLD_SIZE")
    return Place(rank, size, local_rank, local_size, launcher)


def _slurm(env: Mapping[str, str]) -> Place:
    rank, size, local_rank = (_number(env, name) for name in _SLURM)
    _below(rank, size, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    name = "SLURM_STEP_TASKS_PER_NODE" if "SLURM_STEP_TASKS_PER_NODE" in env else "SLURM_NTASKS_PER_NODE"
    if re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", env.get(name, "")):
        counts = tasks_per_node(env[name])
        node = _number(env, "SLURM_NODEID") if len(counts) > 1 else 0
        _below(node, len(counts), "SLURM_NODEID", f"the number of nodes in {name}")
        local_size = counts[node]
    else:
        local_size = _number(env, name)
    _below(local_rank, local_size, "SLURM_LOCALID", name)
    return Place(rank, size, local_rank, local_size, "srun")


def tasks_per_node(text: str) -> list[int]:
    """Slurm's "4(x2),3" as [4, 4, 3]."""
    counts = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def first_host(hosts: str) -> str:
    """The first host of Slurm's "node[01-04,07],gpu1": "node01"."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", hosts).split(",")[0]


def meeting_point(env: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """(host, port) where the ranks meet: on rank 0's machine, or with the agent of torchrun.

    srun names none.  Its first node runs rank 0 (the node that srun was typed on need not be part of the job), and
    job and step give a port that steps at the same time hardly share.
    """
    if "SLURM_STEP_NUM_TASKS" in env and "RANK" not in env:
        host = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", ""))
        host = host or env.get("SLURM_LAUNCH_NODE_IPADDR", "")
        if not host:
            raise UsageError("SLURM_STEP_NODELIST is not set", where="srun", hint="export MASTER_ADDR=the first node")
        if "MASTER_PORT" in env:
            return host, _number(env, "MASTER_PORT")
        return host, 15000 + (31 * _number(env, "SLURM_JOB_ID") + _number(env, "SLURM_STEP_ID")) % 15000
    if not env.get("MASTER_ADDR"):
        raise UsageError("MASTER_ADDR is not set", where="environment", hint="start the ranks with torchrun or srun")
    return env["MASTER_ADDR"], _number(env, "MASTER_PORT")


def _number(env: Mapping[str, str], name: str) -> int:
    hint = "start the ranks with torchrun, accelerate launch or srun; or unset RANK, WORLD_SIZE and LOCAL_RANK"
    if name.startswith("SLURM"):
        hint = "start the ranks with srun"
    if name not in env:
        raise UsageError(
            f"{name} is not set, though this process was started as a rank", where="environment", hint=hint
        )
    if not re.fullmatch(r"\d{1,10}", env[name].strip()):
        raise UsageError(f"{name} is {env[name]!r}, not a number", where="environment", hint=hint)
    return int(env[name])


def _below(value: int, limit: int, name: str, limit_name: str) -> None:
    if not 0 <= value < limit:
        hint = "start the ranks with torchrun, accelerate launch or srun"
        raise UsageError(f"{name} is {value}, but {limit_name} is {limit}", where="environment", hint=hint)
