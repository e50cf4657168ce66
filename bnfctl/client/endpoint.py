"""The client: requests pulled lazily, so many in flight over all servers, answers durable before they are used."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bnfctl import console
from bnfctl.client.answers import Answers
from bnfctl.client.network import POLL, Network, Settings
from bnfctl.client.requests import Known, Request
from bnfctl.client.servers import Backoff, Servers, api_key, check_urls
from bnfctl.errors import BnfctlError

_END = object()


class Client:
    """Several servers as one.  Raises UsageError for URLs or a key that cannot be used; connects only to ask.

    `usage` counts: requests asked, cached (answers of an earlier run), retries, prompt and completion tokens.
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

    def ask(self, requests: Iterable[Request | Known | None]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """(tag, answer) of every request, in order of completion; what was answered before is not asked again.

        requests: pulled when there is room, in the caller's thread, so it may depend on the answers so far: None
        means "nothing before the next answer".  Raises BnfctlError for a request that was refused, or that failed
        more than `retries` times, and Interrupted; all answers so far are kept.  Where `max_calls` are made, it hands out
        what is in flight and raises BnfctlError.
        """
        source, waiting, ended, spent = iter(requests), dict[str, list[Any]](), False, False
        with ExitStack() as stack:
            answers = stack.enter_context(Answers(self._answers)) if self._answers is not None else None
            network = stack.enter_context(Network(self._settings, answers))
            while not ended or waiting:
                console.check_stop()
                # twice as many as can be in flight, so that a caller who is busy for a while starves no server
                while not ended and len(waiting) < 2 * self.concurrency:
                    request: Any = next(source, _END)
                    if request is _END or request is None:
                        ended = request is _END
                        break
                    if isinstance(request, Known):
                        yield request.tag, request.answer
                    elif (key := request.key) in waiting:
                        waiting[key].append(request.tag)
                    elif answers is not None and (found := answers.get(key)) is not None:
                        self._count(found, "cached")
                        yield request.tag, found
                    elif self._max_calls is not None and self.usage["requests"] + len(waiting) >= self._max_calls:
                        ended = spent = True
                        break
                    else:
                        waiting[key] = [request.tag]
                        network.call(request, key)
                if not waiting and not ended:
                    raise RuntimeError("the requests wait for an answer, but none is outstanding")
                for key, answer in _answered(network) if waiting else ():
                    self._count(answer, "requests")
                    for tag in waiting.pop(key):
                        yield tag, answer
        if spent:
            raise BnfctlError(
                f"{self._max_calls} calls were made, as many as may be", where="--max-calls",
                hint="a higher --max-calls goes on where this one stopped",
            )  # fmt: skip

    def fetch(self, url: str, body: dict[str, Any] | None = None, tries: int = 1) -> dict[str, Any] | None:
        """The JSON object at a full URL (POST where there is a body), or None where there is no such path.

        For small facts about a server: never from the file of answers.  Raises BnfctlError.
        """
        with Network(self._settings, None) as network:
            return network.fetch(url, body, tries)

    def _count(self, answer: dict[str, Any], what: str) -> None:
        self.usage[what] += 1
        for name, number in answer.get("usage", {}).items():
            self.usage[name] += number


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
