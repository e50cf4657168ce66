"""Rewards from a language model behind an OpenAI-compatible endpoint: pairwise in both orders, or one by one.

Pairwise, the reward of response i among n is the mean over the others of w(i, j): 1 where both orders prefer i, 0 where
both prefer j, else 0.5.  Responses that are the same text tie without a question.  A pair one of whose answers holds no
verdict (or was refused, as too long or for its content) is left out of the mean; a response without a decided pair has a
null reward.  Pointwise, the reward is the number from 1 to 10 that the judge gives, null where there is none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnfctl import console
from bnfctl.client.requests import (
    CHAT,
    LIMIT_NAMES,
    VLLM_NEUTRAL,
    Known,
    Request,
    about_content,
    hashed_seed,
    read_chat,
    too_long,
    wants_new_limit,
)
from bnfctl.client.served import connect, served
from bnfctl.client.servers import Backoff, api_key, check_urls
from bnfctl.client.texts import fill
from bnfctl.config import ScoreConfig
from bnfctl.data.records import Group, Reward
from bnfctl.errors import BnfctlError
from bnfctl.scorers.verdicts import readable, score, template, verdict, wins

Question = tuple[int, int | None]
"""(index of response A, of response B), or (index of the response, None)."""
_AHEAD = 4
"""Groups under way, as a multiple of the requests in flight: what one slow answer can hold up."""


def check(config: ScoreConfig) -> None:
    """UsageError for servers, a key or a prompt file that cannot be used; asks nothing."""
    check_urls(config.server)
    api_key(config.api_key_env)
    template(config.judge_prompt, config.judge_mode)


class JudgeScorer:
    """Asks the judge about each group; answers are kept, and two equal questions are one."""

    def __init__(self, config: ScoreConfig, answers: Path | None, backoff: Backoff | None = None) -> None:
        """answers: the file that keeps what was answered, so that nothing is asked twice."""
        check(config)
        self.config = config
        self.instructions = template(config.judge_prompt, config.judge_mode)
        self.client = connect(config, answers, backoff)
        self.served = served(self.client, config.served_model)
        self.version = self.served.version
        self.failures = 0
        """Answers without a verdict, and questions that the judge did not take."""
        self.refused = 0
        """Those that were refused for what they say."""
        self.limit_name = LIMIT_NAMES[0]
        """The other one as soon as the model refuses this one."""

    @property
    def usage(self) -> dict[str, int]:
        """Requests, retries, tokens, answers without a verdict: for provenance."""
        return {**self.client.usage, "parse_failures": self.failures, "refused": self.refused}

    def score(self, groups: Iterable[Group]) -> Iterator[list[Reward]]:
        """As the protocol says; the questions of several groups are in flight together."""
        under_way: deque[_Judged] = deque()
        again: deque[Request] = deque()
        before = self.refused
        for (judged, question), answer in self.client.ask(self._questions(groups, under_way, again)):
            if question is not None and self._renames(judged, question, answer):
                again.append(self._request(judged, question))
            elif question is not None:
                judged.answers[question] = self._accepted(judged, answer)
            while under_way and under_way[0].whole:
                rewards, failures = under_way.popleft().rewards()
                self.failures += failures
                yield rewards
        if refused := self.refused - before:
            console.say(f"the judge refused the content of {refused} questions: see `refused` in the rows' extra")

    def _renames(self, judged: _Judged, question: Question, answer: dict[str, Any]) -> bool:
        """Whether the question is to be asked again, under the other name of max_tokens."""
        if question in judged.renamed or not wants_new_limit(answer.get("refused", "")):
            return False
        judged.renamed.add(question)
        self.limit_name = LIMIT_NAMES[1]
        return True

    def _accepted(self, judged: _Judged, answer: dict[str, Any]) -> dict[str, Any]:
        """A question that is too long, or refused for what it says, gets no reward; another refusal is one of all."""
        refusal = answer.get("refused")
        if refusal is not None and about_content(refusal):
            self.refused += 1
        elif refusal is not None and not too_long(refusal):
            prompt = judged.group.prompt
            raise BnfctlError(
                f"the judge refuses prompt {prompt.id}: {refusal}", where=", ".join(self.client.urls),
                hint="see --served-model, --judge-tokens and --judge-temperature",
            )  # fmt: skip
        return answer

    def _questions(
        self, groups: Iterable[Group], under_way: deque[_Judged], again: deque[Request]
    ) -> Iterator[Request | Known | None]:
        for group in groups:
            while again or len(under_way) >= _AHEAD * self.config.concurrency:
                yield again.popleft() if again else None
            judged = _Judged(group, _questions(group, self.config.judge_mode))
            under_way.append(judged)
            if not judged.questions:
                yield Known((judged, None), {})
            for question in judged.questions:
                yield self._request(judged, question)
        while under_way:
            yield again.popleft() if again else None

    def _request(self, judged: _Judged, question: Question) -> Request:
        texts = judged.texts(question)
        body: dict[str, Any] = {
            "model": self.served.name,
            "messages": [{"role": "user", "content": fill(self.instructions, texts)}],
            "temperature": self.config.judge_temperature,
            self.limit_name: self.config.judge_tokens,
            "seed": hashed_seed(texts),
            **(VLLM_NEUTRAL if self.served.vllm else {}),
        }
        return Request((judged, question), CHAT, body, read_chat, may_refuse=True)


def _questions(group: Group, mode: str) -> list[Question]:
    indices = range(len(group.candidates))
    if mode == "pointwise":
        return [(index, None) for index in indices]
    text = [candidate.text for candidate in group.candidates]
    return [(first, second) for first in indices for second in indices if text[first] != text[second]]


@dataclass(eq=False)
class _Judged:
    """A group and what the judge has said of it so far."""

    group: Group
    questions: list[Question]
    answers: dict[Question, dict[str, Any]] = field(default_factory=dict)
    renamed: set[Question] = field(default_factory=set)
    """Asked again under the other name of max_tokens."""

    @property
    def whole(self) -> bool:
        return len(self.answers) == len(self.questions)

    def texts(self, question: Question) -> dict[str, str]:
        """The values of the placeholders."""
        first, second = question
        candidates, prompt = self.group.candidates, readable(self.group.prompt)
        if second is None:
            return {"prompt": prompt, "response": candidates[first].text}
        return {"prompt": prompt, "response_a": candidates[first].text, "response_b": candidates[second].text}

    def rewards(self) -> tuple[list[Reward], int]:
        """(one reward per response, how many answers held no verdict)."""
        if self.questions and self.questions[0][1] is None:
            return self._pointwise()
        count = len(self.group.candidates)
        said = {question: verdict(_text(answer)) for question, answer in self.answers.items()}
        rewards = []
        for index in range(count):
            others = [other for other in range(count) if other != index]
            won = [self._wins(said, index, other) for other in others]
            known = [part for part in won if part is not None]
            value = sum(known) / len(known) if known else None
            rewards.append(Reward(value, {"pairs": [self._pair(said, index, other) for other in others]}))
        return rewards, sum(found is None for found in said.values())

    def _pointwise(self) -> tuple[list[Reward], int]:
        found = [self.answers[question] for question in self.questions]
        rewards = [Reward(score(_text(answer)), _raw(answer)) for answer in found]
        return rewards, sum(reward.value is None for reward in rewards)

    def _wins(self, said: dict[Question, str | None], index: int, other: int) -> float | None:
        if (index, other) not in said:
            return 0.5  # the same text
        first, second = said[index, other], said[other, index]
        return None if first is None or second is None else wins(first, second)

    def _pair(self, said: dict[Question, str | None], index: int, other: int) -> dict[str, Any]:
        """What the judge said with the response as A; the other order is kept with the other response."""
        against = {"against": self.group.candidates[other].sample}
        if (index, other) not in said:
            return {**against, "verdict": "tie", "same_text": True}
        return {**against, "verdict": said[index, other], **_raw(self.answers[index, other])}


def _text(answer: dict[str, Any]) -> str:
    return "" if "refused" in answer else str(answer["choices"][0]["text"])


def _raw(answer: dict[str, Any]) -> dict[str, str]:
    return {"refused": answer["refused"]} if "refused" in answer else {"text": _text(answer)}
