"""The pool, with real processes: every unit once, errors with a name, nothing left running."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bnfctl import machine, pool
from bnfctl.errors import BnfctlError, Interrupted, UsageError
from tests.conftest import REPOSITORY
from tests.processes import alive, until


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def job(folder: Path, workers: int = 2, **changes: Any) -> pool.Job:
    (folder / "parts").mkdir(exist_ok=True)
    request = {"folder": str(folder / "parts"), **changes}
    return pool.Job("tests.pool_work:Writing", request, folder, workers, threads=3)


def written(folder: Path) -> dict[int, list[str]]:
    return {int(path.name): path.read_text().split(" ") for path in (folder / "parts").glob("[0-9]*")}


@pytest.mark.parametrize("workers", [1, 3])
def test_every_unit_is_done_once(workers: int, tmp_path: Path) -> None:
    done = list(pool.run(job(tmp_path, workers, seconds=0.05), range(3, 12)))
    assert sorted(one.unit for one in done) == list(range(3, 12))
    assert all((one.records, one.tokens, one.provenance) == (2, 10 * one.unit, {"engine": "pen 1.0"}) for one in done)
    pids = {pid for pid, _, _ in written(tmp_path).values()}
    assert pids == {str(os.getpid())} if workers == 1 else len(pids) > 1 and str(os.getpid()) not in pids
    if workers > 1:
        assert {threads for _, _, threads in written(tmp_path).values()} == {"3"}
        assert "a library that prints" in (tmp_path / "worker-1.log").read_text()
    assert not any(alive(int(pid)) for pid in pids - {str(os.getpid())})


def test_units_are_pulled_lazily(tmp_path: Path) -> None:
    pulled = []

    def units() -> Any:
        for unit in range(8):
            pulled.append(unit)
            yield unit

    for number, _ in enumerate(pool.run(job(tmp_path, seconds=0.02), units()), 1):
        assert len(pulled) <= number + 2, "each of two workers has one"


def test_each_worker_has_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "visible_gpus", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6, 4,GPU-ab,1")
    assert [pool.share_of_gpus(number, 2)["CUDA_VISIBLE_DEVICES"] for number in (0, 1)] == ["6,4", "GPU-ab,1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [pool.share_of_gpus(number, 1)["CUDA_VISIBLE_DEVICES"] for number in range(4)] == ["0", "1", "2", "3"]
    list(pool.run(job(tmp_path, seconds=0.05), range(6)))
    assert {gpus for _, gpus, _ in written(tmp_path).values()} == {"0", "1"}


@pytest.mark.parametrize(
    ("how", "what", "hint"),
    [
        ("kill", "was ended by SIGKILL", "ran out of memory"),
        ("exit", "ended with exit code 7", "the same command resumes"),
        ("raise", r"ValueError: out of ink \(worker", "the same command resumes"),
        ("ask to stop", "was asked to stop", "the same command resumes"),
    ],
)
def test_a_worker_that_fails_ends_all_and_what_is_done_stays(how: str, what: str, hint: str, tmp_path: Path) -> None:
    found: list[pool.Done] = []
    with pytest.raises(BnfctlError, match=what) as caught:
        found.extend(pool.run(job(tmp_path, seconds=0.02, at={"9": how}), range(100_000)))
    assert caught.value.exit_code == 1 and hint in (caught.value.hint or "")
    assert set(range(5)) <= {one.unit for one in found} <= set(written(tmp_path))
    assert len(found) < 1000
    assert not any(alive(int(pid)) for pid, _, _ in written(tmp_path).values())
    if "worker 1" in caught.value.what:
        assert f"log: {tmp_path}/worker-1.log" in (caught.value.where or "")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_engine_of_a_worker_that_was_killed_is_ended_too(workers: int, tmp_path: Path) -> None:
    one = dataclasses.replace(job(tmp_path, workers, at={"3": "leave an engine"}), apart=True)
    started = time.monotonic()
    with pytest.raises(BnfctlError, match="was ended by SIGKILL"):
        list(pool.run(one, range(100)))
    assert time.monotonic() < started + 60, "the engine holds the worker's pipe open"
    engine = int((tmp_path / "parts" / "engine").read_text())
    until(lambda: not alive(engine), 10, "the engine keeps the GPU's memory")


def test_a_worker_that_hangs_when_all_is_saved_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_LEAVING_SECONDS", 0.2)
    assert len(list(pool.run(job(tmp_path, hang=True), range(5)))) == 5
    assert not any(alive(int(pid)) for pid, _, _ in written(tmp_path).values())


def test_a_fault_of_a_worker_has_its_traceback_in_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BnfctlError, match="out of ink") as caught:
        list(pool.run(job(tmp_path, at={"1": "raise"}), range(4)))
    path = tmp_path / "traceback.txt"
    assert 'raise ValueError("out of ink")' in path.read_text()
    assert str(path) in (caught.value.where or "") and "Traceback" not in capfd.readouterr().err


def test_an_error_of_ours_keeps_its_exit_code_and_its_hint(tmp_path: Path) -> None:
    with pytest.raises(BnfctlError, match="no such pen") as caught:
        list(pool.run(job(tmp_path, refuse=True), range(4)))
    assert (caught.value.exit_code, caught.value.hint) == (2, "--pen blue")
    assert (caught.value.where or "").startswith("--pen")


def test_a_full_disk_of_a_worker_is_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        list(pool.run(job(tmp_path, at={"1": "full"}), range(4)))
    assert caught.value.errno == 28


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_finishes_what_is_under_way(workers: int, tmp_path: Path, stop_signal: Callable[[int], None]) -> None:
    found = []

    def stop_at_the_first() -> None:
        for one in pool.run(job(tmp_path, workers, seconds=0.05), range(1000)):
            found.append(one.unit)
            stop_signal(signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        stop_at_the_first()
    assert caught.value.exit_code == 143
    assert 1 <= len(found) <= 2 * workers
    assert sorted(found) == sorted(written(tmp_path))


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    code = (
        "from tests.test_pool import job\nfrom bnfctl import pool\nfrom pathlib import Path\n"
        f"for one in pool.run(job(Path({str(tmp_path)!r}), seconds=0.1), range(100_000)): pass\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    try:
        (tmp_path / "parts").mkdir(exist_ok=True)
        deadline = time.monotonic() + 60
        while len(pids := {pid for pid, *_ in written(tmp_path).values() if pid}) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert all(alive(int(pid)) for pid in pids)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not any(alive(int(pid)) for pid in pids), 10, "workers outlive their parent")


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = 0
    monkeypatch.setattr(machine, "visible_gpus", lambda: gpus)
    assert (pool.processes(None), pool.processes(3)) == (1, 3)
    with pytest.raises(UsageError, match="there is no GPU"):
        pool.processes(None, 2)
    gpus = 5
    assert (pool.processes(None), pool.processes(None, 2), pool.processes(4, 2), pool.processes(1)) == (5, 2, 2, 1)
    for devices, each, where in ((6, 1, "--devices"), (3, 2, "--tensor-parallel"), (None, 8, "--tensor-parallel")):
        with pytest.raises(UsageError) as caught:
            pool.processes(devices, each)
        assert caught.value.where == where and caught.value.hint
