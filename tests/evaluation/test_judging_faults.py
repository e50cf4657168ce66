"""`bnfctl eval` with a judge that fails, is killed, or is asked by two runs at once: nothing is lost or paid for twice."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bnfctl.artifact import Artifact, Store
from bnfctl.config import EvalConfig
from bnfctl.errors import BnfctlError
from bnfctl.evaluation.asking import answers_file
from bnfctl.evaluation.rows import rows_of
from tests.conftest import REPOSITORY, Done, environment
from tests.evaluation.world import data, say
from tests.processes import kill, until
from tests.small_disk import on_small_disk
from tests.stages.chain import run
from tests.stub_server import Call, Fault, Gate, StubServer, slow
from tests.tasks.judged_world import answer_row, mine, number_and_game, said_so, write

COUNT = 30
CALLS = 2 * COUNT
IN_FLIGHT = 4


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data(tmp_path_factory.mktemp("items"), COUNT)


@pytest.fixture(scope="module")
def files(items: Path) -> dict[str, Path]:
    """Responses of two models."""
    texts: dict[str, Callable[[int], str]] = {
        "mine": mine,
        "other": lambda n: f"mine {n} other " + "word " * (n % 5 * 9),
    }
    return {
        name: write(items / f"{name}.jsonl", [answer_row(n, text(n), name, 2024) for n in range(COUNT)])
        for name, text in texts.items()
    }


@pytest.fixture(scope="module")
def undisturbed(items: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of `mine`, judged without a fault."""
    with StubServer(say=say) as stub:
        config = EvalConfig(
            tasks=("arena-hard",), responses=(str(files["mine"]),), data_dir=str(items), server=(stub.url,)
        )
        return run(config, Store(tmp_path_factory.mktemp("undisturbed"))).manifest.digest


def arguments(items: Path, *responses: Path, url: str, more: tuple[object, ...] = ()) -> list[str]:
    given = [
        "eval",
        "--tasks",
        "arena-hard",
        "--data-dir",
        items,
        "--server",
        url,
        "--concurrency",
        IN_FLIGHT,
        "--json",
    ]
    return [*map(str, given), *(part for path in responses for part in ("--responses", str(path))), *map(str, more)]


@contextmanager
def started(folder: Path, arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The command, on the store in `folder`; ended with the context."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bnfctl", *arguments], cwd=REPOSITORY, env=environment(folder, None), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def done(process: subprocess.Popen[str]) -> Done:
    out, errors = process.communicate(timeout=120)
    return Done(subprocess.CompletedProcess([], process.returncode, out, errors))


def made(folder: Path, finished: Done) -> Artifact:
    assert finished.code == 0, finished.err
    store = Store(folder / "artifacts")
    return store.find(finished.json["ref"], "eval", "REF")


def used(folder: Path, finished: Done) -> dict[str, Any]:
    return dict(made(folder, finished).manifest.provenance["usage"])


