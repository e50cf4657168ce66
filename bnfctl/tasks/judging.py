"""Judged tasks: what is asked about a response, who is asked, and how the answers become rows.

A task turns a response into questions, and the judge's raw answers into a row; both are pure, so stored answers can be
read again by another rule without a call.  `judge` does the asking:

    model = served(client, name)                                    # client/served.py
    who = Judge.of(model, temperature=0.0)
    for row in judge(task, answered, client, who):                  # streamed, in order of completion
        ...                                                         # row.answers is what to store
    figures = {**task.aggregate(rows), "judge": fingerprint(task, who, rows).as_dict()}

Nothing is asked twice: the client keeps each answer before it hands it out, under a key of the whole request.  Errors
are tried again and never become verdicts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from bnfctl.client.endpoint import Client
from bnfctl.client.requests import (
    CHAT,
    LIMIT_NAMES,
    VLLM_NEUTRAL,
    Known,
    Request,
    about_content,
    read_chat,
    too_long,
    wants_new_limit,
)
from bnfctl.client.served import Served
from bnfctl.data.jsonl import without_surrogates
from bnfctl.data.records import Message, Prompt
from bnfctl.errors import BnfctlError
from bnfctl.options import fingerprint as digest_of
from bnfctl.tasks import TaskDecoding
from bnfctl.tasks.imports import Answered
from bnfctl.tasks.statistics import Statistic

Answer = dict[str, Any]
"""What a judge said, as it is stored: {"choices": [{"text", "finish"}], "usage", "server"}, or {"refused": message}."""
Answers = Mapping[str, Sequence[Answer]]
"""Part of the judging ("game1", "score") -> its answers: the first, and that to the follow-up where there was one."""

UNKNOWN = "unknown"
"""The judge of a file that does not tell."""
_CHARACTERS_PER_TOKEN = 4
"""Of English, roughly: only for the estimate before a run."""


@dataclass(frozen=True, slots=True)
class Question:
    """One call about one response."""

    part: str
    """Which one of the response's questions; a follow-up has the part of its first question."""
    messages: tuple[Message, ...]
    max_tokens: int
    as_json: bool = False
    """The answer is asked to be a JSON object."""
    attempt: int = 1

    @property
    def id(self) -> str:
        """By content, the same in every run and for every judge; 64 characters."""
        return digest_of([list(self.messages), self.max_tokens, self.as_json])


@dataclass(frozen=True, slots=True)
class Judged:
    """One response and what became of its questions."""

    answered: Answered
    answers: Answers
    """Raw: all else follows from them and from the response."""
    value: float | None
    """On the task's own scale; None where no verdict could be read.  Figures come from `aggregate`, not from its mean."""
    extra: dict[str, Any]
    """JSON: verdicts, lengths, and under "nulls" why a part has no verdict."""


