"""Asking a judge: faults, kills, limits, fingerprints, and what a request is made of."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bnfctl.client.served import Served
from bnfctl.errors import BnfctlError
from bnfctl.tasks.imports import Answered
from bnfctl.tasks.judging import (
    Fingerprint,
    Judge,
    Judged,
    Question,
    differing,
    elsewhere,
    estimate,
    fingerprint,
    judge,
    plain,
    tokens_of,
)
from tests.conftest import REPOSITORY
from tests.stub_server import Call, StubServer, slow
from tests.tasks.judged_world import (
    WHO,
    arena,
    by_length,
    client,
    hand_count,
    judge_all,
    mine,
    responses,
    said_so,
)

FAULTS = {
    "429": lambda call: call.send(429, {"error": {"message": "slow down"}}, Retry_After="0.02"),
    "500": lambda call: call.send(500, b"oops"),
    "dropped": Call.drop,
    "slow": slow(1.2),
    "malformed": lambda call: call.send(200, b'{"choices": [{"mess'),
    "no text": lambda call: call.send(200, {"choices": [{"message": {"content": 3}}]}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_never_become_verdicts(name: str, tmp_path: Path) -> None:
    task = arena(tmp_path, 6)
    with StubServer(lambda call: call.number in (1, 4) and FAULTS[name](call), say=by_length) as stub:
        rows = judge_all(task, responses(task), stub.url, timeout=0.6)
        assert max(stub.asked.values()) >= 2 and len(stub.asked) == 12
    assert not any(row.extra["nulls"] for row in rows)
    assert task.aggregate(rows)["models"]["mine"]["win_rate"]["mean"] == pytest.approx(
        hand_count([mine(n) for n in range(6)])
    )


def test_a_judge_that_stays_broken_ends_the_run_and_keeps_what_was_paid_for(tmp_path: Path) -> None:
    task = arena(tmp_path, 8)
    with StubServer(lambda call: call.number >= 6 and call.send(500, b""), say=by_length) as stub:
        with pytest.raises(BnfctlError, match="no answer after"):
            judge_all(task, responses(task), stub.url, tmp_path / "answers", retries=1)
        paid = set(stub.answered)
        stub.fault = None
        stub.asked.clear()
        rows = judge_all(task, responses(task), stub.url, tmp_path / "answers")
        assert len(paid) == 6 and not paid & set(stub.asked) and len(stub.asked) == 16 - 6
    assert task.aggregate(rows)["models"]["mine"]["win_rate"]["mean"] == pytest.approx(
        hand_count([mine(n) for n in range(8)])
    )


SCRIPT = """
import sys
from pathlib import Path
from tests.tasks.judged_world import arena, judge_all, responses
task = arena(Path(sys.argv[1]), 40)
judge_all(task, responses(task), sys.argv[2], Path(sys.argv[1]) / "answers")
"""


def test_a_killed_run_asks_nothing_twice_that_was_kept(tmp_path: Path) -> None:
    """kill -9 in the middle: what the file holds is not asked again, and no more than that."""
    with StubServer(slow(0.02), say=by_length) as stub:
        child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), stub.url], cwd=REPOSITORY)
        try:
            deadline = time.monotonic() + 60
            while sum(stub.answered.values()) < 20:
                assert child.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        time.sleep(0.2)  # calls that the stub still works on
        before = sum(stub.asked.values())
        assert before < 80
        with closing(sqlite3.connect(tmp_path / "answers")) as file:
            kept = file.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
        assert 20 - 4 <= kept < 80
        task = arena(tmp_path, 40)
        rows = judge_all(task, responses(task), stub.url, tmp_path / "answers")
        assert sum(stub.asked.values()) - before == 80 - kept
        assert sum(count > 1 for count in stub.asked.values()) <= 4  # in flight at the kill
        again = judge_all(task, responses(task), stub.url, tmp_path / "answers")
        assert sum(stub.asked.values()) - before == 80 - kept
    assert task.aggregate(rows) == task.aggregate(again)
    assert task.aggregate(rows)["models"]["mine"]["win_rate"]["mean"] == pytest.approx(
        hand_count([mine(n) for n in range(40)])
    )


def test_a_follow_up_is_not_asked_twice_either(tmp_path: Path) -> None:
    task = arena(tmp_path, 3)
    say = lambda body, child: "[[A=B]]" if len(body["messages"]) > 2 else "hm"  # noqa: E731
    with StubServer(say=say) as stub:
        judge_all(task, responses(task), stub.url, tmp_path / "answers")
        assert sum(stub.asked.values()) == 12
        rows = judge_all(task, responses(task), stub.url, tmp_path / "answers")
        assert sum(stub.asked.values()) == 12
    assert [row.extra["verdicts"] for row in rows] == [["A=B", "A=B"]] * 3


def test_a_changed_response_is_judged_anew_and_only_that(tmp_path: Path) -> None:
    task = arena(tmp_path, 5)
    answered = responses(task)
    with StubServer(say=by_length) as stub:
        judge_all(task, answered, stub.url, tmp_path / "answers")
        changed = [*answered[:4], Answered(answered[4].item, "mine 4 other", "mine", "")]
        judge_all(task, changed, stub.url, tmp_path / "answers")
        renamed = [Answered(one.item, one.response, "another name", "") for one in answered]
        judge_all(task, renamed, stub.url, tmp_path / "answers")
        assert sum(stub.asked.values()) == 12


def test_responses_are_pulled_as_there_is_room_and_rows_come_early(tmp_path: Path) -> None:
    task = arena(tmp_path, 60)
    pulled = 0

    def source() -> Any:
        nonlocal pulled
        for one in responses(task):
            pulled += 1
            yield one

    with StubServer(say=by_length) as stub:
        rows = judge(task, source(), client(stub.url), WHO)
        first = next(rows)
        assert isinstance(first, Judged) and pulled <= 2 * 4 + 2
        assert len(list(rows)) == 59


def test_a_limit_of_calls_counts_new_ones_only(tmp_path: Path) -> None:
    task = arena(tmp_path, 10)
    with StubServer(say=by_length) as stub:
        for total in (7, 14):
            with pytest.raises(BnfctlError, match="7 calls were made") as error:
                judge_all(task, responses(task), stub.url, tmp_path / "answers", max_calls=7)
            assert error.value.where == "--max-calls" and sum(stub.asked.values()) == total
        assert len(judge_all(task, responses(task), stub.url, tmp_path / "answers", max_calls=6)) == 10
        assert len(judge_all(task, responses(task), stub.url, tmp_path / "answers", max_calls=0)) == 10
        assert sum(stub.asked.values()) == 20


@pytest.mark.parametrize(
    "message", ["This model's maximum context length is 9 tokens", "blocked by our content management policy"]
)
def test_a_text_that_the_judge_will_not_take_is_a_null_and_asked_again_the_next_time(
    message: str, tmp_path: Path
) -> None:
    task = arena(tmp_path, 3)
    fault = lambda call: "theirs 1" in str(call.body) and call.send(400, {"error": {"message": message}})  # noqa: E731
    with StubServer(fault, say=by_length) as stub:
        rows = judge_all(task, responses(task), stub.url, tmp_path / "answers")
        assert rows[1].value is None and message in rows[1].extra["nulls"]["game1"]
        assert task.aggregate(rows)["models"]["mine"]["null_share"] == pytest.approx(1 / 3)
        stub.fault = None
        rows = judge_all(task, responses(task), stub.url, tmp_path / "answers")
        assert rows[1].value is not None and sum(stub.asked.values()) == 8


def test_a_refusal_of_the_request_itself_is_an_error(tmp_path: Path) -> None:
    task = arena(tmp_path, 3)
    fault = lambda call: call.send(400, {"error": {"message": "unsupported parameter: temperature"}})  # noqa: E731
    with StubServer(fault) as stub, pytest.raises(BnfctlError, match=r"refuses item q\d: 400 unsupported parameter"):
        judge_all(task, responses(task), stub.url)


def test_what_a_request_is_made_of() -> None:
    question = Question("score", ({"role": "user", "content": "half \ud83d an emoji"},), 1024, as_json=True)
    body = Judge("gpt").body(question)
    assert body == {
        "model": "gpt", "messages": [{"role": "user", "content": "half ? an emoji"}], "temperature": 0.0,
        "max_tokens": 1024, "response_format": {"type": "json_object"},
    }  # fmt: skip
    modern = Judge("gpt", temperature=None, max_tokens=9000, token_field="max_completion_tokens", json_mode=False)
    assert modern.body(question) == {
        "model": "gpt", "messages": body["messages"], "max_completion_tokens": 9000,
    }  # fmt: skip
    local = Judge.of(Served("org/judge", True, 8192, "server org/judge, vllm 1.2"), max_tokens=50).body(question)
    assert local["top_k"] == 0 and local["max_tokens"] == 50 and local["model"] == "org/judge"


def test_a_question_is_named_by_its_content() -> None:
    turns = ({"role": "user", "content": "x"},)
    first, second = Question("game1", turns, 10), Question("game2", turns, 10)
    assert first.id == second.id and len(first.id) <= 64  # one call
    assert first.id != Question("game1", turns, 11).id


def test_the_estimate_is_what_is_asked(tmp_path: Path) -> None:
    task = arena(tmp_path, 5)
    found = estimate(task, responses(task))
    with StubServer(say=by_length) as stub:
        judge_all(task, responses(task), stub.url)
        asked = sum(len(turn["content"]) for body in stub.bodies for turn in body["messages"])
    assert found == {"calls": 10, "prompt_tokens": asked // 4, "response_tokens_at_most": 10 * 4096}


def run(folder: Path, said_name: str, who: Judge = WHO, **options: Any) -> Fingerprint:
    task = arena(folder, 2, **options)
    fault = lambda call: said_so(call, "[[A>B]]", model=said_name, system_fingerprint=f"fp{call.number}")  # noqa: E731
    with StubServer(fault) as stub:
        rows = list(judge(task, responses(task), client(stub.url), who))
    return fingerprint(task, who, rows)


def test_fingerprints_tell_judges_apart(tmp_path: Path) -> None:
    first = run(tmp_path, "judge-2026-01-01")
    assert first.answered_as == ("judge-2026-01-01",) and len(first.systems) == 4 and first.server == "server stub"
    assert run(tmp_path, "judge-2026-01-01").digest == first.digest
    (tmp_path / "p.txt").write_text("{prompt}{response_a}{response_b}", encoding="utf-8")
    others = {
        "snapshot": run(tmp_path, "judge-2026-02-02"),
        "parameters": run(tmp_path, "judge-2026-01-01", Judge.of(Served("stub", False, None, "server stub"), temperature=0.5)),
        "server": run(tmp_path, "judge-2026-01-01", Judge("stub", "server stub, vllm 2")),
        "name": run(tmp_path, "judge-2026-01-01", Judge("other", "server stub")),
        "prompt": run(tmp_path, "judge-2026-01-01", judge_prompt=tmp_path / "p.txt"),
        "generation": run(tmp_path, "judge-2026-01-01", generation="2025"),
    }  # fmt: skip
    digests = {one.digest for one in (first, *others.values())}
    assert len(digests) == 7
    for name, one in others.items():
        lines = differing({"first": first.as_dict(), name: one.as_dict()})
        assert "do not compare" in lines[0] and any(f"({name})" in line for line in lines[1:])
    assert differing({"a": first.as_dict(), "b": run(tmp_path, "judge-2026-01-01").as_dict()}) == []
    json.dumps(first.as_dict())


def test_judges_that_are_not_known_are_said(tmp_path: Path) -> None:
    unknown = elsewhere(arena(tmp_path), [""]).as_dict()
    assert differing({"a": unknown}) == []
    assert differing({"a": unknown, "b": unknown}) == ["the judge of a, b is not known: these figures may not compare"]
    assert elsewhere(arena(tmp_path), ["x", "x"]).served_model == "x"


def test_figures_are_json() -> None:
    found = plain({"a": (float("nan"), 1.0), "b": Question("x", (), 1), 3: float("inf")})
    assert found["a"] == [None, 1.0] and found["b"]["part"] == "x" and found["3"] is None
    json.dumps(found, allow_nan=False)


def test_tokens_are_a_unit_of_length() -> None:
    class Words:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [1] * (add_special_tokens + len(text.split()))

    unit = tokens_of(Words(), "org/model")
    assert unit.name == "tokens of org/model" and unit.count("a b c") == 3
