"""The client: requests pulled lazily, so many in flight over all servers, answers durable before they are used."""

from __future__ import annotations

import queue
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnfctl import console
from bnfctl.client.answers import Answers
from bnfctl.client.network import POLL, Network, Settings
from bnfctl.client.requests import Known, Request
from bnfctl.client.servers import Backoff, Servers, api_key, check_urls
from bnfctl.errors import BnfctlError

_END = object()
_BETWEEN_LOOKS = 0.2
"""Seconds between two looks at what another run asks."""
_WAITED = 256
"""Requests of others that are waited for, at least: more than they have in flight, to come to those that nobody asks."""
_LONG_WAIT = 30.0
"""Seconds of nothing but waiting for another run, until the user is told."""


class Client:
    """Several servers as one.  Raises UsageError for URLs or a key that cannot be used; connects only to ask.

    `usage` counts: requests asked, cached (answers of other runs, earlier or at the same time), retries, prompt and
    completion tokens.
    """

    def __init__(
        self, urls: Sequence[str], *, concurrency: int, timeout: float, retries: int, api_key_env: str,
        answers: Path | None, backoff: Backoff | None = None, max_calls: int | None = None,
    ) -> None:  # fmt: skip
        """timeout: seconds for one whole answer.  retries: tries after the first.  answers: None keeps none.

        max_calls: requests that may be asked in all, those answered from the file not counted.
        """
        self.urls = check_urls(urls)
        self.concurrency = concurrency
        self.usage = dict.fromkeys(("requests", "cached", "retries", "prompt_tokens", "completion_tokens"), 0)
        self._answers, self._max_calls = answers, max_calls
        servers = Servers(self.urls, concurrency, backoff or Backoff())
        self._settings = Settings(servers, concurrency, timeout, retries, api_key(api_key_env), self.usage)

    def ask(self, requests: Iterable[Request | Known | None]) -> Generator[tuple[Any, dict[str, Any]]]:
        """(tag, answer) of every request, in order of completion; what was answered before is not asked again.

        requests: pulled when there is room, in the caller's thread, so it may depend on the answers so far: None
        means "nothing before the next answer".  Raises BnfctlError for a request that was refused, or that failed
        more than `retries` times, and Interrupted; all answers so far are kept.  Where `max_calls` are made, or the disk
        is full, it hands out what is in flight and raises BnfctlError.

        Another process may ask on the same file: what it is asking at the moment is waited for, unless it ends first.
        """
        with ExitStack() as stack:
            answers = stack.enter_context(Answers(self._answers)) if self._answers is not None else None
            network = stack.enter_context(Network(self._settings, answers))
            round_ = _Round(self, network, answers, self._max_calls)
            yield from round_.run(iter(requests))
            if round_.failure is not None:
                raise round_.failure

    def fetch(self, url: str, body: dict[str, Any] | None = None, tries: int = 1) -> dict[str, Any] | None:
        """The JSON object at a full URL (POST where there is a body), or None where there is no such path.

        For small facts about a server: never from the file of answers.  Raises BnfctlError.
        """
        with Network(self._settings, None) as network:
            return network.fetch(url, body, tries)

    def count(self, answer: dict[str, Any], what: str) -> None:
        """Add an answer to `usage`, under "requests" or "cached"."""
        self.usage[what] += 1
        for name, number in answer.get("usage", {}).items():
            self.usage[name] += number


