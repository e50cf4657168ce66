"""The units of work of generate and score: done in this process, or by worker processes with GPUs of their own.

A worker takes one unit after another from its parent and saves what it makes itself, so a unit that is done stays
done, whatever happens to parent and workers.  They talk JSON lines: the parent into the worker's stdin (the request,
then one {"unit": number or null} for each {"want": true}), the worker on its stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from bnfctl import console, machine
from bnfctl.errors import BnfctlError, UsageError

_POLL_SECONDS = 0.5
_LEAVING_SECONDS = 60.0
"""For an engine to end in peace, once all is saved."""
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


class Work(Protocol):
    """Knows how to do a unit; built from a JSON-ready request, by what is slow to load."""

    @property
    def provenance(self) -> dict[str, Any]:
        """ "engine": what it works with, and its version; and whatever else is worth keeping, JSON-ready."""
        ...

    def run(self, units: Iterable[int]) -> Iterator[tuple[int, int, int]]:
        """(unit, its records, its tokens) as soon as a unit's part is saved.  May pull several units ahead."""
        ...


@dataclass(frozen=True)
class Job:
    """What there is to do, and how many processes do it."""

    work: str
    """ "module:Class" of the Work."""
    request: dict[str, Any]
    """What the Work is built from."""
    log: Path
    """Folder for what the workers behind the first one say."""
    workers: int = 1
    gpus_each: int = 1
    threads: int = 1
    """CPU threads of each worker, unless OMP_NUM_THREADS says otherwise."""
    apart: bool = False
    """Also a single one is a worker: its work has processes of its own (an engine on a GPU), which outlive it else."""


@dataclass(frozen=True, slots=True)
class Done:
    """One unit whose part is saved."""

    unit: int
    records: int
    tokens: int
    provenance: dict[str, Any]
    """Of the Work that did it, so far."""


def processes(devices: int | None, gpus_each: int = 1) -> int:
    """How many workers `--devices` and `--tensor-parallel` ask for: all GPUs by default, one process on a CPU.

    UsageError where they ask for what is not there.
    """
    gpus = machine.visible_gpus()
    if not gpus:
        if gpus_each > 1:
            what = f"--tensor-parallel is {gpus_each}, but there is no GPU"
            raise UsageError(what, where="--tensor-parallel", hint="leave it out on a CPU")
        return devices or 1
    wanted = devices or gpus
    if wanted > gpus:
        hint = f"--devices {gpus}, or CUDA_VISIBLE_DEVICES= for CPU processes"
        raise UsageError(f"--devices is {wanted}; visible GPUs: {gpus}", where="--devices", hint=hint)
    if wanted < gpus_each or (devices is not None and devices % gpus_each):
        what = f"{wanted} GPUs can't be shared out to engines of {gpus_each}"
        raise UsageError(what, where="--tensor-parallel", hint="--devices is a multiple of --tensor-parallel")
    return wanted // gpus_each


def until_stop(units: Iterable[Any]) -> Iterator[Any]:
    """The units, none after a stop was asked for, except the first: what is under way is finished and saved."""
    for unit in units:
        yield unit
        if console.stop_requested():
            return


def run(job: Job, units: Iterable[int]) -> Iterator[Done]:
    """Do the units, in any order; raises Interrupted when a stop was asked for and all that had begun is saved."""
    if job.workers > 1 or job.apart:
        yield from _Crew(job).run(until_stop(units))
    else:
        work = _load(job.work, job.request)
        for unit, records, tokens in work.run(until_stop(units)):
            yield Done(unit, records, tokens, work.provenance)
    console.check_stop()


def _load(name: str, request: dict[str, Any]) -> Work:
    module, _, attribute = name.partition(":")
    work: Work = getattr(import_module(module), attribute)(request)
    return work


# The parent's side.


@dataclass
class _Worker:
    number: int
    process: subprocess.Popen[bytes]
    sent_home: bool = False
    """Told that there is no more to do."""
    failed: dict[str, Any] | None = None
    """Its error, as it said it."""
    heard: bytes = b""
    """The beginning of a line."""
    units: set[int] = field(default_factory=set)
    """What it is at."""
    last_heard: float = 0.0

    @property
    def gone(self) -> bool:
        """Whether there is nothing more to hear: it is dead, or hangs behind its last word."""
        ended = self.failed is not None or (self.sent_home and not self.units)
        return self.process.poll() is not None or (ended and time.monotonic() > self.last_heard + _LEAVING_SECONDS)


