"""Sampling through OpenAI-compatible servers: several of them, with answers that survive a crash.

With the model's folder (and vLLM's server) prompts go out as token ids and sampled ids come back, as from an engine in
this process.  Without it the server renders the messages, and there is text only.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfctl import console
from bnfctl.client import requests as calls
from bnfctl.client.served import check_tokenizer, connect, served
from bnfctl.client.servers import Backoff
from bnfctl.config import GenerateConfig
from bnfctl.data.chat import context_length, load_tokenizer, stop_ids, template_kwargs
from bnfctl.data.jsonl import without_surrogates
from bnfctl.data.records import Candidate, Prompt
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.samplers import UNBOUNDED, Chunk, Decoding, Request, candidate, prompt_seed, requests

Tag = tuple[int, int, int, int]
"""(chunk, prompt in the chunk, first sample, how many samples) of a request."""
_TOLD = 3
"""Refused prompts that are told one by one; then their number."""


class ServerSampler:
    """The model that the servers of the config serve.  Raises UsageError when it is not the one in `model_dir`."""

    def __init__(
        self, config: GenerateConfig, model_dir: Path | None, answers: Path | None, backoff: Backoff | None = None
    ) -> None:
        """answers: the file that keeps what was answered, so that nothing is asked twice."""
        self.config, self.decoding = config, Decoding.of(config)
        self.client = connect(config, answers, backoff)
        self.refused = 0
        """Requests that were refused for what their prompts say."""
        self.limit_name = calls.LIMIT_NAMES[0]
        """The other one as soon as the model refuses this one."""
        self.served = served(self.client, config.served_model)
        self.version = self.served.version
        self.context = self.served.context or UNBOUNDED
        self.tokenizer: Any = None
        self.stops: list[int] = []
        if model_dir is not None:
            self._know(model_dir)
        elif config.chat_template_kwargs and not self.served.vllm:
            raise UsageError(
                "only vLLM's server takes arguments of the chat template, and this is another",
                where="--chat-template-kwargs", hint="leave it out, or set it where the server is started",
            )  # fmt: skip

    @property
    def usage(self) -> dict[str, int]:
        """Requests, retries, tokens, refusals: for provenance."""
        return {**self.client.usage, "refused": self.refused}

    def _know(self, model_dir: Path) -> None:
        if not self.served.vllm:
            raise UsageError(
                f"the server of {self.served.name} is not vLLM, so it returns no token ids", where="--model",
                hint="leave --model out: the responses are kept as text, and training tokenizes them",
            )  # fmt: skip
        self.tokenizer = load_tokenizer(model_dir, self.config.trust_remote_code)
        self.stops = stop_ids(model_dir, self.tokenizer)
        self.context = min(self.context, context_length(model_dir) or UNBOUNDED)
        check_tokenizer(self.client, self.served, self.tokenizer)

    def sample(
        self, chunks: Iterable[Chunk], decoding: Decoding | None = None
    ) -> Iterator[tuple[int, list[Candidate]]]:
        """As the protocol says; requests of several chunks are in flight together, one per prompt.

        With `--long-prompts drop`, a prompt that leaves no room for a response has no candidates; nor has one whose
        content the server refuses, which is said and counted.
        """
        work, before = _Work(self, decoding or self.decoding), self.refused
        for tag, answer in self.client.ask(work.pull(chunks)):
            work.take(tag, answer)
            if (done := work.pop_whole(tag[0])) is not None:
                yield tag[0], done
        if (refused := self.refused - before) > _TOLD:
            console.say(f"{refused} requests were refused for their content: those prompts have no response")


@dataclass
class _Job:
    """A prompt and what has come back for it."""

    prompt: Prompt
    seed: int
    rendered: Request | None
    """As token ids, where the model is known."""
    choices: list[dict[str, Any] | None]
    left: int = 0
    """Requests without an answer."""
    bounded: bool = True
    """Whether max_tokens is sent: where prompt and max_tokens exceed the context, servers refuse both."""

    def candidates(self, sampler: ServerSampler) -> Iterator[Candidate]:
        for sample, choice in enumerate(self.choices):
            if choice is None:
                continue  # dropped
            seed = self.seed + sample
            if self.rendered is None:
                yield Candidate(
                    self.prompt.id, sample, choice["text"], finish_reason=choice["finish"], seed=seed,
                    source=sampler.served.name,
                )  # fmt: skip
                continue
            ids = choice["ids"]
            made = candidate(sampler.tokenizer, self.rendered, sample, ids, sampler.stops, seed)
            if made.finish_reason == "length" and len(ids) < self.rendered.max_tokens:
                made = dataclasses.replace(made, finish_reason=choice["finish"])  # the server has its own reasons
            yield made


class _Work:
    """The chunks under way: turns prompts into calls, and answers into further calls or choices."""

    def __init__(self, sampler: ServerSampler, decoding: Decoding) -> None:
        self.sampler, self.decoding = sampler, decoding
        self.options = template_kwargs(decoding.chat_template_kwargs)
        self.chunks: dict[int, list[_Job]] = {}
        self.more: deque[calls.Request] = deque()
        self.renamed: set[Tag] = set()
        """Asked again under the other name of max_tokens."""

    def pull(self, chunks: Iterable[Chunk]) -> Iterator[calls.Request | calls.Known | None]:
        """A call per prompt, and first of all those that earlier answers asked for."""
        for index, prompts in chunks:
            jobs = self.chunks[index] = [self._job(prompt) for prompt in prompts]
            if not any(job.left for job in jobs):
                yield calls.Known((index, 0, 0, 0), {"choices": []})
            for place, job in enumerate(jobs):
                while self.more:
                    yield self.more.popleft()
                if job.left:
                    yield self._call(job, (index, place, 0, self.decoding.n))
        while self.chunks:
            yield self.more.popleft() if self.more else None

    def take(self, tag: Tag, answer: dict[str, Any]) -> None:
        """Keep the choices; ask for those that are missing one by one, each with the seed it would have had."""
        index, place, first, count = tag
        if not count:
            return
        job = self.chunks[index][place]
        job.left -= 1
        if "refused" in answer:
            self._refused(job, tag, answer["refused"])
            return
        choices = answer["choices"][:count]
        if job.rendered is not None and not all("ids" in choice for choice in choices):
            raise BnfctlError(
                "the server returns no token ids", where=self.sampler.client.urls[0],
                hint="update vLLM, or leave --model out: the responses are kept as text",
            )  # fmt: skip
        job.choices[first : first + len(choices)] = choices
        for sample in range(first + len(choices), first + count):
            self._again(job, (index, place, sample, 1))

    def pop_whole(self, index: int) -> list[Candidate] | None:
        """The candidates of a chunk that waits for nothing more."""
        if any(job.left for job in self.chunks[index]):
            return None
        return [made for job in self.chunks.pop(index) for made in job.candidates(self.sampler)]

    def _refused(self, job: _Job, tag: Tag, message: str) -> None:
        """Ask in another way: under another name, for as much as the context leaves, or one by one; else an error."""
        index, place, first, count = tag
        long = calls.too_long(message)
        if tag not in self.renamed and job.rendered is None and calls.wants_new_limit(message):
            self.renamed.add(tag)
            self.sampler.limit_name = calls.LIMIT_NAMES[1]
            self._again(job, tag)
        elif calls.about_content(message):
            self._drop(job, message)
        elif long and job.rendered is None and job.bounded:
            job.bounded = False
            self._again(job, tag)
        elif not long and count > 1:
            for sample in range(first, first + count):
                self._again(job, (index, place, sample, 1))
        elif not long or self.sampler.config.long_prompts != "drop":
            raise BnfctlError(
                f"the server refuses prompt {job.prompt.id}: {message}", where=job.prompt.where or job.prompt.id,
                hint="shorten the prompt, or leave such prompts out: --long-prompts drop" if long else None,
            )  # fmt: skip

    def _drop(self, job: _Job, message: str) -> None:
        """Another prompt may well be taken, so the run goes on without this one."""
        self.sampler.refused += 1
        if self.sampler.refused <= _TOLD:
            place = job.prompt.where or job.prompt.id
            console.say(f"{place}: the server refuses the content of prompt {job.prompt.id}, no response: {message}")

    def _again(self, job: _Job, tag: Tag) -> None:
        job.left += 1
        self.more.append(self._call(job, tag))

    def _job(self, prompt: Prompt) -> _Job:
        decoding = self.decoding
        job = _Job(prompt, prompt_seed(decoding.seed, prompt.id), None, [None] * decoding.n, left=1)
        if self.sampler.tokenizer is None:
            return job
        rendered = requests(self.sampler.tokenizer, UNBOUNDED, [prompt], decoding)[0]
        room = self.sampler.context - len(rendered.ids)
        if room >= 1:
            job.rendered = dataclasses.replace(rendered, max_tokens=min(decoding.max_tokens, room))
        elif self.sampler.config.long_prompts == "drop":
            job.left = 0
        else:
            raise UsageError(
                f"prompt {prompt.id} has {len(rendered.ids)} tokens; the server's context is {self.sampler.context}",
                where=prompt.where or prompt.id, hint="shorten the prompt, or --long-prompts drop",
            )  # fmt: skip
        return job

    def _call(self, job: _Job, tag: Tag) -> calls.Request:
        decoding, (_, _, first, count) = self.decoding, tag
        body: dict[str, Any] = {
            "model": self.sampler.served.name,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p if decoding.temperature > 0 else 1.0,
            "seed": job.seed + first,
            **({"n": count} if count > 1 else {}),
            **(calls.VLLM_NEUTRAL if self.sampler.served.vllm else {}),
        }
        if job.rendered is not None:
            body |= {
                "prompt": job.rendered.ids, "max_tokens": job.rendered.max_tokens, "stop_token_ids": self.sampler.stops,
                "return_token_ids": True,
            }  # fmt: skip
            return calls.Request(tag, calls.COMPLETIONS, body, calls.read_completion, may_refuse=True)
        body["messages"] = without_surrogates(list(job.prompt.messages))
        if job.bounded:
            body[self.sampler.limit_name] = decoding.max_tokens
        if self.options:
            body["chat_template_kwargs"] = self.options
        return calls.Request(tag, calls.CHAT, body, calls.read_chat, may_refuse=True)
