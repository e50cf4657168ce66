"""Servers of this run's own, on 127.0.0.1 for as long as they are needed; they end with this process, however it ends.

Between this process and a server stands a keeper: this file, run as a program.  It leads a session that holds the
server and whatever that starts (vLLM: an engine, and a worker for each GPU), and ends all of it when its stdin closes,
which it also does after `kill -9`.  Ctrl-C does not reach that session, so that a first one can finish what is in flight.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bnfctl import console
from bnfctl.errors import BnfctlError, Interrupted
from bnfctl.pool import share_of_gpus

KEY_ENV = "BNFCTL_SERVER_KEY"
"""Environment variable with the key of the servers, while there are any: other users of the machine don't have it."""
_POLL_SECONDS = 0.5
_KEEPER_SECONDS = 0.1
"""Between two looks of a keeper at its server."""
_FINDING_SECONDS = 1.0
"""For a keeper to find out that its server has died, once a client has."""
_LEAVING_SECONDS = 10.0
"""For a server to end in peace: it gives back what it shares between its processes."""
_DYING_SECONDS = 10.0
"""For the processes of a server to be really gone: until then they have a GPU's memory."""
_SHOWN = 12
"""Lines of a log that are shown when its server has died."""
_TAIL = 1 << 16
_REASON = re.compile(r"(?:^|\s)((?:(?:[\w.]+(?:Error|Exception)|error):|Value error,) \S.*)")
"""The second form is pydantic's, for a setting that cannot be."""
_VEILED = re.compile(r"initialization failed|see (the )?root cause|above for", re.I)
"""Errors that only pass on that there was one."""


@contextmanager
def serving(
    command: Sequence[str], environment: Mapping[str, str], name: str, *, log: Path, replicas: int = 1,
    gpus_each: int = 1,
) -> Iterator[list[str]]:  # fmt: skip
    """The base URLs of `replicas` servers of the model called `name`, once all of them are up.

    command: starts a server in the manner of vLLM (`model.vllm.server_command`); host and port are added, and it takes
    its key from VLLM_API_KEY.  A client finds that key by `api_key_env=KEY_ENV`.  environment: over this process's own.
    log: file for what a server says; others than the first one have theirs beside it, numbered.  gpus_each: GPUs of one
    server, where there are any.  However long loading takes, it is waited for.  BnfctlError for a server that ends by
    itself, Interrupted after a stop.
    """
    key = secrets.token_urlsafe(32)
    log.parent.mkdir(parents=True, exist_ok=True)
    servers: list[_Server] = []
    with ExitStack() as stack:
        stack.callback(_end, servers)
        for number in range(replicas):
            own = log if not number else log.with_name(f"{log.stem}-{number}{log.suffix}")
            extra = {**environment, **share_of_gpus(number, gpus_each), "VLLM_API_KEY": key}
            servers.append(_start(command, {**os.environ, **extra}, own, stack))
        _wait(servers, name, key)
        stack.enter_context(_variable(KEY_ENV, key))
        try:
            yield [server.url for server in servers]
        except Interrupted:
            raise
        except BnfctlError as error:
            dead = _first_dead(servers)
            if dead is None:
                raise
            raise _death(dead, f"the server of {name} ended") from error


