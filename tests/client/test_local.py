"""Servers of our own: up, slow, dead while loading or later, and gone with their parent, engines and all."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bnfctl import console, machine
from bnfctl.client import local
from bnfctl.client.endpoint import Client
from bnfctl.client.requests import CHAT, Request, read_chat
from bnfctl.client.served import served
from bnfctl.client.servers import RefusedError
from bnfctl.errors import BnfctlError, Interrupted
from bnfctl.model.vllm import server_command
from tests import models
from tests.conftest import REPOSITORY
from tests.fake_server import FAKE, be_quick, fake, gone, notes
from tests.processes import alive, processes_with, until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    be_quick(monkeypatch)


def client(urls: list[str], key: str = local.KEY_ENV) -> Client:
    return Client(urls, concurrency=2, timeout=60, retries=0, api_key_env=key, answers=None)


def test_a_server_is_up_in_its_own_session_and_gone_afterwards(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with fake(tmp_path, "--slow", "0.3") as urls:
        (note,) = notes(tmp_path)
        assert urls == [f"http://127.0.0.1:{note['port']}/v1"]
        assert (note["host"], note["extra"]) == ("127.0.0.1", "1")
        assert note["session"] != os.getsid(0), "Ctrl-C would reach it"
        assert served(client(urls), None).name == "fake"
        assert all(alive(pid) for pid in note["pids"])
    assert gone(tmp_path)
    assert "loading shard 1 of 1" in (tmp_path / "log" / "judge.log").read_text()
    said = capfd.readouterr()
    assert "starting a server of fake; its log: " in said.err and "fake is up after" in said.err
    assert not said.out and "loading shard" not in said.err


def test_only_this_run_has_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    with fake(tmp_path) as urls:
        with pytest.raises(RefusedError, match="401"):
            served(client(urls, "OPENAI_API_KEY"), None)
        key = os.environ[local.KEY_ENV]
        assert len(key) >= 32 and notes(tmp_path)[0]["key"] == key
    assert local.KEY_ENV not in os.environ
    with fake(tmp_path):
        assert os.environ[local.KEY_ENV] != key
    assert key not in (tmp_path / "log" / "judge.log").read_text()


def test_a_server_for_each_share_of_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "visible_gpus", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    with fake(tmp_path, replicas=2, gpus_each=2) as urls:
        assert len(set(urls)) == 2
        gpus = {note["port"]: note["gpus"] for note in notes(tmp_path)}
        assert [gpus[urlsplit(url).port] for url in urls] == ["4,5", "6,7"]
        assert served(client(urls), "fake").vllm
    assert gone(tmp_path)
    assert {path.name for path in (tmp_path / "log").iterdir()} == {"judge.log", "judge-1.log"}


def test_a_slow_one_is_waited_for_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.3)
    with fake(tmp_path, "--slow", "1.2"):
        pass
    assert 2 <= capfd.readouterr().err.count("fake is loading: ") <= 20


def test_one_that_dies_while_loading_tells_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log" / "judge.log"
    log.parent.mkdir()
    log.write_text("ValueError: of an earlier run\n")
    with pytest.raises(BnfctlError, match=r"while it started \(exit code 3\): ValueError: no room$") as caught:
        with fake(tmp_path, "--fail", "no room"):
            pytest.fail("it was never up")
    assert caught.value.where == str(log) and "--server URL" in (caught.value.hint or "")
    assert gone(tmp_path), "its engine stays"
    said = capfd.readouterr().err
    assert "  loading shard 1 of 1\n  (EngineCore pid=7) ValueError: no room\n" in said and "an earlier run" not in said
    assert log.read_text().startswith("ValueError: of an earlier run\nloading shard")


def test_one_that_is_killed_while_loading(tmp_path: Path) -> None:
    with pytest.raises(BnfctlError, match=r"\(SIGKILL\)$") as caught:
        with fake(tmp_path, "--fail", "killed"):
            pytest.fail("it was never up")
    assert "ran out of memory" in (caught.value.hint or "")
    assert gone(tmp_path)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BnfctlError, match="FileNotFoundError"):
        with local.serving(["/nowhere/vllm"], {}, "fake", log=tmp_path / "log"):
            pytest.fail("it was never up")


def test_one_that_dies_later_is_the_reason_that_is_told(tmp_path: Path) -> None:
    def ask_it_to_death() -> None:
        with fake(tmp_path) as urls:
            client(urls).fetch(urls[0].removesuffix("/v1") + "/die")

    with pytest.raises(BnfctlError, match=r"the server of fake ended \(exit code 5\)") as caught:
        ask_it_to_death()
    assert "disconnected" in str(caught.value.__cause__)
    assert gone(tmp_path)


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(BnfctlError, match="of my own"), fake(tmp_path):
        raise BnfctlError("of my own")
    with pytest.raises(ZeroDivisionError), fake(tmp_path):
        _ = 1 // 0
    assert gone(tmp_path)


def test_a_stop_while_it_loads(tmp_path: Path, stop_signal: Callable[[int], None]) -> None:
    def stop() -> None:
        until(lambda: bool(notes(tmp_path)))
        stop_signal(signal.SIGINT)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Interrupted):
        with fake(tmp_path, "--slow", "600"):
            pytest.fail("it was never up")
    stopper.join()
    assert gone(tmp_path)


KEEPER = """
import sys
from bnfctl.client import local
local._LEAVING_SECONDS = 0.5
local._keep(sys.argv[1:])
"""


def test_a_server_that_will_not_leave_is_ended_by_its_keeper(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    server = [*FAKE, "--host", "127.0.0.1", "--port", "0", "--notes", str(tmp_path / "notes"), "--stubborn"]
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, *server], env={**os.environ, "VLLM_API_KEY": "none"}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        until(lambda: bool(notes(tmp_path)))
        assert not gone(tmp_path)
        said, _ = keeper.communicate(timeout=20)  # closes its stdin
        assert (keeper.returncode, said) == (-signal.SIGKILL, b""), "the server has ended by itself"
        until(lambda: gone(tmp_path))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(keeper.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_keeper_that_hangs_is_ended_with_all_it_keeps(tmp_path: Path) -> None:
    """After 20 s: it has ten of its own for a server that will not leave."""
    with fake(tmp_path, "--stubborn"):
        keeper = notes(tmp_path)[0]["session"]
        os.kill(keeper, signal.SIGSTOP)
        wakes = threading.Timer(60, os.kill, (keeper, signal.SIGCONT))  # so that nobody waits for ever
        wakes.start()
    assert gone(tmp_path)
    assert wakes.is_alive(), "it was waited for"
    wakes.cancel()


CHILD = """
import sys, time
from pathlib import Path
from tests.fake_server import fake
with fake(Path(sys.argv[1]), *sys.argv[2:]):
    print("up", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def child(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", CHILD, str(folder), *arguments]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("when", ["up", "loading"])
def test_it_ends_with_its_parent_even_by_kill_9(when: str, tmp_path: Path) -> None:
    with child(tmp_path, *(["--slow", "600"] if when == "loading" else [])) as parent:
        assert parent.stdout is not None
        if when == "up":
            assert parent.stdout.readline() == b"up\n"
        until(lambda: bool(notes(tmp_path)))
        assert not gone(tmp_path)
        parent.kill()
    until(lambda: gone(tmp_path))


def test_the_engine_ends_with_a_keeper_that_was_killed(tmp_path: Path) -> None:
    def kill_the_keeper() -> None:
        with fake(tmp_path):
            os.kill(notes(tmp_path)[0]["session"], signal.SIGKILL)
            raise BnfctlError("no answer")

    with pytest.raises(BnfctlError, match="SIGKILL"):
        kill_the_keeper()
    assert gone(tmp_path)


def test_a_port_is_nobody_elses_while_the_server_loads(tmp_path: Path) -> None:
    with local._free_port() as port, local._free_port() as another, socket.socket() as taker:
        assert port != another
        with pytest.raises(OSError):
            taker.bind(("127.0.0.1", port))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BnfctlError, match="Address already in use"):
            # the last --port counts: somebody who did not ask has it after all
            with local.serving(
                [sys.executable, "-c", PORT, FAKE[1], str(taken.getsockname()[1]), str(tmp_path)], {}, "fake",
                log=tmp_path / "log",
            ):  # fmt: skip
                pytest.fail("another server's port")


PORT = """
import runpy, sys
_, program, port, notes, *_ = sys.argv
sys.argv = [program, "--host", "127.0.0.1", "--port", port, "--notes", notes]
runpy.run_path(program, run_name="__main__")
"""

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.mark.vllm
@needs_vllm
def test_vllm_itself(tmp_path: Path) -> None:
    folder = models.make_llama(tmp_path / "m", stop=1.2)
    command, environment = server_command(
        folder,
        "judges/tiny",
        dtype="auto",
        gpu_memory=0.3,
        trust_remote_code=False,
        context=128,
        instead="--server URL",
    )
    log = tmp_path / "judge.log"
    with local.serving(command, environment, "judges/tiny", log=log) as urls:
        asking = client(urls)
        found = served(asking, None)
        assert (found.name, found.vllm, found.context) == ("judges/tiny", True, 128)
        body = {"model": found.name, "messages": [{"role": "user", "content": "Which?"}], "max_tokens": 8}
        ((_, answer),) = asking.ask([Request(0, CHAT, body, read_chat)])
        assert answer["choices"][0]["finish"] in ("stop", "length")
        with pytest.raises(RefusedError, match="401"):
            served(client(urls, "OPENAI_API_KEY"), None)
        ours = processes_with(str(folder))
        assert ours
        assert os.environ[local.KEY_ENV] not in log.read_text()
    assert not any(alive(pid) for pid in ours)
    with pytest.raises(BnfctlError, match=r"while it started \(exit code 1\): Value error, .*max_model_len") as caught:
        with local.serving([*command, "--max-model-len=4096"], environment, "judges/tiny", log=log):
            pytest.fail("the model has 256 positions")
    assert caught.value.where == str(log)