def test_a_killed_run_goes_on_and_asks_again_only_what_was_in_flight(
    items: Path, files: dict[str, Path], undisturbed: str, tmp_path: Path, warm_bnfctl: Callable[..., Done]
) -> None:
    gate = Gate(CALLS // 2)
    with StubServer(gate, say=say) as stub:
        command = arguments(items, files["mine"], url=stub.url)
        with started(tmp_path, command) as process:
            until(lambda: sum(stub.asked.values()) == CALLS // 2 + IN_FLIGHT)
            kill(process)
        gate.open.set()
        asked = sum(stub.asked.values())
        finished = warm_bnfctl(*command)
        assert made(tmp_path, finished).manifest.digest == undisturbed
        assert len(stub.asked) == CALLS
        assert sum(stub.asked.values()) <= CALLS + IN_FLIGHT
        usage = used(tmp_path, finished)
        assert usage["requests"] + usage["cached"] == CALLS
        assert usage["requests"] == sum(stub.asked.values()) - asked == CALLS // 2


@pytest.mark.slow
def test_many_kills_at_any_time_change_nothing(
    items: Path, files: dict[str, Path], undisturbed: str, tmp_path: Path, warm_bnfctl: Callable[..., Done]
) -> None:
    dice = random.Random(5)
    with StubServer(slow(0.08), say=say) as stub:
        command = arguments(items, files["mine"], url=stub.url)
        for part in range(1, CALLS - 2 * IN_FLIGHT - 8, 8):
            count = dice.randrange(part, part + 8)
            with started(tmp_path, command) as process:
                until(partial(lambda least: len(stub.answered) >= least, count))
                time.sleep(dice.uniform(0.0, 0.08))
                kill(process)
            assert count <= len(stub.answered) < CALLS
        assert made(tmp_path, warm_bnfctl(*command)).manifest.digest == undisturbed
        assert len(stub.asked) == CALLS
        assert CALLS < sum(stub.asked.values()) <= CALLS + 6 * IN_FLIGHT


FAULTS: dict[str, Callable[[Call], bool]] = {
    "429": lambda call: call.send(429, {"error": {"message": "slow down"}}, Retry_After="1"),
    "500": lambda call: call.send(500, b"<html>oops</html>"),
    "dropped": Call.drop,
    "cut off in the middle": lambda call: call.send(
        200, b'{"choices": [{"message": {"content": "My final verdict is [[A'
    ),
    "no verdict in an error": lambda call: call.send(200, {"error": {"message": "[[A>>B]] upstream is away"}}),
    "no message": lambda call: call.send(200, {"choices": [{"text": "[[A>>B]]"}]}),
}


def every(step: int, faults: list[Callable[[Call], bool]]) -> Fault:
    """Each step-th call of the first ones fails, by each fault in turn."""
    return lambda call: (
        call.number % step == 1 and call.number // step < len(faults) and faults[call.number // step](call)
    )


def test_a_judge_that_fails_is_asked_again_and_its_failures_are_no_verdicts(
    items: Path, files: dict[str, Path], undisturbed: str, tmp_path: Path, warm_bnfctl: Callable[..., Done]
) -> None:
    with StubServer(every(3, list(FAULTS.values())), say=say) as stub:
        finished = warm_bnfctl(*arguments(items, files["mine"], url=stub.url))
        assert made(tmp_path, finished).manifest.digest == undisturbed
        assert sum(stub.asked.values()) == CALLS + len(FAULTS)
        assert set(stub.answered.values()) == {1}
    usage = used(tmp_path, finished)
    assert (usage["requests"], usage["retries"]) == (CALLS, len(FAULTS))
    assert "429 slow down; left alone for 1.0 s" in finished.err


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAULTS, "late"])
def test_a_judge_that_only_fails_ends_the_run_which_then_goes_on(
    name: str, items: Path, files: dict[str, Path], undisturbed: str, tmp_path: Path, warm_bnfctl: Callable[..., Done]
) -> None:
    well, late = [20], lambda call: time.sleep(3.0) or False  # type: ignore[func-returns-value]
    fault = {**FAULTS, "late": late}[name]
    with StubServer(lambda call: call.number >= well[0] and fault(call), say=say) as stub:
        limits = ("--retries", 1, "--timeout", 2.0)
        failed = warm_bnfctl(*arguments(items, files["mine"], url=stub.url, more=limits))
        assert failed.code == 1
        assert failed.json["error"].startswith("no answer after ")
        assert stub.url in failed.json["where"]
        assert "the same command goes on" in failed.json["hint"]
        well[0] = 10**9
        before = sum(stub.asked.values())
        finished = warm_bnfctl(*arguments(items, files["mine"], url=stub.url, more=limits))
        assert made(tmp_path, finished).manifest.digest == undisturbed
        assert sum(stub.asked.values()) - before == CALLS - 20
        assert used(tmp_path, finished)["cached"] == 20


