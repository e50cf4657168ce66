"""What a CPU does best with: how many threads, and how it keeps memory."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from pathlib import Path

from bnfctl.machine import ranks_here

_WIDE = 256
"""Hidden size from which a second thread pays: below it, threads wait for each other longer than they compute."""


def cpu_threads(model_dir: Path) -> int:
    """1 for a narrow model, else this rank's share of the cores that it may use.

    On a machine with other load, two threads on a model of hidden size 128 took 20 times as long as one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // ranks_here())
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return cores
    return 1 if config.get("hidden_size", _WIDE) < _WIDE else cores


def limit_threads(model_dir: Path) -> None:
    """Give torch that many threads, unless OMP_NUM_THREADS says what the user wants."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cpu_threads(model_dir))


def keep_freed_memory() -> None:
    """Let glibc keep what a micro-batch frees for the next one, instead of giving it back and faulting it in again.

    By default allocations above 32 MB always come fresh from the kernel, which took a twentieth of the time of a small
    model's training.  The peak is no higher.
    """
    largest, top = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(AttributeError, OSError):  # no glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(largest, 1 << 30)
        libc.mallopt(top, (1 << 31) - 1)
