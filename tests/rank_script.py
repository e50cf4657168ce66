"""What the processes of tests/test_ranks.py and tests/training/test_ranks_meet.py do, as ranks of any launcher.

    python tests/rank_script.py MODE FOLDER

The heartbeat is faster here than in life.  Each rank leaves FOLDER/rank-K.json where its work got that far.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bnfctl import console, launch, machine, stages
from bnfctl.artifact import Draft, Plan, Store
from bnfctl.config import TrainConfig
from bnfctl.errors import BnfctlError
from bnfctl.training import heartbeat, world
from bnfctl.training.world import World, joined

heartbeat.BEAT_SECONDS, heartbeat.SILENT_SECONDS, heartbeat.GRACE_SECONDS = 0.2, 3.0, 1.0
world.START_SECONDS = 60.0


def leave(folder: Path, rank: int, value: Any) -> None:
    (folder / f"rank-{rank}.json").write_text(json.dumps(value))


def collectives(folder: Path, here: World) -> None:
    """One of everything; rank 1 alone is asked to stop."""
    mine = torch.tensor([1.0 + here.rank, 10.0], dtype=torch.float64)
    found = {
        "place": vars(here.place),
        "sum": here.sum(mine.clone()).tolist(),
        "max": here.max(mine.clone()).tolist(),
        "any": here.any(here.rank == 1, False),
        "broadcast": here.broadcast_json({"from": here.rank, "text": "é" * 3}),
        "gather": here.gather_json("x" * here.rank),
    }
    with joined() as again:
        found["same"] = again is here
    here.barrier()
    here.check_stop()
    if here.rank == 1:
        console._signal = signal.SIGINT
    try:
        here.check_stop()
    except BnfctlError as stopped:
        found["stopped"] = stopped.exit_code
    leave(folder, here.rank, found)


def killed(folder: Path, here: World) -> None:
    """Rank 1 is killed while the others wait for it."""
    if here.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    here.barrier()


def silent(folder: Path, here: World) -> None:
    """Rank 1 stands still: its connections stay open, so only the heartbeat tells."""
    if here.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    here.barrier()


def fails(folder: Path, here: World) -> None:
    """Rank 1 has an error of its own; the others are stuck in a collective that it never joins."""
    if here.rank == 1:
        raise BnfctlError("no bread", where="the kitchen", hint="bake")
    here.barrier()


def leaves_early(folder: Path, here: World) -> None:
    """Rank 1 is done long before rank 0, which is no death."""
    if here.rank == 0:
        time.sleep(1.3 * heartbeat.SILENT_SECONDS)
    leave(folder, here.rank, "done")


def waits(folder: Path, here: World) -> None:
    """Every rank says that it is there, then works until it is asked to stop."""
    leave(folder, here.rank, os.getpid())
    while True:
        here.check_stop()
        time.sleep(0.05)


class FakeTrain:
    """The train stage without a model: every rank takes part, the main one writes."""

    VERSION = 1

    @staticmethod
    def plan(config: TrainConfig, store: Store) -> Plan:
        if config.model == "nowhere":
            raise BnfctlError("no model 'nowhere'")
        return Plan("train", 1, config, {}, ("a note",))

    @staticmethod
    def run(config: TrainConfig, draft: Draft) -> dict[str, Any]:
        with joined() as here:
            console.say(f"rank {here.rank} works")
            if config.seed == 1 and here.rank == 1:
                raise BnfctlError("no bread", where="the kitchen", hint="bake")
            ranks = here.gather_json(here.rank)
            if here.main:
                (draft.path / "metrics.jsonl").write_text("{}\n")
        return {"ranks": ranks}


def train(folder: Path, model: str, seed: int) -> int:
    """`bnfctl train` on the ranks of a launcher, with FakeTrain in the stage's place."""
    stages.module = lambda stage: FakeTrain  # type: ignore[assignment]
    rank, config = machine.place().rank, TrainConfig(model=model, seed=seed)
    console.claim_stdout()
    console.catch_signals()
    try:
        if rank:
            launch.follow(config)
        else:
            outcome = launch.execute("train", config, Store(folder / "store"))
            console.emit(str(outcome.artifact.path))
            leave(folder, rank, {"cached": outcome.cached, **outcome.artifact.manifest.summary})
    except BnfctlError as error:
        leave(folder, rank, error.as_dict())
        if not rank:
            console.report(error)
        return error.exit_code
    return 0


MODES = (collectives, killed, silent, fails, leaves_early, waits)


def main(mode: str, folder: Path) -> int:
    if mode.startswith("train"):
        _, model, seed = mode.split(":")
        return train(folder, model, int(seed))
    console.catch_signals()
    work = {work.__name__: work for work in MODES}[mode]
    try:
        with joined() as here:
            work(folder, here)
    except BnfctlError as error:
        console.report(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    machine.leave(main(sys.argv[1], Path(sys.argv[2])))
