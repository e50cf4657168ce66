"""Run one stage: plan, look for the result, else make it in a draft; here, on ranks, or in a child process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bnfctl import console, durable, machine, ranks, stages
from bnfctl.artifact import Artifact, Draft, Pinned, Plan, Store
from bnfctl.errors import BnfctlError
from bnfctl.options import as_json

LOG_NAME = "stage.log"


@dataclass(frozen=True)
class Outcome:
    """What running a stage gave."""

    artifact: Artifact
    cached: bool
    seconds: float


def plan(stage: str, config: Any, store: Store, prepare: Callable[[stages.Prerequisite], Artifact | None]) -> Plan:
    """The stage's plan; `prepare` runs what has to come first (or returns None: then the plan says so)."""
    while True:
        found = stages.module(stage).plan(config, store)
        if isinstance(found, Plan):
            return found
        made = prepare(found)
        if made is None:
            missing = Pinned("artifact", f"a {found.stage} to be made", None, None, found.why)
            return Plan(stage, stages.module(stage).VERSION, config, {found.field: missing})
        config = dataclasses.replace(config, **{found.field: str(made.path)})


def execute(stage: str, config: Any, store: Store, *, force: bool = False, name: str | None = None) -> Outcome:
    """Run a stage and return its artifact, made or found: in this process, or on ranks that it starts.

    Under a launcher this is rank 0, and training is done together with the ranks that `follow`.
    """
    count = ranks.to_start(stage, config)

    def start(draft: Draft) -> dict[str, Any]:
        return ranks.run_ranks(draft, count) if count > 1 else ranks.run_stage(draft)

    if stage == ranks.STAGE and machine.place().size > 1:
        asked = ranks.asked(config, force=force)
        return ranks.lead(asked, lambda together: _execute(stage, config, store, force, name, together))
    return _execute(stage, config, store, force, name, start)


def follow(config: Any, *, force: bool = False) -> None:
    """What `execute` of a training is on the ranks behind rank 0; raises the error that rank 0 ends with."""
    ranks.to_start(ranks.STAGE, config)
    ranks.follow(ranks.asked(config, force=force))


def _execute(
    stage: str, config: Any, store: Store, force: bool, name: str | None, run: Callable[[Draft], dict[str, Any]]
) -> Outcome:
    started = time.monotonic()

    def prepare(first: stages.Prerequisite) -> Artifact:
        console.say(first.why)
        return execute(first.stage, first.config, store).artifact

    planned = plan(stage, config, store, prepare)
    for note in planned.notes:
        console.say(note)
    planned.require_resolved(stage)
    artifact = None if force else store.get(stage, planned.key)
    cached = artifact is not None
    if artifact is None:
        artifact, cached = _make(planned, store, force, run)
    if cached:
        console.say(f"cached {artifact.ref}{engine_note(artifact)}")
    if name is not None:
        store.set_name(name, artifact.ref)
    return Outcome(artifact, cached, time.monotonic() - started)


def _make(planned: Plan, store: Store, force: bool, run: Callable[[Draft], dict[str, Any]]) -> tuple[Artifact, bool]:
    with store.draft(planned) as draft:
        found = None if force else store.get(planned.stage, planned.key)
        if found is not None:
            return found, True
        if force:
            draft.start_over()
        draft.open()
        with ranks.guarded(draft):
            return draft.publish(run(draft)), False


def engine_note(artifact: Artifact) -> str:
    """` (made with vllm 0.31, ...)` where the engine that made it is not today's."""
    engine = artifact.manifest.provenance.get("engine")
    if not engine or " " not in engine or engine.startswith("server "):  # a server says itself what it runs
        return ""
    from importlib.metadata import PackageNotFoundError, version

    package, made = engine.split(" ", 1)
    for name in (package, f"{package}-cpu"):
        try:
            today = version(name)
        except PackageNotFoundError:
            continue
        return "" if made == today else f" (made with {engine}; {today} is installed)"
    return f" (made with {engine}, which is not installed)"


def run_child(stage: str, config: Any, planned: Plan, store: Store, *, label: str, force: bool) -> Outcome:
    """Run a stage in a child of its own, so that its memory, GPU memory too, is really freed.

    The child's stderr is shown behind `[label]` and kept in log/stage.log of its draft.  BnfctlError carries
    the child's own error and exit code, with the log's path.
    """
    started = time.monotonic()
    draft = store.draft_path(stage, planned.key)
    (draft / "log").mkdir(parents=True, exist_ok=True)
    # Named by this process: another run of the same pipeline may be at the same draft.
    result = draft / "log" / f"result-{os.getpid()}.json"
    request = draft / "log" / f"request-{os.getpid()}.json"
    durable.write_json(
        request,
        {"stage": stage, "config": as_json(pinned_config(config, planned)), "home": str(store.home), "force": force,
         "result": str(result), "parent": os.getpid()},
    )  # fmt: skip
    command = [sys.executable, "-m", "bnfctl.launch", str(request)]
    with open(draft / "log" / LOG_NAME, "ab") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        assert child.stderr is not None
        reader = threading.Thread(target=_relay, args=(child.stderr, log, label), daemon=True)
        reader.start()
        _wait(child)
        reader.join(timeout=10)
    published = store.get(stage, planned.key)
    where = f"log: {(published.path if published and child.returncode == 0 else draft) / 'log' / LOG_NAME}"
    if child.returncode != 0 or published is None:
        raise _child_error(child.returncode, result, where)
    return Outcome(published, False, time.monotonic() - started)


def pinned_config(config: Any, planned: Plan) -> Any:
    """The config with hub names at the commit that was planned, so that a child finds the same one.

    Data sets that no field names (those of an evaluation's tasks) have no place in it: the child pins them again.
    """
    known = {field.name for field in dataclasses.fields(config)}
    hub_names = {n: p.ref for n, p in planned.inputs.items() if p.kind.startswith("hub-") and n in known}
    return dataclasses.replace(config, **hub_names)


def _wait(child: subprocess.Popen[bytes]) -> None:
    forwarded = False
    while child.poll() is None:
        try:
            child.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            if console.stop_requested() and not forwarded:
                forwarded = True
                child.send_signal(signal.SIGTERM)


def _relay(stream: IO[bytes], log: IO[bytes], label: str) -> None:
    for line in stream:
        log.write(line)
        log.flush()
        console.say(f"[{label}] {line.decode('utf-8', 'replace').rstrip()}")


def _child_error(code: int, result: Path, where: str) -> BnfctlError:
    console.check_stop()
    try:
        raw = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raw = {"error": f"the stage's process ended with {code}", "exit_code": 1, "where": None, "hint": None}
    places = where if raw["where"] is None else f"{raw['where']}; {where}"
    error = BnfctlError(raw["error"], where=places, hint=raw["hint"])
    error.exit_code = raw["exit_code"]
    return error


def _child(request: Path) -> int:
    raw = json.loads(request.read_text(encoding="utf-8"))
    ranks.die_with_parent(raw["parent"])
    console.claim_stdout()
    console.catch_signals()
    result = Path(raw["result"])
    try:
        execute(
            raw["stage"],
            ranks.config_from_json(raw["stage"], raw["config"]),
            Store(Path(raw["home"])),
            force=raw["force"],
        )
        return 0
    except BnfctlError as error:
        console.report(error)
        durable.write_json(result, error.as_dict())
        return error.exit_code


if __name__ == "__main__":
    sys.exit(_child(Path(sys.argv[1])))
