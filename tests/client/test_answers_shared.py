"""Processes that use one file of answers at once: nothing is asked twice, whoever ends in the middle, and however."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bnfctl.client.answers import Answers
from tests.client.asking import Asking, asks, expected, question
from tests.processes import kill, until
from tests.stub_server import Call, Fault, Gate, StubServer, slow


def both_there(stub: StubServer) -> StubServer:
    """The server, which lets the first run wait until a second one asks too."""
    then = stub.fault
    assert then is not None

    def fault(call: Call) -> bool:
        until(lambda: stub.busiest > 8)
        return then(call)

    stub.fault = fault
    return stub


@pytest.mark.parametrize("second", [range(150), range(149, -1, -1)], ids=["in step", "from the other end"])
def test_two_runs_ask_each_question_once_and_share_the_work(second: Sequence[int], tmp_path: Path) -> None:
    file, stub = tmp_path / "answers", StubServer(slow(0.02))
    with (
        both_there(stub),
        Asking(stub.url, file, range(150)) as one,
        Asking(stub.url, file, second) as two,
    ):
        ends = [one.end(), two.end()]
    assert [said for said, _, _ in ends] == [expected(range(150))] * 2
    assert set(stub.asked.values()) == {1}
    assert len(stub.asked) == 150
    usages = [usage for _, usage, _ in ends]
    assert sum(usage["requests"] for usage in usages) == sum(usage["cached"] for usage in usages) == 150
    assert all(usage["requests"] > 20 for usage in usages)  # neither was a mere reader
    assert [usage["completion_tokens"] for usage in usages] == [450, 450]


def test_what_a_killed_run_had_in_flight_is_all_that_the_other_asks_again(tmp_path: Path) -> None:
    file, gate = tmp_path / "answers", Gate(60)
    with (
        both_there(StubServer(gate)) as stub,
        Asking(stub.url, file, range(200)) as one,
        Asking(stub.url, file, range(200)) as two,
    ):
        until(lambda: sum(stub.asked.values()) == 60 + 2 * 8)
        kill(one.process)
        gate.open.set()
        said, usage, _ = two.end()
        assert said == expected(range(200))
        assert usage["error"] is None
        assert len(stub.asked) == 200
        assert sum(stub.asked.values()) == 200 + 8
        with Asking(stub.url, file, range(200)) as again:
            said, usage, _ = again.end()
        assert said == expected(range(200))
        assert (usage["requests"], usage["cached"]) == (0, 200)


def test_different_questions_are_asked_side_by_side(tmp_path: Path) -> None:
    file, stub = tmp_path / "answers", StubServer(slow(0.02))
    with (
        both_there(stub),
        Asking(stub.url, file, range(40)) as one,
        Asking(stub.url, file, range(40, 80)) as two,
    ):
        assert one.end()[0] == expected(range(40))
        assert two.end()[0] == expected(range(40, 80))
    assert set(stub.asked.values()) == {1}


def test_a_run_that_fails_leaves_its_questions_to_the_other(tmp_path: Path) -> None:
    """The first run is in this process, which goes on: its end isn't what frees the questions."""
    file, gate = tmp_path / "answers", Gate(then=lambda call: call.send(500, {}))
    with StubServer(gate) as bad, StubServer() as good, ThreadPoolExecutor() as threads:
        one = threads.submit(lambda: list(asks(bad.url, file, retries=0).ask(map(question, range(8)))))
        until(lambda: len(bad.asked) == 8)
        with Asking(good.url, file, range(9)) as two:
            assert two.line() == [8, expected([8])[8]]  # it has come to the last one, past those that `one` asks
            time.sleep(0.5)  # and has looked at those again
            assert sum(good.asked.values()) == 1
            gate.open.set()
            assert two.end()[0] == expected(range(8))
        assert "no answer after 1 try" in str(one.exception())
        assert len(good.asked) == sum(good.asked.values()) == 9


def test_what_a_run_has_read_or_may_not_ask_is_the_other_s_while_it_goes_on(tmp_path: Path) -> None:
    file, gate = tmp_path / "answers", Gate()
    with StubServer(gate) as held, StubServer() as good:
        assert len(list(asks(good.url, file).ask(map(question, range(4))))) == 4
        with Asking(held.url, file, range(7), max_calls=2) as one:
            assert dict(one.line() for _ in range(4)) == expected(range(4))
            until(lambda: len(held.asked) == 2)
            with Asking(good.url, file, [*range(4), 6]) as two:
                said, usage, _ = two.end()
            assert said == expected([*range(4), 6])
            assert (usage["requests"], usage["cached"]) == (1, 4)
            assert one.process.poll() is None
            gate.open.set()
            said, usage, _ = one.end()
        assert said == expected([4, 5])
        assert usage["error"] == "2 calls were made, as many as may be"


def test_calls_of_the_other_run_don_t_count(tmp_path: Path) -> None:
    file, gate = tmp_path / "answers", Gate()
    with StubServer(gate) as lazy, StubServer() as stub, Asking(lazy.url, file, range(5)) as one:
        until(lambda: len(lazy.asked) == 5)
        with Asking(stub.url, file, range(8), max_calls=3) as two:
            until(lambda: len(stub.asked) == 3)
            gate.open.set()
            said, usage, _ = two.end()
        assert said == expected(range(8))
        assert (usage["requests"], usage["cached"], usage["error"]) == (3, 5, None)
        assert one.end()[0] == expected(range(5))
        with Asking(stub.url, file, range(20), max_calls=4) as third:
            said, usage, _ = third.end()
        assert said == expected(range(12))
        assert usage["error"] == "4 calls were made, as many as may be"


def test_a_stop_ends_the_wait_for_another_run(tmp_path: Path) -> None:
    file = tmp_path / "answers"
    with Answers(file) as held, StubServer() as stub:
        assert held.claim(question(0).key)
        with Asking(stub.url, file, range(2)) as waits:
            assert waits.line() == [1, expected([1])[1]]
            started = time.monotonic()
            waits.process.send_signal(signal.SIGINT)
            assert waits.end()[1]["error"] == "interrupted"
            assert time.monotonic() - started < 10.0


def test_a_refusal_is_nobody_s_answer_and_holds_nobody_up(tmp_path: Path) -> None:
    fault: Fault = lambda call: call.body["seed"] == 0 and call.send(400, {"message": "too long"})  # noqa: E731
    with StubServer(fault) as stub:
        client = asks(stub.url, tmp_path / "answers")
        given = iter([question(0), question(1)])
        refused = [type(one)(one.tag, one.path, one.body, one.read, may_refuse=True) for one in given]
        asked = client.ask(refused)
        assert dict([next(asked), next(asked)])[0] == {"refused": "400 too long"}
        with Asking(stub.url, tmp_path / "answers", [0]) as other:  # while the first still has the file
            assert "too long" in other.end()[1]["error"]
        asked.close()
    assert sorted(stub.asked.values()) == [1, 2]
    assert {json.loads(body)["seed"] for body, count in stub.asked.items() if count == 2} == {0}