@runtime_checkable
class JudgedTask(Protocol):
    """A task whose responses a judge model grades."""

    name: str
    version: str
    """Of data, prompts, reading and figures; it names the prompt's digest where the prompt is not the built-in one."""
    decoding: TaskDecoding

    @property
    def instructions(self) -> str:
        """All that the judge is told beyond the texts to judge."""

    def requests(self, limit: int | None) -> Sequence[Prompt]:
        """The items, always in the same order; `limit` takes the first ones."""

    def questions(self, item: Prompt, response: str) -> list[Question]:
        """What is asked about a response; may be nothing."""

    def follow_up(self, question: Question, answer: Answer) -> Question | None:
        """What is asked after this answer, if it needs one more turn."""

    def judged(self, answered: Answered, answers: Answers) -> Judged:
        """The row of a response whose questions are all answered."""

    def aggregate(self, rows: Sequence[Judged]) -> dict[str, Any]:
        """Figures, as JSON, from the rows of one model or several.  UsageError where no verdict could be read."""

    def headline(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """{n, mean, low, high} of the figure that stands for the task, out of one of aggregate's "models"."""

    def statistic(self, rows: Sequence[Judged]) -> Statistic:
        """The headline of one model as a statistic over its items [b, C] -> [b], in the order of their ids."""


@dataclass(frozen=True)
class Judge:
    """Who is asked, and with which parameters: what the protocol fixes is in the question, the rest is here."""

    served_model: str
    server: str = ""
    """What the server is, as `client.served` found it."""
    vllm: bool = False
    temperature: float | None = 0.0
    """None sends none, for judges that take no other than their own."""
    max_tokens: int | None = None
    """None: the protocol's.  A judge that thinks first needs more."""
    token_field: str = LIMIT_NAMES[0]
    """What the server calls the most tokens of an answer; `judge` finds out."""
    json_mode: bool = True
    """Ask for a JSON object where the protocol does; False for servers that cannot."""

    @classmethod
    def of(cls, served: Served, **parameters: Any) -> Judge:
        """The judge behind a server."""
        return cls(served.name, served.version, served.vllm, **parameters)

    def body(self, question: Question) -> dict[str, Any]:
        """The request, whole: it is the key of the answer."""
        messages = [
            {"role": turn["role"], "content": without_surrogates(turn["content"])} for turn in question.messages
        ]
        body: dict[str, Any] = {"model": self.served_model, "messages": messages}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        body[self.token_field] = self.max_tokens or question.max_tokens
        if question.as_json and self.json_mode:
            body["response_format"] = {"type": "json_object"}
        return {**body, **(VLLM_NEUTRAL if self.vllm else {})}


@dataclass(frozen=True)
class Fingerprint:
    """What figures depend on beside the responses; figures of different fingerprints do not compare."""

    protocol: str
    """The task and its version."""
    prompt: str
    """Digest of the instructions; "" where judgments of elsewhere don't tell."""
    served_model: str
    server: str
    answered_as: tuple[str, ...]
    """Models that the answers named themselves: an alias like gpt-4o tells here what it stood for."""
    parameters: dict[str, Any]
    systems: tuple[str, ...] = ()
    """`system_fingerprint`s of the answers: builds of the server, which change without notice; not in the digest."""

    @property
    def digest(self) -> str:
        """12 characters that differ where anything but `systems` does."""
        values = dataclasses.asdict(self)
        del values["systems"]
        return digest_of(values)[:12]

    def as_dict(self) -> dict[str, Any]:
        """JSON, with the digest."""
        return {"digest": self.digest, **json.loads(json.dumps(dataclasses.asdict(self)))}


def differing(fingerprints: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines that warn where figures of a table have different fingerprints, or ones that are not known; else none.

    fingerprints: row of the table -> `Fingerprint.as_dict()`.
    """
    unknown = [row for row, one in fingerprints.items() if one["served_model"] == UNKNOWN]
    if len({one["digest"] for one in fingerprints.values()}) < 2:
        several = len(fingerprints) > 1 and unknown
        return [f"the judge of {', '.join(unknown)} is not known: these figures may not compare"] if several else []
    lines = ["different judges: these figures do not compare"]
    for name in ("protocol", "prompt", "served_model", "server", "answered_as", "parameters"):
        found: dict[str, list[str]] = {}
        for row, one in fingerprints.items():
            found.setdefault(json.dumps(one[name], sort_keys=True, ensure_ascii=False), []).append(row)
        if len(found) > 1:
            lines.append(f"{name}: " + "; ".join(f"{value} ({', '.join(rows)})" for value, rows in found.items()))
    return lines


def fingerprint(task: JudgedTask, who: Judge, rows: Iterable[Judged]) -> Fingerprint:
    """Of a finished judging: what was asked for, and what the answers say of who gave them."""
    names, systems = set(), set()
    for row in rows:
        for answer in (answer for part in row.answers.values() for answer in part):
            said_of_itself = answer.get("server", {})
            names |= {said_of_itself["model"]} if "model" in said_of_itself else set()
            systems |= {said_of_itself["system_fingerprint"]} if "system_fingerprint" in said_of_itself else set()
    parameters = {name: getattr(who, name) for name in ("temperature", "max_tokens", "json_mode")}
    prompt = hashlib.sha256(task.instructions.encode()).hexdigest()[:12]
    return Fingerprint(
        f"{task.name} {task.version}", prompt, who.served_model, who.server, tuple(sorted(names)), parameters,
        tuple(sorted(systems)),
    )  # fmt: skip


def elsewhere(task: JudgedTask, judges: Iterable[str]) -> Fingerprint:
    """Of judgments that were made elsewhere; judges: what the file calls them, if it does."""
    names = sorted({name for name in judges if name})
    return Fingerprint(f"{task.name}, judged elsewhere", "", " and ".join(names) or UNKNOWN, "", (), {})


def read_answer(answer: dict[str, Any]) -> Answer:
    """What is kept of a server's answer: `read_chat`, and what the server says of itself."""
    kept = read_chat(answer)
    told = {name: answer.get(name) for name in ("model", "system_fingerprint")}
    return {**kept, "server": {name: value for name, value in told.items() if isinstance(value, str)}}


def text_of(answer: Answer) -> str:
    """The judge's text, thinking and all; "" for a refusal."""
    return "" if "refused" in answer else str(answer["choices"][0]["text"])


def why_null(answers: Sequence[Answer], reason: str) -> str:
    """Why there is no verdict: what the server did, where that explains it, else `reason`."""
    last = answers[-1] if answers else {}
    if "refused" in last:
        return f"refused: {last['refused']}"
    return f"cut off, {reason}" if answers and last["choices"][0].get("finish") == "length" else reason


def ordered(rows: Iterable[Judged]) -> list[Judged]:
    """By model and item: answers come in any order, and figures that resample must not depend on it."""
    return sorted(rows, key=lambda row: (row.answered.model, row.answered.item.id))


def plain(value: Any) -> Any:
    """Figures as JSON can hold them: dataclasses as objects, numbers that are none as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class LengthUnit:
    """How long a text is, and in what: figures name it, since numbers in different units don't compare."""

    name: str
    count: Callable[[str], int]


CHARACTERS = LengthUnit("characters", len)


def tokens_of(tokenizer: Any, name: str) -> LengthUnit:
    """Tokens of a transformers tokenizer, without special ones.  name: the model that it belongs to."""
    return LengthUnit(f"tokens of {name}", lambda text: len(tokenizer.encode(text, add_special_tokens=False)))


def estimate(task: JudgedTask, answered: Iterable[Answered]) -> dict[str, int]:
    """What a judging will ask, before any call: calls without follow-ups, tokens in (roughly), most tokens out."""
    calls = characters = most = 0
    for one in answered:
        for question in task.questions(one.item, one.response):
            calls += 1
            characters += sum(len(turn["content"]) for turn in question.messages)
            most += question.max_tokens
    return {"calls": calls, "prompt_tokens": characters // _CHARACTERS_PER_TOKEN, "response_tokens_at_most": most}


def judge(task: JudgedTask, answered: Iterable[Answered], client: Client, who: Judge) -> Iterator[Judged]:
    """One row for each response, as soon as its questions are answered; responses are pulled as there is room.

    Raises what `Client.ask` raises, and BnfctlError for a refusal that has nothing to do with the texts.  What was
    answered is kept in any case.
    """
    run = _Run(task, who, client.urls)
    with closing(client.ask(run.requests(answered))) as asked:  # an error here ends what is in flight
        for (state, question), answer in asked:
            if question is not None:
                run.take(state, question, answer)
            if not state.open:
                run.under_way -= 1
                yield task.judged(state.answered, state.answers)


@dataclass(eq=False)
class _State:
    """A response under way."""

    answered: Answered
    open: int
    """Questions without a last answer."""
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    renamed: set[str] = field(default_factory=set)
    """Questions that were asked again under the other name of the limit of tokens."""


@dataclass
class _Run:
    task: JudgedTask
    who: Judge
    urls: Sequence[str]
    under_way: int = 0
    """Responses that are asked about."""
    more: deque[tuple[_State, Question]] = field(default_factory=deque)

    def requests(self, answered: Iterable[Answered]) -> Iterator[Request | Known | None]:
        """Follow-ups first, so that few responses are under way at a time."""
        todo: deque[tuple[_State, Question]] = deque()
        source = iter(answered)
        while True:
            if self.more or todo:
                state, question = (self.more or todo).popleft()
                yield Request((state, question), CHAT, self.who.body(question), read_answer, may_refuse=True)
            elif (one := next(source, None)) is not None:
                questions = self.task.questions(one.item, one.response)
                state = _State(one, len(questions))
                self.under_way += 1
                todo.extend((state, question) for question in questions)
                if not questions:
                    yield Known((state, None), {})
            elif self.under_way:
                yield None  # an answer that is still out may need a follow-up
            else:
                return

    def take(self, state: _State, question: Question, answer: Answer) -> None:
        """Note an answer; BnfctlError for a refusal that would be the same for every response."""
        refusal = answer.get("refused")
        if refusal is not None and question.id not in state.renamed and wants_new_limit(refusal):
            self.who = dataclasses.replace(self.who, token_field=LIMIT_NAMES[1])
            state.renamed.add(question.id)
            self.more.append((state, question))
            return
        if refusal is not None and not (too_long(refusal) or about_content(refusal)):
            raise BnfctlError(
                f"the judge refuses item {state.answered.item.id}: {refusal}", where=", ".join(self.urls),
                hint="less may do: --judge-temperature none, --no-judge-json, --judge-tokens N; or another --served-model",
            )  # fmt: skip
        state.answers.setdefault(question.part, []).append(answer)
        following = None if refusal is not None else self.task.follow_up(question, answer)
        if following is None:
            state.open -= 1
        else:
            self.more.append((state, following))