@dataclass(frozen=True)
class _Server:
    """A server, by its keeper: the process group of this number is all that belongs to it."""

    keeper: subprocess.Popen[bytes]
    port: int
    log: Path
    said_before: int
    """Bytes of the log from earlier runs."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


def _start(command: Sequence[str], environment: Mapping[str, str], log: Path, stack: ExitStack) -> _Server:
    port = stack.enter_context(_free_port())
    with open(log, "ab") as opened:
        before = opened.tell()
        keeper = subprocess.Popen(
            [sys.executable, "-m", "bnfctl.client.local", *command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=opened, env=environment, start_new_session=True,
        )  # fmt: skip
    return _Server(keeper, port, log, before)


@contextmanager
def _free_port() -> Iterator[int]:
    """A port that nobody else is given until the end: a server takes half a minute until it binds its own.

    Linux lets a second socket have it as long as both say SO_REUSEADDR, which every server does, and one listens.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        if sys.platform != "linux":
            held.close()
        yield port


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _wait(servers: Sequence[_Server], name: str, key: str) -> None:
    """Until all are up; says so now and then."""
    started = time.monotonic()
    logs = ", ".join(str(server.log) for server in servers)
    console.say(f"starting a server of {name}; its log: {logs}")
    news, waiting = started + console.PLAIN_SECONDS, list(servers)
    while waiting:
        console.check_stop()
        for server in servers:
            if server.keeper.poll() is not None:
                raise _death(server, f"the server of {name} ended while it started")
        waiting = [server for server in waiting if not _is_up(server, name, key)]
        if waiting:
            time.sleep(_POLL_SECONDS)
        if waiting and time.monotonic() >= news:
            news += console.PLAIN_SECONDS
            console.say(f"{name} is loading: {time.monotonic() - started:.0f} s")
    console.say(f"{name} is up after {time.monotonic() - started:.0f} s")


def _is_up(server: _Server, name: str, key: str) -> bool:
    """Whether it takes the key and has the model."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
        response = connection.getresponse()
        found = json.loads(response.read()) if response.status == 200 else {}
        return any(model.get("id") == name for model in found.get("data", []))
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()


def _first_dead(servers: Sequence[_Server]) -> _Server | None:
    """A server that has ended by itself; its keeper may be about to find out."""
    until = time.monotonic() + _FINDING_SECONDS
    while True:
        for server in servers:
            if server.keeper.poll() is not None:
                return server
        if time.monotonic() > until:
            return None
        time.sleep(_KEEPER_SECONDS)


def _death(server: _Server, what: str) -> BnfctlError:
    """The error that tells why, as far as the log does; the log's end goes to stderr."""
    assert server.keeper.stdout is not None
    said = server.keeper.stdout.read().strip()
    code = int(said) if said else server.keeper.wait()
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    with open(server.log, "rb") as log:
        log.seek(max(server.said_before, log.seek(0, os.SEEK_END) - _TAIL))
        lines = [line.rstrip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
    for line in lines[-_SHOWN:]:
        console.say(f"  {line}")
    reasons = [found[1] for line in lines if (found := _REASON.search(line)) and not _VEILED.search(found[1])]
    why = f": {reasons[-1]}" if reasons else ""
    hint = (
        "--tensor-parallel, --gpu-memory and --dtype decide whether it fits; or --server URL of one that runs elsewhere"
    )
    if code == -signal.SIGKILL:
        hint = "if nobody killed it, the machine ran out of memory; or --server URL of one that runs elsewhere"
    return BnfctlError(f"{what} ({how}){why}", where=str(server.log), hint=hint)


def _end(servers: Sequence[_Server]) -> None:
    """All of them together, in peace if they can."""
    for server in servers:
        assert server.keeper.stdin is not None
        server.keeper.stdin.close()
    for server in servers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.keeper.wait(_LEAVING_SECONDS + 10)
        _kill(server.keeper)
        assert server.keeper.stdout is not None
        server.keeper.stdout.close()


def _kill(keeper: subprocess.Popen[bytes]) -> None:
    """All that is left of its session, also where the keeper is dead already."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(keeper.pid, signal.SIGKILL)
    keeper.wait()
    until = time.monotonic() + _DYING_SECONDS
    while _still_there(keeper.pid) and time.monotonic() < until:
        time.sleep(0.02)


def _still_there(group: int) -> bool:
    """Whether a process group has a member, one that is dead and not yet buried aside; False where nothing tells."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if state not in "ZX" and int(its_group) == group:
                return True
    return False


# The keeper's side.


def _keep(command: Sequence[str]) -> None:
    """Run a server until it ends, or stdin does; then end all that is left in this session, and this process last.

    Its exit code goes to stdout, if it ended by itself.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: None)  # no SIG_IGN, which the server would inherit
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2)
    while server.poll() is None:
        if select.select([0], [], [], _KEEPER_SECONDS)[0] and not os.read(0, 1):
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(_LEAVING_SECONDS)
            break
    else:
        os.write(1, str(server.returncode).encode())
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _keep(sys.argv[1:])