@dataclass
class _Round:
    """One `ask`: what this process has in flight, and what it waits for because another one has."""

    client: Client
    network: Network
    answers: Answers | None
    max_calls: int | None
    failure: BnfctlError | None = None
    """Why nothing more is asked."""
    _ended: bool = False
    _ours: dict[str, list[Any]] = field(default_factory=dict)
    """Key -> tags."""
    _theirs: dict[str, tuple[Request, list[Any]]] = field(default_factory=dict)
    _looked: float = field(default_factory=time.monotonic)
    _busy: float = field(default_factory=time.monotonic)
    """When there was last something to do but wait for others."""

    def run(self, source: Iterator[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """(tag, answer), until all are out or there is a failure."""
        while not self._ended or self._ours or self._theirs:
            console.check_stop()
            idle = yield from self._pull(source)
            if idle and not self._ours and not self._theirs and not self._ended:
                raise RuntimeError("the requests wait for an answer, but none is outstanding")
            for key, answer in _answered(self.network) if self._ours or self._theirs else ():
                self.client.count(answer, "requests")
                for tag in self._ours.pop(key):
                    yield tag, answer
            yield from self._look_again()

    def _pull(self, source: Iterator[Any]) -> Generator[tuple[Any, dict[str, Any]], None, bool]:
        """Begin requests while there is room; whether the source has none before the next answer."""
        # twice as many as can be in flight, so that a caller who is busy for a while starves no server; and beyond those
        # that others ask, so that runs with the same requests share the work
        most = 2 * self.client.concurrency
        most_waited = max(4 * self.client.concurrency, _WAITED)
        while not self._ended and len(self._ours) < most and len(self._theirs) < most_waited:
            request: Any = next(source, _END)
            if request is _END or request is None:
                self._ended = request is _END
                return True
            if isinstance(request, Known):
                yield request.tag, request.answer
            elif (key := request.key) in self._ours:
                self._ours[key].append(request.tag)
            elif key in self._theirs:
                self._theirs[key][1].append(request.tag)
            elif (found := self._begin(request, key, [request.tag])) is not None:
                yield request.tag, found
        return False

    def _begin(self, request: Request, key: str, tags: list[Any]) -> dict[str, Any] | None:
        """The answer if it is kept; else it is asked, or waited for, or the calls are spent."""
        if self.answers is not None:
            if not self.answers.claim(key):
                self._theirs[key] = request, tags
                return None
            if (found := self.answers.get(key)) is not None:
                self.answers.release(key)
                self.client.count(found, "cached")
                return found
        if (failure := self._spent()) is not None:
            if self.answers is not None:
                self.answers.release(key)
            self.failure, self._ended = failure, True
            self._theirs.clear()  # the others go on with them; what is in flight here is still handed out
            return None
        self._ours[key] = tags
        self.network.call(request, key)
        return None

    def _look_again(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Hand out what others were answered meanwhile; ask what they ended without."""
        now = time.monotonic()
        if self._ours or not self._theirs:
            self._busy = now
        elif now - self._busy > _LONG_WAIT and self.answers is not None:
            self._busy = now
            console.say(
                f"waiting for {len(self._theirs)} answers that another run is asking for on {self.answers.path}"
            )
        if now - self._looked < _BETWEEN_LOOKS:
            return
        self._looked = now
        for key in list(self._theirs):
            if (theirs := self._theirs.pop(key, None)) is not None and (
                found := self._begin(theirs[0], key, theirs[1])
            ) is not None:
                for tag in theirs[1]:
                    yield tag, found

    def _spent(self) -> BnfctlError | None:
        """Why nothing more may be asked."""
        if self.max_calls is not None and self.client.usage["requests"] + len(self._ours) >= self.max_calls:
            return BnfctlError(
                f"{self.max_calls} calls were made, as many as may be", where="--max-calls",
                hint="a higher --max-calls goes on where this one stopped",
            )  # fmt: skip
        if self.answers is not None and self.answers.full:
            return BnfctlError(
                "the disk is full; all answers so far are kept", where=str(self.answers.path),
                hint="free some space; the same command goes on where this one stopped",
            )  # fmt: skip
        return None


def _answered(network: Network) -> Iterator[tuple[str, dict[str, Any]]]:
    """All that is done, after a short wait for the first; raises the error of a request that failed."""
    try:
        item = network.done.get(timeout=POLL)
        while True:
            if isinstance(item, BaseException):
                raise item
            yield item
            item = network.done.get_nowait()
    except queue.Empty:
        return
