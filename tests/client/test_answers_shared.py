"""Processes that use one file of answers at once: nothing is asked twice, whoever ends in the middle, and however."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bnfctl.client.answers import Answers
from tests.client.asking import Asking, asks, expected, question
from tests.stub_server import Call, Fault, StubServer, slow


def until(reached: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


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
    file = tmp_path / "answers"
    with (
        StubServer(slow(0.05)) as stub,
        Asking(stub.url, file, range(200)) as one,
        Asking(stub.url, file, range(200)) as two,
    ):
        for _ in range(40):
            one.line()
        one.process.send_signal(signal.SIGKILL)
        said, usage, _ = two.end()
        assert said == expected(range(200))
        assert usage["error"] is None
        assert len(stub.asked) == 200
        assert sum(stub.asked.values()) <= 200 + 8
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
    def fail(call: Call) -> bool:
        time.sleep(2.0)
        return call.send(500, {})

    file = tmp_path / "answers"
    with StubServer(fail) as bad, StubServer() as good, Asking(bad.url, file, range(8), retries=0) as one:
        until(lambda: len(bad.asked) == 8)
        with Asking(good.url, file, range(8)) as two:
            assert two.end()[0] == expected(range(8))
        assert "no answer after 1 try" in one.end()[1]["error"]


def test_calls_of_the_other_run_don_t_count(tmp_path: Path) -> None:
    file = tmp_path / "answers"
    with StubServer(slow(2.0)) as lazy, StubServer() as stub, Asking(lazy.url, file, range(5)) as one:
        until(lambda: len(lazy.asked) == 5)
        with Asking(stub.url, file, range(8), max_calls=3) as two:
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
