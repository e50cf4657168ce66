"""Real ranks on this machine: processes of their own that meet through gloo, by a file instead of a port."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bnfctl.machine import Place
from bnfctl.training.world import World
from tests import warm
from tests.conftest import REPOSITORY

SCRIPT = str(REPOSITORY / "tests" / "rank_script.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "TORCH_CPP_LOG_LEVEL": "ERROR"}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def one_process() -> World:
    return World(Place(0, 1, 0, 1, "a test"), torch.device("cpu"))


def run_ranks(work: Callable[..., None], size: int, *args: Any, timeout: float = 200) -> None:
    """Call work(world, *args), a function of a module, on every rank; the first traceback is raised here."""
    context = warm.context()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(rank, size, folder, work, args)) for rank in range(size)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        # A rank whose peer has failed waits for it: the first failure ends all.
        while any(p.exitcode is None for p in ranks) and not any(p.exitcode for p in ranks):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
            process.join()
        failures = [path.read_text() for path in sorted(Path(folder).glob("failure-*"))]
    assert not failures, "\n".join(failures)
    assert codes == [0] * size, codes


def _rank(rank: int, size: int, folder: str, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    try:
        work(World(Place(rank, size, rank, size, "a test"), torch.device("cpu")), *args)
        dist.barrier()
    except BaseException:
        Path(folder, f"failure-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        sys.exit(1)
    dist.destroy_process_group()
