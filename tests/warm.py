"""Processes that need not import torch and transformers, which takes five seconds of CPU: forked from one that has.

A command is a process of its own all the same, with its own environment, streams, signals and exit code, and imports
bnfctl itself.  What a start has to do with is tested on one as a user makes it, by the `bnfctl` fixture.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection, Listener
from multiprocessing.context import ForkServerContext
from pathlib import Path
from threading import Thread

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


_PROGRAM = """#!{python}
import os, sys
from multiprocessing.connection import Client
with Client({address!r}) as server:
    server.send((sys.argv[1:], dict(os.environ), os.getcwd(), os.getpid()))
    code = server.recv()
sys.exit(code if code >= 0 else 128 - code)
"""


@contextmanager
def program(path: Path) -> Iterator[None]:
    """Write a program `bnfctl`, for shell scripts: such a process does its work, on its streams."""
    with Listener(family="AF_UNIX") as listener:
        address = str(listener.address)
        path.write_text(_PROGRAM.format(python=sys.executable, address=address))
        path.chmod(0o755)
        serving = Thread(target=_serve, args=(listener,), daemon=True)
        serving.start()
        try:
            yield
        finally:
            Client(address).close()  # a last one, that asks for nothing
            serving.join()


def _serve(listener: Listener) -> None:
    while True:
        client = listener.accept()
        try:
            asked = client.recv()
        except EOFError:
            return
        Thread(target=_answer, args=(client, *asked), daemon=True).start()


def _answer(client: Connection, arguments: list[str], env: dict[str, str], folder: str, pid: int) -> None:
    out, err = (f"/proc/{pid}/fd/{descriptor}" for descriptor in (1, 2))
    process = context().Process(target=_run, args=(arguments, env, folder, out, err))
    process.start()
    process.join()
    client.send(process.exitcode)


def _run(arguments: list[str], env: dict[str, str], folder: str, out: str, err: str) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = ["bnfctl", *arguments]
    sys.path.insert(0, folder)
    runpy.run_module("bnfctl", run_name="__main__", alter_sys=True)
