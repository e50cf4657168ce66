"""Small Arena-Hard and WildBench data in the published schemas, and judges whose verdicts are known."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bnfctl.client.endpoint import Client
from bnfctl.client.served import Served
from bnfctl.client.servers import Backoff
from bnfctl.tasks.arena_hard import ArenaHard
from bnfctl.tasks.imports import Answered
from bnfctl.tasks.judging import Judge, Judged, judge
from tests.stub_server import Call

WHO = Judge.of(Served("stub", False, None, "server stub"))
_A = re.compile(r"<<< response of assistant A (\w+)\n(.*?)\n>>> response of assistant A \1", re.DOTALL)
_B = re.compile(r"<<< response of assistant B (\w+)\n(.*?)\n>>> response of assistant B \1", re.DOTALL)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def question_row(number: int, schema: int) -> dict[str, Any]:
    shared = {"category": "arena-hard-v0.1", "cluster": f"topic {number // 2}"}
    text = f"question {number}: why {{prompt}}?"
    if schema == 2024:
        return {"question_id": f"q{number}", **shared, "turns": [{"content": text}]}
    return {"uid": f"q{number}", **shared, "prompt": text}


def answer_row(number: int, text: str, model: str, schema: int) -> dict[str, Any]:
    if schema == 2024:
        turns = [{"content": text}]
        return {"question_id": f"q{number}", "answer_id": "x", "model_id": model, "tstamp": 1.5,
                "choices": [{"index": 0, "turns": turns}], "conv_metadata": {"token_len": 7}}  # fmt: skip
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": {"answer": text}}]
    return {"uid": f"q{number}", "ans_id": "x", "model": model, "messages": messages, "tstamp": 1.5, "metadata": {}}


def theirs(number: int) -> str:
    """The baseline's response: longer for odd numbers."""
    return f"theirs {number} " + "word " * (40 if number % 2 else 5)


def mine(number: int) -> str:
    return f"mine {number} " + "word " * (number % 7 * 5)


def arena_files(folder: Path, count: int, schema: int) -> Path:
    """`count` questions and the baseline's responses to them, in another order."""
    write(folder / "arena-hard-v0.1" / "question.jsonl", [question_row(n, schema) for n in range(count)])
    rows = [answer_row(n, theirs(n), "gpt-4-0314", schema) for n in reversed(range(count))]
    write(folder / "arena-hard-v0.1" / "model_answer" / "gpt-4-0314.jsonl", rows)
    return folder


def arena(folder: Path, count: int = 4, schema: int = 2025, **options: Any) -> ArenaHard:
    """The task on `count` questions."""
    return ArenaHard(arena_files(folder / f"data-{schema}-{count}", count, schema), **{"draws": 200, **options})


def responses(task: ArenaHard, model: str = "mine") -> list[Answered]:
    return [Answered(item, mine(int(item.id[1:])), model, item.where) for item in task.requests(None)]


def client(url: str, answers: Path | None = None, **changes: Any) -> Client:
    given: dict[str, Any] = {"concurrency": 4, "timeout": 5.0, "retries": 4, "api_key_env": "OPENAI_API_KEY"}
    return Client([url], **{**given, "answers": answers, "backoff": Backoff(0.01, 0.05), **changes})


def judge_all(
    task: Any, answered: Sequence[Answered], url: str, answers: Path | None = None, **changes: Any
) -> list[Judged]:
    """Judged, in the order of the responses."""
    place = {(one.model, one.item.id): n for n, one in enumerate(answered)}
    rows = list(judge(task, answered, client(url, answers, **changes), WHO))
    return sorted(rows, key=lambda row: place[row.answered.model, row.answered.item.id])


def sides(body: dict[str, Any]) -> tuple[str, str]:
    """The two responses as the judge of Arena-Hard sees them."""
    text = body["messages"][1]["content"]
    found = _A.search(text), _B.search(text)
    assert found[0] and found[1]
    return found[0][2], found[1][2]


def number_and_game(body: dict[str, Any]) -> tuple[int, int]:
    """Which question, and in which game: the baseline is A in game 1."""
    first, _ = sides(body)
    return int(first.split()[1]), 1 if first.startswith("theirs") else 2


def by_length(body: dict[str, Any], child: int) -> str:
    """The longer response wins, much where it is more than twice as long."""
    return f"I wrote my own. My final verdict is [[{length_label(*map(len, sides(body)))}]]"


def length_label(first: int, second: int) -> str:
    if first == second:
        return "A=B"
    if first > second:
        return "A>>B" if first > 2 * second else "A>B"
    return "B>>A" if second > 2 * first else "B>A"


_VOTES = {"A>>B": (0.0, 3), "A>B": (0.0, 1), "A=B": (0.5, 1), "B>A": (1.0, 1), "B>>A": (1.0, 3)}
"""Label -> what B wins, and its votes (Arena-Hard v0.1: much better counts three times)."""


def hand_count(own: Sequence[str]) -> float:
    """The win rate that `by_length` gives the responses to the first questions, without the code under test."""
    votes = []
    for number, response in enumerate(own):
        won, weight = _VOTES[length_label(len(theirs(number)), len(response))]
        lost, other_weight = _VOTES[length_label(len(response), len(theirs(number)))]
        votes += [won] * weight + [1 - lost] * other_weight
    return sum(votes) / len(votes)


def scripted(verdicts: dict[tuple[int, int], str]) -> Callable[[dict[str, Any], int], str]:
    """What is said about (question, game), and "no idea" to a follow-up."""
    return lambda body, child: "no idea" if len(body["messages"]) > 2 else verdicts[number_and_game(body)]


def said_so(call: Call, text: str, finish: str = "stop", **more: Any) -> bool:
    """Answer with this text."""
    choices = [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}]
    return call.send(200, {"choices": choices, "usage": {"prompt_tokens": 9, "completion_tokens": 2}, **more})


def wild_row(number: int, tags: Sequence[str] = ("Math",), turns: int = 1) -> dict[str, Any]:
    conversation = [
        {"role": ("user", "assistant")[n % 2], "content": f"turn {n} of {number}", "language": "English",
         "redacted": False, "toxic": False}
        for n in range(turns)
    ]  # fmt: skip
    return {
        "id": f"other-{number}", "session_id": f"s{number}", "conversation_input": conversation,
        "references": {"gpt-4": "..."}, "length": 20, "checklist": [f"Is {number} right?", "Is it clear?"],
        "intent": "?", "appropriate": "yes", "primary_tag": tags[0], "secondary_tags": list(tags[1:]),
    }  # fmt: skip
