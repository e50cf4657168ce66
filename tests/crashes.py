"""Kills one stage at each of its durable steps in turn, resumes it, and compares digests.

    PYTHONPATH=. python tests/crashes.py STAGE FOLDER

Run as a script, because it forks: the heavy imports are paid once, and every attempt is a process of its own.
Prints one JSON line: {"steps": how many boundaries, "bad": [what went wrong]}.

    PYTHONPATH=. python tests/crashes.py kills PIPELINE FOLDER COUNT

kills a whole run of a pipeline COUNT times at seeded random moments, each time going on where the last one
stopped, lets it end, and compares all digests with those of an undisturbed run: {"kills": COUNT, "bad": [...]}.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bnfctl import durable, launch
from bnfctl.artifact import Store
from bnfctl.config import BuildConfig, EvalConfig, GenerateConfig, ScoreConfig, TrainConfig


def forked(work: Any, fault_at: int = 0, log: Path | None = None) -> int:
    """Run `work` in a fork with the fault hook set; its wait status."""
    child = os.fork()
    if child == 0:
        os.environ["BNFCTL_FAULT_AT"] = str(fault_at)
        if log is not None:
            os.environ["BNFCTL_FAULT_LOG"] = str(log)
        durable._passed = 0
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def import_all(names: list[str]) -> None:
    """Import here what a first run imported bit by bit, so that the next forks have it from the start."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def prepare(stage: str, folder: Path) -> tuple[Any, Path]:
    """(the stage's config, a store that holds what it needs)."""
    home = folder / "before"
    store = Store(home)
    responses = folder / "responses.jsonl"
    rows = [{"id": f"q{i}", "prompt": f"{i} + 1?", "answer": str(i + 1), "responses": [f"It is {i + 1}.", "It is 0."]}
            for i in range(8)]  # fmt: skip
    responses.write_text("\n".join(json.dumps(row) for row in rows))
    imported = GenerateConfig(prompts=str(responses), sampler="file")
    if stage == "generate":
        home.mkdir()
        return GenerateConfig(prompts="lab:chat", model="lab", sampler="hf", limit=3, chunk=1, n=2, max_tokens=6), home
    if stage == "eval":
        home.mkdir()
        return EvalConfig(model="lab", tasks=("lab-chat", "lab-reasoning"), sampler="hf", limit=2, chunk=2), home
    candidates = launch.execute("generate", imported, store).artifact
    if stage == "score":
        return ScoreConfig(input=str(candidates.ref)), home
    scores = launch.execute("score", ScoreConfig(input=candidates.ref), store).artifact
    if stage == "build":
        return BuildConfig(input=scores.ref, test_fraction=0.0), home
    build = launch.execute("build", BuildConfig(input=scores.ref, test_fraction=0.25), store).artifact
    return TrainConfig(model="lab", data=build.ref, lr=1e-3, batch_size=2, save_every=1, eval_every=2), home


def main(stage: str, folder: Path) -> dict[str, Any]:
    config, before = prepare(stage, folder)
    imported = folder / "imported.json"

    def attempt(home: Path) -> Any:
        def run() -> None:
            launch.execute(stage, config, Store(home))
            imported.write_text(json.dumps(sorted(sys.modules)))

        return run

    def digests(home: Path) -> list[str]:
        return [artifact.manifest.digest for artifact in Store(home).artifacts(stage)]

    calm, log = folder / "calm", folder / "boundaries.txt"
    shutil.copytree(before, calm)
    assert forked(attempt(calm), log=log) == 0, "the undisturbed run failed"
    wanted, steps = digests(calm), log.read_text().splitlines()
    import_all(json.loads(imported.read_text()))
    bad = []
    for number, name in enumerate(steps, 1):
        home = folder / "crashed"
        shutil.copytree(before, home)
        status = forked(attempt(home), fault_at=number)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            bad.append(f"{number} {name}: not killed ({status})")
        for artifact in Store(home).artifacts():
            if artifact.verify():
                bad.append(f"{number} {name}: left a broken artifact: {artifact.verify()}")
        if forked(attempt(home)) != 0 or digests(home) != wanted:
            bad.append(f"{number} {name}: {digests(home)} instead of {wanted}")
        elif any(Store(home).home.rglob("*.tmp")):
            bad.append(f"{number} {name}: left a temporary file")
        shutil.rmtree(home)
    return {"steps": len(steps), "bad": bad}


def run_pipeline(pipeline: Path, home: Path, kill_after: float | None = None) -> dict[str, str] | None:
    """Step name -> digest of a whole run; None if `kill -9` after `kill_after` seconds came first."""
    command = [
        sys.executable,
        "-m",
        "bnfctl",
        "run",
        str(pipeline),
        "--json",
        "--home",
        str(home),
        "--set",
        "vars.sampler=hf",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        out, _ = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()  # the parent only: its child must end by itself
        process.communicate()
        time.sleep(0.5)
        return None
    assert process.returncode == 0, f"exit {process.returncode}"
    return {step["step"]: step["digest"] for step in json.loads(out)["steps"]}


def kills(pipeline: Path, folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Kill one run `count` times; delays are drawn so that most of them fall while a stage works."""
    started = time.monotonic()
    calm = run_pipeline(pipeline, folder / "calm")
    seconds = time.monotonic() - started
    rng = random.Random(seed)
    done, bad = 0, []
    for _ in range(count):
        delay = rng.uniform(1.0, max(3.0, 2.0 * seconds / count))
        if run_pipeline(pipeline, folder / "killed", delay) is None:
            done += 1
        bad += [problem for artifact in Store(folder / "killed").artifacts() for problem in artifact.verify()]
    ended = run_pipeline(pipeline, folder / "killed")
    assert calm is not None and ended is not None
    bad += [f"{step}: {ended[step]} instead of {digest}" for step, digest in calm.items() if ended[step] != digest]
    bad += [problem for artifact in Store(folder / "killed").artifacts() for problem in artifact.verify()]
    return {"kills": done, "seconds": round(seconds, 1), "bad": bad}


if __name__ == "__main__":
    if sys.argv[1] == "kills":
        print(json.dumps(kills(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
    else:
        print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
