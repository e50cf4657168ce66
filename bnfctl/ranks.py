"""The ranks of one training: started here as processes, or all at once by the user's torchrun or srun.

Started here, this process keeps the draft's lock and publishes; every rank is `python -m bnfctl.ranks REQUEST`.
Under a launcher every rank is the command line itself: rank 0 leads, the others follow its orders.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from bnfctl import console, durable, machine, stages
from bnfctl.artifact import Draft, Pinned, Plan, Store
from bnfctl.config import CONFIGS
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.options import as_json, fingerprint, from_json

T = TypeVar("T")
STAGE = "train"
"""The one stage that runs on several ranks."""
PATIENCE_SECONDS = 2.0
"""After the first failure of a rank: the others may be about to say the same."""
KILL_SECONDS = 15.0
"""From SIGTERM to SIGKILL."""
SEEN_SECONDS = 30.0
"""How long a shared file system may take to show a new folder to another node."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXT = re.compile(rf"\b(?:os error|errno) ({'|'.join(map(str, sorted(_FULL)))})\b", re.IGNORECASE)
"""How safetensors and pyarrow spell them."""


def to_start(stage: str, config: Any) -> int:
    """How many ranks this process has to start for a stage: 1 where it does the work itself.

    UsageError where `--devices` asks for what is not there.
    """
    if stage != STAGE:
        return 1
    place = machine.place()
    if place.launcher != machine.ALONE:
        if config.devices not in (None, place.local_size):
            what = f"--devices is {config.devices}, but {place.launcher} started {place.local_size} on this node"
            raise UsageError(what, where="--devices", hint=f"leave --devices to {place.launcher}")
        return 1
    gpus = machine.visible_gpus()
    if gpus and config.devices is not None and config.devices > gpus:
        hint = f"--devices {gpus}, or CUDA_VISIBLE_DEVICES= for CPU processes"
        raise UsageError(f"--devices is {config.devices}; visible GPUs: {gpus}", where="--devices", hint=hint)
    return config.devices or gpus or 1


def run_stage(draft: Draft) -> dict[str, Any]:
    """The stage's work in this process; its summary.  Whatever goes wrong becomes a BnfctlError."""
    with guarded(draft):
        summary: dict[str, Any] = stages.module(draft.plan.stage).run(draft.plan.config, draft)
        return summary


@contextmanager
def guarded(draft: Draft) -> Iterator[None]:
    """Turn what is no BnfctlError into one: a full disk, or a fault of ours with its traceback in the log."""
    try:
        yield
    except BnfctlError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) in _FULL or _FULL_TEXT.search(str(error)):
            hint = "free some disk (bnfctl gc), then the same command resumes"
            raise BnfctlError(f"no room to write: {error}", where=str(draft.store.home), hint=hint) from None
        raise _unexpected(error, draft.path / "log") from error


def _unexpected(error: Exception, log: Path) -> BnfctlError:
    """A fault that is not the user's: the traceback goes to the draft's log, the message to the user."""
    path = log / (f"traceback-rank-{machine.place().rank}.txt" if machine.follows() else "traceback.txt")
    text = traceback.format_exc()
    try:
        path.write_text(text, encoding="utf-8")
    except OSError:
        console.say(text)
    if "out of memory" in str(error).lower():
        return BnfctlError(f"out of memory: {error}", where=str(path), hint="a smaller --micro-tokens or --chunk")
    return BnfctlError(f"{type(error).__name__}: {error}", where=str(path), hint="the same command resumes")


def die_with_parent(parent: int) -> None:
    """End this process when `parent` ends, even by `kill -9`: drafts are safe at any moment."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def config_from_json(stage: str, raw: dict[str, Any]) -> Any:
    """A stage's config from its JSON form."""
    return from_json(CONFIGS[stage], raw)


def as_order(draft: Draft) -> dict[str, Any]:
    """All that another rank needs to work in a draft, JSON-ready."""
    plan = draft.plan
    return {
        "do": "run", "home": str(draft.store.home), "stage": plan.stage, "version": plan.version,
        "config": as_json(plan.config), "inputs": {name: asdict(pinned) for name, pinned in plan.inputs.items()},
        "versions": plan.versions,
    }  # fmt: skip


