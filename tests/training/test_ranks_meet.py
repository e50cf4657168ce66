"""Real ranks on this machine: how they add up, and that the end of one ends the others."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bnfctl.errors import UsageError
from bnfctl.machine import Place
from bnfctl.training.world import World, compare, joined
from tests.ranks import ENV, SCRIPT, TORCHRUN, free_port, run_ranks


def srun(mode: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Two ranks as srun starts them on two nodes: nobody ends one when the other dies."""
    shared = {**ENV, "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
              "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0",
              "MASTER_PORT": free_port()}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, mode, str(folder)], env={**shared, "SLURM_PROCID": rank, "SLURM_NODEID": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip


def left(folder: Path) -> list[Any]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def check_collectives(folder: Path, launcher: str, local_size: int) -> None:
    for rank, found in enumerate(left(folder)):
        local_rank = rank if local_size > 1 else 0
        place = {"rank": rank, "size": 2, "local_rank": local_rank, "local_size": local_size, "launcher": launcher}
        assert found == {
            "place": place, "sum": [3.0, 20.0], "max": [2.0, 10.0], "any": [True, False],
            "broadcast": {"from": 0, "text": "ééé"}, "gather": ["", "x"], "same": True,
            "stopped": 128 + signal.SIGINT,
        }  # fmt: skip


def test_collectives_under_srun(tmp_path: Path) -> None:
    for process in srun("collectives", tmp_path):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    check_collectives(tmp_path, "srun", 1)


def test_collectives_under_accelerate(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--main_process_port", free_port(), SCRIPT, "collectives", str(tmp_path)]  # fmt: skip
    env = {**ENV, "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    check_collectives(tmp_path, "accelerate launch", 2)


@pytest.mark.parametrize("mode", ["killed", "silent"])
def test_a_rank_that_dies_or_stands_still_ends_the_other(mode: str, tmp_path: Path) -> None:
    first, second = srun(mode, tmp_path)
    try:
        _, err = first.communicate(timeout=60)
    finally:
        second.kill()
        second.communicate()
    assert err.splitlines() == ["error: rank 1 ended; this rank stops", "hint: the same command resumes"]
    assert first.returncode == 1


def test_a_rank_with_an_error_of_its_own_gives_it_to_the_others(tmp_path: Path) -> None:
    first, second = srun("fails", tmp_path)
    _, err = first.communicate(timeout=60)
    assert err.splitlines() == ["error: no bread (rank 1)", "where: the kitchen", "hint: bake"]
    assert (first.returncode, second.wait(timeout=60)) == (1, 1)
    assert second.communicate()[1].splitlines()[0] == "error: no bread"


def test_a_rank_that_is_done_first_is_not_dead(tmp_path: Path) -> None:
    for process in srun("leaves_early", tmp_path):
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
    assert left(tmp_path) == ["done", "done"]


def test_torchrun_passes_a_stop_on_to_all_ranks(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--master-port", free_port(), SCRIPT, "waits", str(tmp_path)]
    torchrun = subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    torchrun.send_signal(signal.SIGTERM)
    _, err = torchrun.communicate(timeout=60)
    assert torchrun.returncode != 0
    assert err.count("error: interrupted") == 2, err
    assert "error: rank" not in err


def test_one_process_is_a_world_of_its_own() -> None:
    with joined() as world, joined() as again:
        assert again is world
        assert (world.rank, world.size, world.main) == (0, 1, True)
        assert world.sum(torch.tensor([2.0])).tolist() == [2.0]
        assert world.any(True, False) == (True, False)
        assert world.broadcast_json({"a": (1, None)}) == {"a": [1, None]}
        assert world.gather_json("x") == ["x"]
        world.barrier()
        world.check_stop()
        world.give_order({"do": "nothing"})
    with joined() as later:
        assert isinstance(later, World) and later is not world


def broadcasts(world: World) -> None:
    """Without what costs every rank the others' padded bytes."""
    dist.all_gather = None
    for value in ("x", {"ids": ["é" * 10] * world.rank}, list(range(1000)), None):
        found = world.broadcast_json(value)
        assert found == ({"ids": []} if isinstance(value, dict) else value)


def test_a_broadcast_sends_the_first_ranks_bytes_alone() -> None:
    run_ranks(broadcasts, 2, timeout=90)


STATE = {"rank": 0, "size": 2, "version": "1", "torch": "2", "asked": "a", "kind": "cpu", "gpu": None}


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"size": 4}, r"rank 0 and rank 1 have other numbers of ranks \(2 and 4\)"),
        ({"version": "2"}, r"other versions of bnfctl \(1 and 2\)"),
        ({"torch": "3"}, r"other versions of torch \(2 and 3\)"),
        ({"asked": "b"}, "rank 0 and rank 1 have other configs$"),
        ({"kind": "cuda", "gpu": "n: 1"}, r"other kinds of device \(cpu and cuda\)"),
    ],
)
def test_ranks_that_do_not_belong_together_are_refused(other: dict[str, Any], what: str) -> None:
    place = Place(0, 2, 0, 2, "torchrun")
    compare([STATE, {**STATE, "rank": 1}], place)
    with pytest.raises(UsageError, match=what) as caught:
        compare([STATE, {**STATE, "rank": 1, **other}], place)
    assert caught.value.where == "torchrun"


def test_two_ranks_on_one_gpu_are_refused() -> None:
    states = [{**STATE, "rank": rank, "kind": "cuda", "gpu": f"{node}: 7"} for rank, node in enumerate(("a", "b", "a"))]
    compare(states[:2], Place(0, 2, 0, 1, "srun"))
    with pytest.raises(UsageError, match=r"rank 0 and rank 2 share one GPU \(a: 7\)"):
        compare(states, Place(0, 3, 0, 2, "srun"))
