"""Which server gets the next request: the least busy one that has not just failed."""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from bnfctl import console
from bnfctl.client.requests import with_code
from bnfctl.errors import BnfctlError, UsageError

DEFAULT_KEY = "OPENAI_API_KEY"
_LONGEST_WAIT = 600.0
"""Seconds that a server may ask to be left alone."""
_BETWEEN_WARNINGS = 30.0


class FailureError(Exception):
    """A try that may go better the next time."""

    def __init__(self, reason: str, wait: float | None = None, busy: bool = False) -> None:
        """wait: seconds that the server asked for.  busy: it has too much to do."""
        super().__init__(reason)
        self.wait, self.busy = wait, busy


class RefusedError(BnfctlError):
    """A server will not do what was asked, however often."""


@dataclass(frozen=True)
class Backoff:
    """Seconds from one try to the next: `first`, doubled each time up to `longest`, less a random part of up to a half."""

    first: float = 0.5
    longest: float = 60.0

    def seconds(self, attempt: int) -> float:
        return min(self.longest, self.first * 2.0 ** min(attempt, 30)) * random.uniform(0.5, 1.0)


@dataclass
class Server:
    """A base URL and how it does."""

    url: str
    limit: float
    """Requests that it may have at a time: halved when it is too busy, slowly raised again while it answers."""
    in_flight: int = 0
    benched_until: float = 0.0
    failures: int = 0
    """Times in a row that it was benched without an answer in between."""
    _warned: float = field(default=-_BETWEEN_WARNINGS, repr=False)

    @property
    def room(self) -> bool:
        """Whether it may have one more; after a failure it gets one at a time, until one is answered."""
        return self.in_flight < (1 if self.failures else max(1, int(self.limit)))

    def warn(self, text: str) -> None:
        """A line on stderr, at most one in a while."""
        now = time.monotonic()
        if now - self._warned >= _BETWEEN_WARNINGS:
            self._warned = now
            console.say(f"{self.url}: {text}")


class Servers:
    """All base URLs; used in one event loop only."""

    def __init__(self, urls: Sequence[str], concurrency: int, backoff: Backoff) -> None:
        self.all = [Server(url, concurrency) for url in dict.fromkeys(urls)]
        self.concurrency, self.backoff = concurrency, backoff

    async def take(self) -> Server:
        """The server with the fewest requests in flight, once there is one that takes any."""
        while True:
            now = time.monotonic()
            ready = [server for server in self.all if server.benched_until <= now]
            free = [server for server in ready if server.room]
            if free:
                chosen = min(free, key=lambda server: server.in_flight)
                chosen.in_flight += 1
                return chosen
            wait = 0.02 if ready else min(server.benched_until for server in self.all) - now
            await asyncio.sleep(wait * random.uniform(1.0, 1.25))  # so that not all come back at once

    def failed(self, server: Server, failure: FailureError, attempt: int) -> None:
        """Leave a server alone for a while; the others go on.  Requests that fail together count as one failure."""
        now = time.monotonic()
        if server.benched_until <= now:
            server.failures += 1
            if failure.busy:
                server.limit = max(1.0, server.limit / 2)
        wait = self.backoff.seconds(max(attempt, server.failures - 1))
        if failure.wait is not None:
            wait = min(failure.wait, _LONGEST_WAIT)
        server.benched_until = max(server.benched_until, now + wait)
        server.warn(f"{failure}; left alone for {wait:.1f} s")

    def hopeless(self, retries: int) -> bool:
        """Whether no server has answered anything for longer than `retries` allows."""
        return all(server.failures > retries for server in self.all)

    def worked(self, server: Server) -> None:
        server.failures = 0
        server.limit = min(float(self.concurrency), server.limit + 1.0 / server.limit)


def check_urls(urls: Sequence[str], where: str = "--server") -> tuple[str, ...]:
    """The base URLs without a slash at the end; UsageError for none, for what is no URL, and for one with a secret."""
    if not urls:
        raise UsageError("which server?", where=where, hint=f"{where} http://host:8000/v1")
    for url in urls:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            parts, good = None, False
        if parts is not None and (parts.username or parts.password or parts.query or parts.fragment):
            raise UsageError(
                "a server's URL holds a user, a key or a query: it would be written down", where=where,
                hint="http://host:8000/v1, and the key in an environment variable: --api-key-env NAME",
            )  # fmt: skip
        if not good:
            raise UsageError(f"not a base URL: '{url}'", where=where, hint=f"{where} http://host:8000/v1")
    return tuple(url.rstrip("/") for url in urls)


def api_key(name: str, where: str = "--api-key-env") -> str | None:
    """The key in the environment variable `name`; None where the default one is not set.

    UsageError, which never shows the key, for a name that is none (perhaps the key itself) and a key no header can hold.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise UsageError("not the name of an environment variable", where=where, hint=f"{where} {DEFAULT_KEY}")
    key = os.environ.get(name, "").strip()
    if not key and name != DEFAULT_KEY:
        raise UsageError(f"the environment variable {name} is not set", where=where, hint=f"export {name}=...")
    if not (key.isascii() and key.isprintable()):
        what = f"the key in {name} has characters that no header can hold"
        raise UsageError(what, where=where, hint=f"export {name}=..., in ASCII and on one line")
    return key or None


def check_answer(response: httpx.Response) -> None:
    """Raise FailureError for what may go better later, RefusedError for what will not."""
    status = response.status_code
    if status < 300:
        return
    if status in (408, 409, 429) or status >= 500:
        waits = _retry_after(response) if status in (429, 503) else None
        raise FailureError(f"{status} {message_of(response)}", waits, busy=status in (429, 503))
    what = f"the server refuses the request: {status} {message_of(response)}"
    hint = {
        401: f"put the key into {DEFAULT_KEY}, or name its variable: --api-key-env NAME",
        403: f"put the key into {DEFAULT_KEY}, or name its variable: --api-key-env NAME",
        404: "check the URL (it usually ends with /v1) and --served-model",
    }.get(status)
    if status < 400:
        what, hint = f"the server sends us elsewhere: {status} {response.headers.get('location', '')}", "give that URL"
    raise RefusedError(what, where=str(response.request.url), hint=hint)


def message_of(response: httpx.Response) -> str:
    """What the server says about an error, in one line."""
    try:
        found: Any = response.json()
        error = found
        for name in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(name):
                error, found = found, found[name]
        text = found if isinstance(found, str) else str(found)
    except ValueError:
        error, text = None, response.text
    return with_code(" ".join(text.split())[:500] or response.reason_phrase, error)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds, from a number or a date."""
    value = response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