def from_order(order: dict[str, Any]) -> Draft:
    """The same draft on another rank: it has no lock there and is not published from there.

    BnfctlError where this node does not see it, or one of its inputs.
    """
    inputs = {name: Pinned(**raw) for name, raw in order["inputs"].items()}
    config = config_from_json(order["stage"], order["config"])
    plan = Plan(order["stage"], order["version"], config, inputs, versions=order["versions"])
    draft = Draft(Store(Path(order["home"])), plan)
    wanted = [draft.path / "log", *(Path(pinned.path) for pinned in inputs.values() if pinned.path is not None)]
    end = time.monotonic() + SEEN_SECONDS
    while missing := [path for path in wanted if not path.exists()]:
        if time.monotonic() > end:
            what = f"{platform.node()} does not see {missing[0]}"
            raise BnfctlError(what, where="--home", hint="store, model and data must be on a shared file system")
        time.sleep(0.2)
    return draft


# Ranks that this process starts.


@dataclass(frozen=True)
class Ended:
    """A rank that did not end well."""

    rank: int
    code: int
    """Its exit code, or minus the signal that ended it."""


def run_ranks(draft: Draft, size: int) -> dict[str, Any]:
    """The stage's work on `size` ranks of this machine; rank 0's summary, its provenance in the draft.

    Raises the error of the rank that failed first.
    """
    log = draft.path / "log"
    # Named by this process: an earlier one may have left its own.
    shared = log / f"ranks-{os.getpid()}"
    request = shared / "request.json"
    try:
        durable.write_json(request, {"order": as_order(draft), "parent": os.getpid()})
        ended = spawn([sys.executable, "-m", "bnfctl.ranks", str(request)], size, log)
        if ended is not None:
            raise _failure(ended, shared, log)
        handed = json.loads((shared / "0.json").read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(shared, ignore_errors=True)
    draft.provenance.update(handed["provenance"])
    summary: dict[str, Any] = handed["summary"]
    return summary


def spawn(command: list[str], size: int, log: Path) -> Ended | None:
    """Run a command as `size` ranks of this machine and wait for them; the one that failed first, if any.

    Rank 0 has this process's stderr, the others write `log`/rank-K.log.  A stop of this process is passed on to
    all once.  After a failure the others get SIGTERM, later SIGKILL.
    """
    shared = {**os.environ, machine.SPAWNED: "1", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}  # fmt: skip
    shared.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are stack traces of a peer that left
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(size):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(log / f"rank-{rank}.log", "ab") if rank else contextlib.nullcontext() as file:
                ranks.append(
                    subprocess.Popen(
                        command,
                        env=env,
                        stdin=subprocess.DEVNULL,
                        stdout=file or 2,
                        stderr=file,
                        start_new_session=True,
                    )
                )
        return _wait(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _wait(ranks: list[subprocess.Popen[bytes]]) -> Ended | None:
    first: Ended | None = None
    failed, told = 0.0, False
    while True:
        codes = [process.poll() for process in ranks]
        if first is None and any(codes):
            failed = time.monotonic()
            # Of two in one round, the one that a signal ended took the other with it.
            rank, code = min(((k, c) for k, c in enumerate(codes) if c), key=lambda pair: (pair[1] > 0, pair[0]))
            first = Ended(rank, code)
        if None not in codes:
            return first
        late = time.monotonic() - failed if first is not None else 0.0
        # Never twice: the second signal ends a rank at once, before it has saved.
        if not told and (console.stop_requested() or late > PATIENCE_SECONDS):
            told = True
            for process in ranks:
                process.terminate()
        if late > PATIENCE_SECONDS + KILL_SECONDS:
            for process in ranks:
                process.kill()
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _failure(ended: Ended, shared: Path, log: Path) -> BnfctlError:
    """The error of the rank that ended first, named, with its log; Interrupted where this process was asked to stop."""
    rank = f"rank {ended.rank}"
    raw: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        raw = json.loads((shared / f"{ended.rank}.json").read_text(encoding="utf-8"))
    if "error" not in raw:  # killed before it could say why, or after its summary
        raw = {"error": f"{rank} ended with exit code {ended.code}", "exit_code": 1, "where": None,
               "hint": "the same command resumes"}  # fmt: skip
        if ended.code < 0:
            raw["error"] = f"{rank} was ended by {signal.Signals(-ended.code).name}"
            if ended.code == -signal.SIGKILL:
                raw["hint"] = "if nobody killed it, the machine ran out of memory; the same command resumes"
    else:
        raw["error"] += f" ({rank})"
    if ended.code < 0 or ended.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        console.check_stop()
    # What rank 0 said has been on this process's stderr.
    places = [raw["where"], f"log: {log}/rank-{ended.rank}.log" if ended.rank else None]
    return _error({**raw, "where": "; ".join(place for place in places if place) or None})


def _error(raw: dict[str, Any]) -> BnfctlError:
    error = BnfctlError(raw["error"], where=raw["where"], hint=raw["hint"])
    error.exit_code = raw["exit_code"]
    return error


def _main(request: Path) -> int:
    raw = json.loads(request.read_text(encoding="utf-8"))
    die_with_parent(raw["parent"])
    console.claim_stdout()
    console.catch_signals()
    rank = machine.place().rank
    result = request.with_name(f"{rank}.json")

    def tell(error: BnfctlError) -> None:
        durable.write_json(result, error.as_dict())
        if rank:
            console.report(error)  # in its log; the parent shows rank 0's

    try:
        draft = from_order(raw["order"])
        from bnfctl.training.world import joined

        with guarded(draft), joined(lost=tell):
            summary = run_stage(draft)
            if rank == 0:
                durable.write_json(result, {"summary": summary, "provenance": draft.provenance})
        return 0
    except BnfctlError as error:
        tell(error)
        return error.exit_code


# Ranks that the user's launcher has started.


def asked(config: Any, **more: Any) -> str:
    """A digest of what this rank was asked to do: the launcher may have started different commands."""
    return fingerprint({"config": as_json(config), **more})


def lead(digest: str, work: Callable[[Callable[[Draft], dict[str, Any]]], T]) -> T:
    """On rank 0: do `work`, which gets the way to run a draft's stage on all ranks; then tell them how it ended."""
    _quiet_torch()
    from bnfctl.training.world import joined

    with joined(digest) as world:

        def together(draft: Draft) -> dict[str, Any]:
            world.give_order(as_order(draft))
            return run_stage(draft)

        try:
            result = work(together)
        except BnfctlError as error:
            with contextlib.suppress(RuntimeError):  # the store is gone, and the others with it
                world.give_order({"do": "fail", **error.as_dict()})
            raise
        world.give_order({"do": "nothing"})
        return result


def follow(digest: str) -> None:
    """On every other rank: what rank 0 says, until it says that all is done; raises the error that it ended with.

    From the first work on, stderr goes to log/rank-K.log of the draft; only the end of another rank is told aloud.
    """
    _quiet_torch()
    from bnfctl.training.heartbeat import LostRank
    from bnfctl.training.world import joined

    voice = os.dup(2)

    def aloud(error: BnfctlError) -> None:
        os.dup2(voice, 2)
        console.report(error)

    try:
        with joined(digest, aloud) as world:
            while (order := world.wait_for_order())["do"] == "run":
                draft = from_order(order)
                with open(draft.path / "log" / f"rank-{world.rank}.log", "ab") as log:
                    os.dup2(log.fileno(), 2)
                run_stage(draft)
            if order["do"] == "fail":
                raise _error(order)
    except LostRank as error:
        aloud(error)
        raise
    finally:
        os.dup2(voice, 2)
        os.close(voice)


def _quiet_torch() -> None:
    """Before torch is imported: its warnings of a peer that left are stack traces."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


if __name__ == "__main__":
    machine.leave(_main(Path(sys.argv[1])))
