"""The client against a stub: every kind of fault, and nothing asked twice that was answered."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfctl.client.answers import Answers
from bnfctl.client.endpoint import Client
from bnfctl.client.requests import CHAT, Known, MalformedError, Request, read_chat, read_completion
from bnfctl.client.served import served
from bnfctl.client.servers import Backoff, api_key, check_urls
from bnfctl.errors import BnfctlError, Interrupted, UsageError
from tests.conftest import REPOSITORY
from tests.stub_server import Call, Fault, StubServer, slow, text_of

QUICK = Backoff(0.01, 0.05)


def client(*stubs: StubServer | str, **changes: Any) -> Client:
    urls = [stub if isinstance(stub, str) else stub.url for stub in stubs]
    given: dict[str, Any] = {
        "concurrency": 4, "timeout": 5.0, "retries": 3, "api_key_env": "OPENAI_API_KEY", "answers": None,
        "backoff": QUICK,
    }  # fmt: skip
    return Client(urls, **{**given, **changes})


def request(number: int, **changes: Any) -> Request:
    body = {"model": "stub", "messages": [{"role": "user", "content": f"say {number}"}], "seed": number}
    return Request(number, CHAT, body, read_chat, **changes)


def ask(asking: Client, numbers: range) -> dict[int, str]:
    return {tag: answer["choices"][0]["text"] for tag, answer in asking.ask(map(request, numbers))}


def expected(numbers: range) -> dict[int, str]:
    return {number: text_of(request(number).body, 0) for number in numbers}


def once(*numbers: int, do: Callable[[Call], bool]) -> Fault:
    """A fault of the first tries, by their number in order of arrival."""
    return lambda call: call.number in numbers and do(call)


def closed_port() -> str:
    with StubServer() as gone:
        return gone.url


FAULTS: dict[str, Callable[[Call], bool]] = {
    "429": lambda call: call.send(429, {"error": {"message": "slow down"}}, Retry_After="0.05"),
    "503": lambda call: call.send(503, b"", Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    "500": lambda call: call.send(500, b"<html>oops</html>"),
    "408": lambda call: call.send(408, {}),
    "dropped": Call.drop,
    "slow": lambda call: time.sleep(1.6) or False,  # type: ignore[func-returns-value]
    "not json": lambda call: call.send(200, b'{"choices": [{"mess'),
    "a list": lambda call: call.send(200, []),
    "no choices": lambda call: call.send(200, {"choices": []}),
    "error inside": lambda call: call.send(200, {"error": {"message": "upstream is away"}}),
    "no message": lambda call: call.send(200, {"choices": [{"text": "x"}]}),
    "wrong content": lambda call: call.send(200, {"choices": [{"message": {"content": 3}}]}),
    "not finished": lambda call: call.send(200, {"choices": [{"message": {"content": "x"}, "finish_reason": "abort"}]}),
    "choices of text": lambda call: call.send(200, {"choices": ["x"]}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_tried_again(name: str) -> None:
    with StubServer(once(0, 2, do=FAULTS[name])) as stub:
        asking = client(stub, timeout=1.0 if name == "slow" else 30.0)
        assert ask(asking, range(6)) == expected(range(6))
        assert asking.usage == {
            "requests": 6, "cached": 0, "retries": 2, "prompt_tokens": 42, "completion_tokens": 18,
        }  # fmt: skip
        assert sum(stub.asked.values()) == 8
        if name != "slow":  # there the stub answers, but nobody listens any more
            assert set(stub.answered.values()) == {1}


def test_retry_after_is_waited_for() -> None:
    fault = once(0, do=lambda call: call.send(429, {}, Retry_After="1"))
    with StubServer(fault) as stub:
        asking = client(stub)
        started = time.monotonic()
        assert ask(asking, range(1)) == expected(range(1))
        assert 1.0 <= time.monotonic() - started < 5.0


@pytest.mark.parametrize("name", ["500", "dropped", "slow", "no choices", "429"])
def test_the_last_retry_is_an_error_with_the_reason(name: str) -> None:
    with StubServer(FAULTS[name]) as stub:
        asking = client(stub, timeout=1.0 if name == "slow" else 30.0, retries=2)
        with pytest.raises(BnfctlError, match="no answer after 3 tries") as caught:
            ask(asking, range(1))
        assert caught.value.exit_code == 1
        assert stub.url in str(caught.value.where)
        assert sum(stub.asked.values()) == 3


def test_a_dead_server_ends_the_run_after_the_retries_not_after_all_requests(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asking = client(closed_port(), concurrency=50)
    started = time.monotonic()
    with pytest.raises(BnfctlError, match="no answer after"):
        ask(asking, range(1000))
    assert time.monotonic() - started < 10
    assert capsys.readouterr().err.count("left alone") == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_an_error_at_once(status: int) -> None:
    with StubServer(lambda call: call.send(status, {"error": {"message": "no such thing"}})) as stub:
        with pytest.raises(BnfctlError, match=f"{status} no such thing") as caught:
            ask(client(stub), range(1))
        assert stub.url in str(caught.value.where)
        assert sum(stub.asked.values()) == 1


def test_a_refusal_that_may_be_is_an_answer_but_never_kept(tmp_path: Path) -> None:
    refuse = [True]
    fault: Fault = lambda call: refuse[0] and call.send(400, {"message": "too long"})  # noqa: E731
    with StubServer(fault) as stub:
        asking = client(stub, answers=tmp_path / "a")
        assert list(asking.ask([request(0, may_refuse=True)])) == [(0, {"refused": "400 too long"})]
        refuse[0] = False
        assert ask(asking, range(1)) == expected(range(1))


def test_a_redirect_is_not_followed() -> None:
    with StubServer(lambda call: call.send(307, b"", Location="http://elsewhere/v1")) as stub:
        asking = client(stub)
        with pytest.raises(BnfctlError, match="elsewhere"):
            ask(asking, range(1))


def test_the_least_busy_server_gets_the_next_request_and_a_dead_one_none() -> None:
    with StubServer(slow(0.1)) as one, StubServer(slow(0.01)) as two:
        asking = client(closed_port(), one, two, concurrency=6)
        assert ask(asking, range(60)) == expected(range(60))
        assert 0 < sum(one.asked.values()) < sum(two.asked.values())
        assert sum(one.answered.values()) + sum(two.answered.values()) == 60


def test_concurrency_is_bounded_and_reached() -> None:
    with StubServer(slow(0.03)) as stub:
        asking = client(stub, concurrency=5)
        assert ask(asking, range(40)) == expected(range(40))
        assert stub.busiest == 5


def test_a_server_that_takes_few_at_a_time_is_not_overrun() -> None:
    lock, inside = threading.Lock(), [0]

    def fault(call: Call) -> bool:
        with lock:
            inside[0] += 1
            full = inside[0] > 2
        try:
            if not full:
                time.sleep(0.01)
            return full and call.send(429, {})
        finally:
            with lock:
                inside[0] -= 1

    with StubServer(fault) as stub:
        asking = client(stub, concurrency=16, retries=3)
        assert ask(asking, range(80)) == expected(range(80))
        assert sum(stub.asked.values()) < 160


def test_requests_are_pulled_lazily_and_may_depend_on_answers() -> None:
    pulled, answered = [0], list[int]()

    def numbers() -> Iterator[Request | Known | None]:
        for number in range(30):
            pulled[0] += 1
            yield request(number)
        while 5 not in answered:
            yield None
        yield request(100)
        while len(answered) < 31:
            yield None
        yield Known("last", {"choices": []})

    with StubServer() as stub:
        asking = client(stub, concurrency=3)
        for tag, _ in asking.ask(numbers()):
            if not answered:
                assert pulled[0] <= 2 * 3 + 1
            answered.append(tag)
        assert sorted(answered[:-1]) == [*range(30), 100]
        assert answered[-1] == "last"
        assert set(stub.asked.values()) == {1}


def test_two_equal_requests_are_one(tmp_path: Path) -> None:
    with StubServer(slow(0.05)) as stub:
        asking = client(stub, answers=tmp_path / "a")
        made = [Request(tag, CHAT, request(0).body, read_chat) for tag in "abc"]
        assert sorted(tag for tag, _ in asking.ask(made)) == ["a", "b", "c"]
        assert [tag for tag, _ in asking.ask(made)] == ["a", "b", "c"]
        assert sum(stub.asked.values()) == 1


def test_a_later_client_with_other_servers_asks_nothing_again(tmp_path: Path) -> None:
    with StubServer() as one:
        asking = client(one, answers=tmp_path / "a")
        ask(asking, range(10))
    with StubServer() as two:
        asking = client(two, answers=tmp_path / "a", concurrency=1)
        assert ask(asking, range(15)) == expected(range(15))
        assert sum(two.asked.values()) == 5
        assert asking.usage["cached"] == 10
        assert asking.usage["prompt_tokens"] == 15 * 7


def test_a_stop_is_quick_and_keeps_what_was_answered(
    tmp_path: Path, stop_signal: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    hang: Fault = lambda call: call.number >= 5 and (time.sleep(6) or False)  # type: ignore[func-returns-value]  # noqa: E731
    got = []
    with StubServer(hang) as stub:
        asking = client(stub, answers=tmp_path / "a")
        stopped = 0.0

        def work() -> None:
            nonlocal stopped
            for tag, _ in asking.ask(map(request, range(50))):
                got.append(tag)
                if len(got) == 5:
                    stop_signal(signal.SIGINT)
                    stopped = time.monotonic()

        with pytest.raises(Interrupted):
            work()
        assert time.monotonic() - stopped < 2.0
    kept = Answers(tmp_path / "a")
    assert [number for number in range(50) if kept.get(request(number).key)] == sorted(got)


CHILD = """
import pathlib, sys
from tests.client.asking import asks, question
for tag, _ in asks(sys.argv[2], pathlib.Path(sys.argv[1])).ask(map(question, range(200))):
    print(tag, flush=True)