class _Crew:
    """The workers of a job, from start to end."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.workers: list[_Worker] = []

    def run(self, units: Iterator[int]) -> Iterator[Done]:
        """Hand out units and report each that is done; the first worker that fails ends all."""
        try:
            with selectors.DefaultSelector() as selector:
                for number in range(self.job.workers):
                    worker = self._start(number)
                    assert worker.process.stdout is not None
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                while selector.get_map():
                    # A dead worker's pipe may stay open for ever, in the hands of the engine that it forked.
                    gone = [key for key in selector.get_map().values() if key.data.gone]
                    ready = {key.fd: key for key, _ in selector.select(0 if gone else _POLL_SECONDS)}
                    for key in [*ready.values(), *(key for key in gone if key.fd not in ready)]:
                        worker = key.data
                        data = os.read(key.fd, 1 << 16) if key.fd in ready else b""
                        if not data:
                            selector.unregister(key.fileobj)
                            self._left(worker)
                        *lines, worker.heard = (worker.heard + data).split(b"\n")
                        for line in lines:
                            yield from self._heard(worker, json.loads(line), units)
        finally:
            for worker in self.workers:
                _kill(worker.process)

    def _start(self, number: int) -> _Worker:
        environment = {**os.environ, **share_of_gpus(number, self.job.gpus_each)}
        environment.setdefault("OMP_NUM_THREADS", str(self.job.threads))
        # The first one has this process's stderr; the voices of all would be a muddle.
        with open(self._log(number), "ab") if number else contextlib.nullcontext() as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "bnfctl.pool"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env=environment, start_new_session=True,
            )  # fmt: skip
        worker = _Worker(number, process)
        self.workers.append(worker)
        self._tell(worker, {"work": self.job.work, "request": self.job.request})
        return worker

    def _tell(self, worker: _Worker, message: dict[str, Any]) -> None:
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: its end of file says so
            worker.process.stdin.write(json.dumps(message).encode() + b"\n")
            worker.process.stdin.flush()

    def _heard(self, worker: _Worker, message: dict[str, Any], units: Iterator[int]) -> Iterator[Done]:
        worker.last_heard = time.monotonic()
        if "want" in message:
            unit = next(units, None)
            if unit is None:
                worker.sent_home = True
            else:
                worker.units.add(unit)
            self._tell(worker, {"unit": unit})
        elif "failed" in message:
            worker.failed = message["failed"]
        else:
            worker.units.discard(message["done"])
            yield Done(message["done"], message["records"], message["tokens"], message["provenance"])

    def _left(self, worker: _Worker) -> None:
        """Its end: BnfctlError unless all that it had begun is saved and it was sent home, or a stop is under way."""
        said = worker.failed
        if said is None and worker.sent_home and not worker.units:
            return  # however it ends
        code = worker.process.wait() if said is None else said["exit_code"]
        if said is None and code == 0 and not worker.units and console.stop_requested():
            return
        if said is None or code in _STOPPED:
            console.check_stop()
        places = [f"log: {self._log(worker.number)}"] if worker.number else []
        if said is not None and said.get("traceback"):
            places.insert(0, str(self.job.log / "traceback.txt"))
            with contextlib.suppress(OSError):
                (self.job.log / "traceback.txt").write_text(said["traceback"], encoding="utf-8")
        raise _failure(f"worker {worker.number}", said, code, places)

    def _log(self, number: int) -> Path:
        return self.job.log / f"worker-{number}.log"


def _failure(name: str, said: dict[str, Any] | None, code: int, places: list[str]) -> Exception:
    if said is None:
        what, hint = f"{name} ended with exit code {code}", "the same command resumes"
        if code < 0:
            what = f"{name} was ended by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            hint = "if nobody killed it, the machine ran out of memory; the same command resumes"
        if code == 0:
            what = f"{name} was asked to stop"
        return BnfctlError(what, where="; ".join(places) or None, hint=hint)
    what = f"{said['error']} ({name})"
    if said.get("errno") is not None:
        return OSError(said["errno"], what)  # a full disk, say: told as if it had happened here
    error = BnfctlError(what, where="; ".join(filter(None, [said["where"], *places])) or None, hint=said["hint"])
    error.exit_code = said["exit_code"]
    return error


def share_of_gpus(number: int, each: int) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES of a worker; nothing where there is no GPU."""
    count = machine.visible_gpus()
    if not count:
        return {}
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in listed.split(",")] if listed is not None else [str(i) for i in range(count)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[:count][number * each : (number + 1) * each])}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a worker with all that it has started; its finished parts are safe.

    Also where it is dead already: an engine has processes of its own, and they keep the GPU's memory.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


# The worker's side.


def _say(message: dict[str, Any]) -> None:
    console.emit(json.dumps(message))


def _listen(inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass on what the parent says; when it is gone, even by `kill -9`, so is this process and all that it started."""
    heard = b""
    while data := os.read(0, 1 << 16):
        *lines, heard = (heard + data).split(b"\n")
        for line in lines:
            inbox.put(json.loads(line))
    os.killpg(os.getpid(), signal.SIGKILL)  # it leads its own group: see Popen above


def _asked(inbox: queue.SimpleQueue[dict[str, Any]]) -> Iterator[int]:
    while True:
        _say({"want": True})
        unit = inbox.get()["unit"]
        if unit is None:
            return
        yield unit


def _main() -> int:
    console.claim_stdout()
    console.catch_signals()
    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()
    order = inbox.get()
    try:
        work = _load(order["work"], order["request"])
        for unit, records, tokens in work.run(until_stop(_asked(inbox))):
            _say({"done": unit, "records": records, "tokens": tokens, "provenance": work.provenance})
        return 0
    except BnfctlError as error:
        _say({"failed": error.as_dict()})
        return error.exit_code
    except Exception as error:
        hint = "a smaller --batch-tokens or --chunk" if "out of memory" in str(error).lower() else None
        _say({"failed": {"error": f"{type(error).__name__}: {error}", "errno": getattr(error, "errno", None),
                         "where": None, "hint": hint or "the same command resumes", "exit_code": 1,
                         "traceback": traceback.format_exc()}})  # fmt: skip
        return 1


if __name__ == "__main__":
    sys.exit(_main())