def test_verdicts_that_are_malformed_or_cut_off_are_null_with_a_reason(
    items: Path, files: dict[str, Path], tmp_path: Path, warm_bnfctl: Callable[..., Done]
) -> None:
    texts = {
        (0, 1): ("[[A>B]] or rather [[B>A]]", "stop"), (1, 2): ("My final verdict is [[A", "length"),
        (2, 1): ("", "stop"), (3, 2): ("[[A<B]]", "stop"), (4, 1): ("null", "stop"), (5, 1): ("\ud83d", "stop"),
    }  # fmt: skip
    reasons = {0: "labels differ", 1: "cut off, no label", 2: "no label", 3: "no such label: A<B", 4: "no label",
               5: "no label"}  # fmt: skip

    def fault(call: Call) -> bool:
        if len(call.body["messages"]) > 2:  # asked to decide
            return said_so(call, "I can't say", texts[number_and_game(call.body)][1])
        found = texts.get(number_and_game(call.body))
        return found is not None and said_so(call, *found)

    with StubServer(fault, say=say) as stub:
        finished = warm_bnfctl(*arguments(items, files["mine"], url=stub.url))
        again = warm_bnfctl(*arguments(items, files["mine"], files["other"], url=stub.url))
        bodies = list(stub.asked.values())
    rows = {row["item_id"]: json.loads(row["extra"]) for row in rows_of(made(tmp_path, finished), "arena-hard", ["item_id", "extra"])}  # fmt: skip
    for number, reason in reasons.items():
        (null,) = rows[f"q{number}"]["nulls"].values()
        assert null == reason
        assert rows[f"q{number}"]["verdicts"].count(None) == 1
    assert not any(rows[f"q{number}"]["nulls"] for number in range(6, COUNT))
    figures = made(tmp_path, finished).manifest.summary["tasks"]["arena-hard"]["models"]["mine"]
    assert figures["null_share"] == pytest.approx(6 / CALLS)
    assert made(tmp_path, again).manifest.summary["tasks"]["arena-hard"]["models"]["mine"]["mean"] == figures["mean"]
    assert set(bodies) == {1}  # an answer without a verdict is an answer, and not asked again


def test_two_runs_at_once_pay_for_each_question_once(
    items: Path, files: dict[str, Path], undisturbed: str, tmp_path: Path
) -> None:
    def fault(call: Call) -> bool:
        until(lambda: stub.busiest > IN_FLIGHT)  # both are there
        return False

    with (
        StubServer(fault, say=say) as stub,
        started(tmp_path, arguments(items, files["mine"], url=stub.url)) as one,
        started(tmp_path, arguments(items, files["mine"], files["other"], url=stub.url)) as two,
    ):
        first, second = done(one), done(two)
        assert len(stub.asked) == 2 * CALLS
        assert set(stub.asked.values()) == {1}
    assert made(tmp_path, first).manifest.digest == undisturbed
    alone, both = used(tmp_path, first), used(tmp_path, second)
    assert alone["requests"] + alone["cached"] == CALLS
    assert both["requests"] + both["cached"] == alone["requests"] + both["requests"] == 2 * CALLS


@pytest.mark.slow
def test_the_other_run_goes_on_when_one_is_killed(items: Path, files: dict[str, Path], tmp_path: Path) -> None:
    gate = Gate(10)
    with (
        StubServer(gate, say=say) as stub,
        started(tmp_path, arguments(items, files["mine"], files["other"], url=stub.url)) as one,
    ):
        until(lambda: sum(stub.asked.values()) == 10 + IN_FLIGHT)
        asked = set(stub.asked)
        with started(tmp_path, arguments(items, files["mine"], url=stub.url)) as two:
            until(lambda: stub.busiest == 2 * IN_FLIGHT)  # all that the first one asks, and as many others
            assert len(stub.asked) == sum(stub.asked.values())
            kill(one)
            gate.open.set()
            finished = done(two)
        twice = {body for body, count in stub.asked.items() if count > 1}
        assert twice <= asked
        assert 0 < len(twice) == sum(stub.asked.values()) - len(stub.asked) <= IN_FLIGHT
    assert made(tmp_path, finished).manifest.summary["tasks"]["arena-hard"]["models"]["mine"]["n"] == COUNT


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_answers(
    items: Path, files: dict[str, Path], undisturbed: str, tmp_path: Path, warm_bnfctl: Callable[..., Done]
) -> None:
    gate = Gate(10)
    with StubServer(gate, say=say) as stub:
        command = arguments(items, files["mine"], url=stub.url)
        with started(tmp_path, command) as process:
            until(lambda: sum(stub.asked.values()) == 10 + IN_FLIGHT)
            process.send_signal(signal.SIGINT)
            assert done(process).code == 130
        gate.open.set()
        assert made(tmp_path, warm_bnfctl(*command)).manifest.digest == undisturbed
        assert sum(stub.asked.values()) == CALLS + IN_FLIGHT


