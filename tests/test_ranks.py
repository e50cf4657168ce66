"""Ranks: which one a process is, starting them here, and leading those that a launcher started."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bnfctl import launch, machine, pipeline, ranks
from bnfctl.artifact import Draft, Pinned, Plan, Store
from bnfctl.config import BuildConfig, TrainConfig
from bnfctl.errors import BnfctlError, Interrupted, UsageError
from bnfctl.machine import Place, place
from tests.conftest import Done
from tests.ranks import ENV, SCRIPT, TORCHRUN, free_port

TWO = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SLURM = {"SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
         "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}  # fmt: skip


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, (0, 1, 0, 1, "one process")),
        ({"MASTER_ADDR": "somewhere"}, (0, 1, 0, 1, "one process")),
        (TWO, (1, 4, 1, 2, "a launcher that sets RANK and WORLD_SIZE")),
        ({**TWO, "TORCHELASTIC_RUN_ID": "x"}, (1, 4, 1, 2, "torchrun")),
        ({**TWO, "TORCHELASTIC_RUN_ID": "x", "ACCELERATE_MIXED_PRECISION": "no"}, (1, 4, 1, 2, "accelerate launch")),
        ({**TWO, "BNFCTL_SPAWNED": "1"}, (1, 4, 1, 2, "bnfctl")),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, (0, 1, 0, 1, "accelerate launch")),
        (SLURM, (4, 5, 0, 1, "srun")),
        ({**SLURM, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}, (1, 5, 1, 2, "srun")),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2"},
         (1, 2, 1, 2, "srun")),
        # torchrun inside a step of srun: its word counts.
        ({**SLURM, **TWO, "TORCHELASTIC_RUN_ID": "x"}, (1, 4, 1, 2, "torchrun")),
        # A batch script without srun, and a shell in an allocation: nobody else will come.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (0, 1, 0, 1, "one process")),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0, 1, "one process")),
    ],
)  # fmt: skip
def test_place(env: dict[str, str], found: tuple[Any, ...]) -> None:
    assert place(env) == Place(*found)


@pytest.mark.parametrize(
    ("env", "what"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ({**TWO, "RANK": "4"}, "RANK is 4, but WORLD_SIZE is 4"),
        ({**TWO, "LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but LOCAL_WORLD_SIZE is 2"),
        ({**TWO, "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE - 1 is 7, but WORLD_SIZE is 4"),
        ({**TWO, "WORLD_SIZE": "four"}, "WORLD_SIZE is 'four', not a number"),
        ({**TWO, "RANK": "-1"}, "RANK is '-1', not a number"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "SLURM_LOCALID is not set"),
        ({**SLURM, "SLURM_PROCID": "7"}, "SLURM_PROCID is 7, but SLURM_STEP_NUM_TASKS is 5"),
        ({**SLURM, "SLURM_NODEID": "3"}, "SLURM_NODEID is 3"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE is 'many', not a number"),
        # `accelerate launch --num_processes 2 --cpu` starts one process.
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "accelerate was asked for several"),
    ],
)
def test_half_an_environment_is_refused(env: dict[str, str], what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        place(env)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu1", "gpu1"),
        ("node[01-04,07],x9", "node01"),
        ("a[3]-ib", "a3-ib"),
        ("b1,a[1-2]", "b1"),
        ("r[1-2]n[03,05]", "r1n03"),
    ],
)
def test_the_first_host_of_a_node_list(hosts: str, first: str) -> None:
    assert machine.first_host(hosts) == first


def test_meeting_points() -> None:
    given = {"MASTER_ADDR": "h", "MASTER_PORT": "29500"}
    step = {**SLURM, "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "1"}
    assert machine.meeting_point({**TWO, **given}) == ("h", 29500)
    host, port = machine.meeting_point({**step, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9"})
    assert host == "n1" and 15000 <= port < 30000
    assert machine.meeting_point({**step, "SLURM_STEP_ID": "2"}) == ("n1", port + 1)
    assert machine.meeting_point({**step, **given}) == ("h", 29500)
    del step["SLURM_STEP_NODELIST"]
    assert machine.meeting_point({**step, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9"})[0] == "10.0.0.9"
    with pytest.raises(UsageError, match="SLURM_STEP_NODELIST is not set"):
        machine.meeting_point(step)
    with pytest.raises(UsageError, match="MASTER_ADDR is not set"):
        machine.meeting_point(TWO)
    with pytest.raises(UsageError, match="MASTER_PORT is not set"):
        machine.meeting_point({**TWO, "MASTER_ADDR": "h"})


@pytest.mark.parametrize(("listed", "count"), [("0", 1), ("0,1, 3", 3), ("", 0), ("-1", 0), ("0,-1,1", 1)])
def test_visible_gpus(listed: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert machine.visible_gpus() == count


def test_how_many_ranks_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = TrainConfig(model="lab", devices=2)
    monkeypatch.setattr(machine, "visible_gpus", lambda: 0)
    assert ranks.to_start("train", TrainConfig(model="lab")) == 1
    assert ranks.to_start("train", asked) == 2
    assert ranks.to_start("build", BuildConfig(input="x")) == 1
    monkeypatch.setattr(machine, "visible_gpus", lambda: 4)
    assert ranks.to_start("train", TrainConfig(model="lab")) == 4
    with pytest.raises(UsageError, match="--devices is 5; visible GPUs: 4"):
        ranks.to_start("train", TrainConfig(model="lab", devices=5))
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    assert ranks.to_start("train", TrainConfig(model="lab")) == 1, "it is a rank itself"
    assert ranks.to_start("train", asked) == 1
    with pytest.raises(UsageError, match=r"--devices is 4, but a launcher .* started 2 on this node"):
        ranks.to_start("train", TrainConfig(model="lab", devices=4))


def spawn(tmp_path: Path, code: str, size: int = 2) -> ranks.Ended | None:
    return ranks.spawn([sys.executable, "-c", f"import os, signal, sys, time\n{code}", str(tmp_path)], size, tmp_path)


def test_spawned_ranks_know_who_they_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "print({k: os.environ[k] for k in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR')})\n"
        "from bnfctl.machine import place\n"
        "assert place().launcher == 'bnfctl'\n"
    )
    assert spawn(tmp_path, code, 3) is None
    said = [capfd.readouterr().err, *((tmp_path / f"rank-{rank}.log").read_text() for rank in (1, 2))]
    for rank, line in enumerate(said):
        assert line == (
            f"{{'RANK': '{rank}', 'WORLD_SIZE': '3', 'LOCAL_RANK': '{rank}', 'LOCAL_WORLD_SIZE': '3', "
            "'MASTER_ADDR': '127.0.0.1'}\n"
        )


def test_the_first_failure_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(ranks, "KILL_SECONDS", 0.5)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif os.environ['RANK'] == '2': sys.exit(7)\ntime.sleep(60)\n"
    started = time.monotonic()
    assert spawn(tmp_path, deaf, 3) == ranks.Ended(2, 7)
    assert time.monotonic() - started < 20
    killed = "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)\n"
    assert spawn(tmp_path, killed) == ranks.Ended(1, -9)


def test_a_stop_is_passed_on_once(tmp_path: Path, stop_signal: Callable[[int], None]) -> None:
    counts = (
        "mark = sys.argv[1] + '/signals-' + os.environ['RANK']\n"
        "open(mark, 'w').close()\n"
        "signal.signal(signal.SIGTERM, lambda *_: open(mark, 'a').write('x'))\n"
        "open(mark + '.ready', 'w').close()\n"
        "end = time.monotonic() + 2\n"
        "while time.monotonic() < end: time.sleep(0.1)\n"
        "sys.exit(130)\n"
    )

    def stop() -> None:
        while len(list(tmp_path.glob("*.ready"))) < 2:
            time.sleep(0.01)
        stop_signal(signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    assert spawn(tmp_path, counts) in (ranks.Ended(0, 130), ranks.Ended(1, 130))
    thread.join()
    assert [(tmp_path / f"signals-{rank}").read_text() for rank in (0, 1)] == ["x", "x"]
    with pytest.raises(Interrupted) as caught:
        raise ranks._failure(ranks.Ended(0, 130), tmp_path, tmp_path)
    assert caught.value.exit_code == 130


def test_the_error_of_a_rank_is_named(tmp_path: Path) -> None:
    error = BnfctlError("no bread", where="the kitchen", hint="bake").as_dict()
    for rank in (0, 1):
        (tmp_path / f"{rank}.json").write_text(json.dumps({**error, "exit_code": 2}))
    shown = [ranks._failure(ranks.Ended(rank, 2), tmp_path, Path("/log")).as_dict() for rank in (0, 1)]
    assert shown[0] == {"error": "no bread (rank 0)", "where": "the kitchen", "hint": "bake", "exit_code": 2}
    assert shown[1]["where"] == "the kitchen; log: /log/rank-1.log"
    silent = [ranks._failure(ranks.Ended(3, code), tmp_path, Path("/log")) for code in (-9, -11, 1)]
    assert [e.what for e in silent] == [
        "rank 3 was ended by SIGKILL", "rank 3 was ended by SIGSEGV", "rank 3 ended with exit code 1",
    ]  # fmt: skip
    assert all(e.exit_code == 1 and e.where == "log: /log/rank-3.log" and "resumes" in str(e.hint) for e in silent)


@pytest.fixture
def preferences(tmp_path: Path) -> BuildConfig:
    path = tmp_path / "prefs.jsonl"
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return BuildConfig(input=str(path), test_fraction=0.0)


def test_a_rank_hands_its_summary_over(preferences: BuildConfig, store: Store, tmp_path: Path) -> None:
    here = launch.execute("build", preferences, store).artifact
    planned = launch.plan("build", preferences, Store(tmp_path / "other"), lambda first: None)
    with Store(tmp_path / "other").draft(planned) as draft:
        draft.open()
        there = draft.publish(ranks.run_ranks(draft, 1))
    assert there.manifest.digest == here.manifest.digest
    assert there.manifest.summary == here.manifest.summary
    assert not list((there.path / "log").glob("ranks-*"))


def test_a_rank_hands_its_error_over(preferences: BuildConfig, store: Store, tmp_path: Path) -> None:
    planned = launch.plan("build", preferences, store, lambda first: None)
    Path(preferences.input).write_text('{"prompt": 1}')
    with store.draft(planned) as draft:
        draft.open()
        with pytest.raises(BnfctlError) as here:
            ranks.run_stage(draft)
        with pytest.raises(BnfctlError) as there:
            ranks.run_ranks(draft, 1)
    assert there.value.as_dict() == {**here.value.as_dict(), "error": f"{here.value.what} (rank 0)"}


def test_training_on_two_devices_starts_ranks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan("train", 1, TrainConfig(model="lab", devices=2), {})
    sizes: list[int] = []

    def run_ranks(draft: Draft, size: int) -> dict[str, Any]:
        sizes.append(size)
        return {"steps": 3}

    monkeypatch.setattr(launch, "plan", lambda *_: plan)
    monkeypatch.setattr(ranks, "run_ranks", run_ranks)
    outcome = launch.execute("train", plan.config, store)
    assert (sizes, outcome.artifact.manifest.summary) == ([2], {"steps": 3})
    assert launch.execute("train", plan.config, store).cached and sizes == [2]


def test_a_draft_crosses_to_another_rank(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Pinned("folder", str(tmp_path), "d1", str(tmp_path))
    plan = Plan(
        "train", 1, TrainConfig(model="m", loss_arg=("a=1",), warmup=0.25), {"model": model}, ("note",), {"t": "2"}
    )
    draft = Draft(store, plan)
    draft.open()
    order = json.loads(json.dumps(ranks.as_order(draft)))
    other = ranks.from_order(order)
    assert (other.path, other.plan.key, other.inputs) == (draft.path, plan.key, plan.inputs)
    assert other.plan.config == plan.config
    monkeypatch.setattr(ranks, "SEEN_SECONDS", 0.1)
    with pytest.raises(BnfctlError, match=r"does not see /elsewhere/\.drafts/train-"):
        ranks.from_order({**order, "home": "/elsewhere"})
    order["inputs"]["model"]["path"] = "/nowhere"
    with pytest.raises(BnfctlError, match="does not see /nowhere") as caught:
        ranks.from_order(order)
    assert "shared" in str(caught.value.hint)


def test_a_pipeline_under_a_launcher_is_refused(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.yaml").write_text("steps: {pairs: {stage: build, input: prefs.jsonl}}")
    run = pipeline.Run(pipeline.read(tmp_path / "p.yaml"), store)
    for name, value in {**TWO, "RANK": "0", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="a pipeline under torchrun"):
        run.run()


def torchrun(*command: str, env: dict[str, str] | None = None) -> Done:
    full = [*TORCHRUN, "--master-port", free_port(), *command]
    return Done(
        subprocess.run(full, env={**ENV, **(env or {})}, capture_output=True, text=True, timeout=120, check=False)
    )


def test_torchrun_trains_once_on_all_ranks_and_finds_it_again(tmp_path: Path) -> None:
    done = torchrun(SCRIPT, "train:lab:0", str(tmp_path))
    assert done.code == 0, done.err
    (made,) = (tmp_path / "store" / "train").iterdir()
    assert done.out == f"{made}\n"
    assert json.loads((tmp_path / "rank-0.json").read_text()) == {"cached": False, "ranks": [0, 1]}
    assert [line for line in done.err.splitlines() if "rank" in line] == ["rank 0 works"]
    assert (made / "log" / "rank-1.log").read_text() == "rank 1 works\n"
    again = torchrun(SCRIPT, "train:lab:0", str(tmp_path))
    assert (again.code, again.out) == (0, done.out), again.err
    assert json.loads((tmp_path / "rank-0.json").read_text()) == {"cached": True, "ranks": [0, 1]}


def test_an_error_of_rank_0_ends_all_ranks_the_same_way(tmp_path: Path) -> None:
    done = torchrun(SCRIPT, "train:nowhere:0", str(tmp_path))
    assert done.code != 0 and done.out == ""
    assert done.err.count("error: no model 'nowhere'") == 1, done.err
    ended = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert ended[0] == ended[1]


def test_torchrun_with_a_bad_config_says_it_once(tmp_path: Path) -> None:
    done = torchrun("-m", "bnfctl", "train", "--model", "lab", "--lr", "much")
    assert done.out == "" and done.err.count("error: lr is a number") == 1, done.err
    assert "exitcode  : 2" in done.err


def test_other_stages_under_torchrun_run_once(preferences: BuildConfig, tmp_path: Path) -> None:
    done = torchrun("-m", "bnfctl", "build", preferences.input, env={"BNFCTL_HOME": str(tmp_path / "home")})
    assert done.code == 0, done.err
    assert [Path(line).parent.name for line in done.out.splitlines()] == ["build"]
