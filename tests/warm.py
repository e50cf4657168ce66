"""Processes that need not import torch and transformers, which takes five seconds of CPU: forked from one that has.

A command is a process of its own all the same, with its own environment, streams, signals and exit code, and imports
bnfctl itself.  What a start has to do with is tested on one as a user makes it: the `bnfctl` fixture, and examples/.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerContext
from pathlib import Path

_IMPORTED = [
    "transformers.models.llama.modeling_llama",
    "torch.distributed.fsdp",
    "pandas",
    "pyarrow.parquet",
    "rich.console",
    "typer.main",
]
"""Nothing of bnfctl, so that what it imports by itself still matters."""


def context() -> ForkServerContext:
    """Starts such processes.  They have the environment of the first call."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_IMPORTED)
    return found


def bnfctl(arguments: list[str], env: dict[str, str], folder: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """`python -m bnfctl ARGUMENTS` in `folder`.  subprocess.TimeoutExpired after `timeout` seconds."""
    with tempfile.TemporaryDirectory() as streams:
        out, err = Path(streams, "out"), Path(streams, "err")
        process = context().Process(target=_run, args=(arguments, env, str(folder), str(out), str(err)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["bnfctl", *arguments], timeout)
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def _run(arguments: list[str], env: dict[str, str], folder: str, out: str, err: str) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = ["bnfctl", *arguments]
    sys.path.insert(0, folder)
    runpy.run_module("bnfctl", run_name="__main__", alter_sys=True)