def test_more_calls_go_on_where_fewer_stopped(
    items: Path, files: dict[str, Path], undisturbed: str, tmp_path: Path, warm_bnfctl: Callable[..., Done]
) -> None:
    with StubServer(say=say) as stub:
        for calls in (7, 20):
            stopped = warm_bnfctl(*arguments(items, files["mine"], url=stub.url, more=("--max-calls", calls)))
            assert stopped.code == 1
            assert stopped.json["where"] == "--max-calls"
            assert stopped.json["error"].startswith(f"{calls} calls were made")
        assert sum(stub.asked.values()) == 27
        finished = warm_bnfctl(*arguments(items, files["mine"], url=stub.url, more=("--max-calls", CALLS - 27)))
        assert made(tmp_path, finished).manifest.digest == undisturbed
        assert set(stub.asked.values()) == {1}
        assert used(tmp_path, finished)["requests"] == CALLS - 27


def test_damaged_answers_are_asked_again_and_no_others(
    items: Path, files: dict[str, Path], undisturbed: str, tmp_path: Path, warm_bnfctl: Callable[..., Done]
) -> None:
    with StubServer(say=say) as stub:
        command = arguments(items, files["mine"], url=stub.url)
        warm_bnfctl(*command, "--max-calls", CALLS - 10)
        path = answers_file(Store(tmp_path / "artifacts"))
        with closing(sqlite3.connect(path)) as file, file:
            file.execute("UPDATE answers SET answer = substr(answer, 1, 40) WHERE rowid % 20 = 1")
        content = path.read_bytes()
        path.write_bytes(bytes(100) + content[100:])  # the header
        finished = warm_bnfctl(*command)
        assert made(tmp_path, finished).manifest.digest == undisturbed
        assert used(tmp_path, finished)["cached"] == CALLS - 10 - 3
        assert sum(stub.asked.values()) == CALLS + 3
    assert "file is not a database); kept as judges.sqlite-damaged-1, 47 answers recovered" in finished.err
    assert path.with_name("judges.sqlite-damaged-1").read_bytes()[100:] == content[100:]


FULL = """
import json, subprocess, sys
from tests.small_disk import grow
disk, *command = sys.argv[1:]
ends = []
for more in (False, True):
    if more:
        grow(disk, "96m")
    end = subprocess.run([sys.executable, "-m", "bnfctl", *command], capture_output=True, text=True)
    ends.append([end.returncode, json.loads(end.stdout), end.stderr])
print(json.dumps(ends))
"""


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_the_command_goes_on_when_there_is_room(
    items: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    def long(body: dict[str, Any], child: int) -> str:
        return random.Random(json.dumps(body)).randbytes(20000).hex() + say(body, child)

    disk = tmp_path / "artifacts"
    with StubServer(slow(0.02), say=long) as stub:
        command = arguments(items, files["mine"], files["other"], url=stub.url)
        ends = on_small_disk(disk, "33400k", FULL, str(disk), *command, env=environment(tmp_path, None))
        (code, document, errors), (code_again, document_again, _) = ends
        assert code == 1, errors
        assert "the disk is full; all answers so far are kept" in document["error"]
        assert document["where"] == str(answers_file(Store(tmp_path / "artifacts")))
        assert (code_again, document_again["summary"]["tasks"]["arena-hard"]["models"]["mine"]["n"]) == (0, COUNT)
        assert len(stub.asked) == 2 * CALLS
        assert set(stub.asked.values()) == {1}


def kept(store: Store) -> int:
    """How many answers are on the disk."""
    with closing(sqlite3.connect(f"file:{answers_file(store)}?mode=ro", uri=True)) as file:
        return int(file.execute("SELECT count(*) FROM answers").fetchone()[0])


def test_a_refusal_of_all_leaves_nothing_behind(items: Path, files: dict[str, Path], store: Store) -> None:
    refuse = [True]

    def fault(call: Call) -> bool:
        if not refuse[0] or call.number <= 8:
            return False
        until(lambda: kept(store) == 9, what="the first nine were not kept")
        call.send(400, {"message": "no such parameter"})
        return True

    with StubServer(fault, say=say) as stub:
        config = EvalConfig(
            tasks=("arena-hard",), responses=(str(files["mine"]),), data_dir=str(items), server=(stub.url,)
        )
        with pytest.raises(BnfctlError, match="no such parameter") as caught:
            run(config, store)
        refuse[0] = False
        made = run(config, store)  # in the process that still has the error, and with it all that it came from
        assert made.manifest.provenance["usage"]["requests"] == CALLS - 9
        assert set(stub.answered.values()) == {1}
    assert "the judge refuses item q" in caught.value.what