"""


def test_what_a_killed_process_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "answers"
    with StubServer(slow(0.02)) as one:
        command = [sys.executable, "-c", CHILD, str(file), one.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as child:
            assert child.stdout is not None
            used = [int(child.stdout.readline()) for _ in range(60)]
            os.kill(child.pid, signal.SIGKILL)
            used += [int(line) for line in child.stdout.read().split()]
        asked = {json.loads(body)["seed"] for body in one.asked}
    with StubServer() as two, StubServer() as three:
        asking = client(two, three, answers=file, concurrency=3)
        assert ask(asking, range(200)) == expected(range(200))
        again = {json.loads(body)["seed"] for stub in (two, three) for body in stub.asked}
    assert not again & set(used)
    assert len(again & asked) <= 8  # in flight at the kill
    assert len(used) >= 60


def test_a_kill_around_a_commit_loses_no_committed_answer(tmp_path: Path) -> None:
    for step in (1, 2, 5, 6):  # before and after the first and third group
        file = tmp_path / f"answers{step}"
        with StubServer() as stub:
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(file), stub.url], capture_output=True, text=True, cwd=REPOSITORY,
                env={**os.environ, "BNFCTL_FAULT_AT": str(step)}, check=False,
            )  # fmt: skip
            assert done.returncode == -signal.SIGKILL
            used = [int(line) for line in done.stdout.split()]
            kept = Answers(file)
            assert all(kept.get(request(number).key) for number in used)
            assert (step > 1) == any(kept.get(request(number).key) for number in range(200))
            kept.close()


def test_the_key_is_sent_but_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with StubServer(key="sk-secret") as stub:
        asking = client(stub, api_key_env="MY_KEY", answers=tmp_path / "a")
        assert ask(asking, range(1)) == expected(range(1))
    monkeypatch.setenv("MY_KEY", "sk-wrong")
    with StubServer(key="sk-secret") as stub:
        asking = client(stub, api_key_env="MY_KEY")
        with pytest.raises(BnfctlError, match=r"401 wrong key Bearer \[key\]") as caught:
            ask(asking, range(1))
        assert "sk-wrong" not in json.dumps(caught.value.as_dict())
    assert b"sk-" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_a_key_that_cannot_be_used_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert api_key("OPENAI_API_KEY") is None
    for name, value in [("sk-live-1234", None), ("MY_KEY", None), ("MY_KEY", "a\nb"), ("MY_KEY", "schlüssel")]:
        if value is not None:
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError) as caught:
            api_key(name)
        assert "sk-live" not in json.dumps(caught.value.as_dict())
        assert value is None or value not in json.dumps(caught.value.as_dict(), ensure_ascii=False)


@pytest.mark.parametrize("url", ["", "host:8000", "ftp://host/v1", "http://", "http://host:x/v1", "http://u:secret@host/v1",
                                 "http://host/v1?key=secret"])  # fmt: skip
def test_a_url_that_cannot_be_used_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_urls([url])
    assert "secret" not in json.dumps(caught.value.as_dict())


def test_base_urls_need_no_slash() -> None:
    assert check_urls(["http://host:1/v1/", "https://host/v1"]) == ("http://host:1/v1", "https://host/v1")
    with pytest.raises(UsageError, match="which server"):
        check_urls([])


def test_the_served_model() -> None:
    with StubServer(models=("a",), owner="vllm") as one, StubServer(models=("b", "a")) as two:
        asking = client(one)
        assert (served(asking, None).name, served(asking, None).vllm) == ("a", True)
        with pytest.raises(UsageError, match="no model 'c'") as caught:
            served(asking, "c")
        assert caught.value.hint == "--served-model a"
        asking = client(one, two)
        assert (served(asking, None).name, served(asking, None).vllm) == ("a", False)
        asking = client(two)
        with pytest.raises(UsageError, match="which model") as caught:
            served(asking, None)
        assert "b, a" in caught.value.what
        assert served(asking, "b").version == "server b"


def test_a_server_that_is_away_at_the_start_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    gone = closed_port()
    with StubServer() as stub:
        asking = client(gone, stub)
        assert served(asking, None).name == "stub"
        assert gone in capsys.readouterr().err
    with pytest.raises(BnfctlError) as caught:
        served(client(gone), None)
    assert caught.value.where == f"{gone}/models"


def test_answers_that_cannot_be_kept_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(answers: Answers, items: Any) -> None:
        raise BnfctlError("cannot keep them")

    monkeypatch.setattr(Answers, "put", put)
    with StubServer() as stub, pytest.raises(BnfctlError, match="cannot keep them"):
        ask(client(stub, answers=tmp_path / "a"), range(30))


def test_a_proxy_of_the_environment_is_not_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", closed_port())
    monkeypatch.setenv("ALL_PROXY", closed_port())
    with StubServer() as stub:
        assert ask(client(stub), range(2)) == expected(range(2))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["choices", "message", "content", "text", "token_ids", "index", "finish_reason", "usage", "prompt_tokens",
             "error", "reasoning_content"]
        ), inner, max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(answer=st.dictionaries(st.sampled_from(["choices", "usage", "error"]), JSON), choices=st.lists(JSON, max_size=3))
def test_any_answer_is_read_or_malformed(answer: dict[str, Any], choices: list[Any]) -> None:
    for read in (read_chat, read_completion):
        for given_ in (answer, {**answer, "choices": choices}):
            try:
                kept = read(given_)
            except MalformedError:
                continue
            json.dumps(kept, ensure_ascii=False).encode()
            assert kept["choices"]
            assert all(isinstance(choice.get("text", ""), str) for choice in kept["choices"])


def test_reasoning_that_was_split_off_goes_back_in_front() -> None:
    def text(**message: Any) -> str:
        made: str = read_chat({"choices": [{"message": message}]})["choices"][0]["text"]
        return made

    assert text(content="4", reasoning_content="\n2+2\n") == "<think>\n2+2\n</think>4"
    assert text(content=None, reasoning="cut here") == "<think>cut here"
    assert text(content=None) == ""
    assert text(content="half an emoji \ud83d") == "half an emoji ?"
