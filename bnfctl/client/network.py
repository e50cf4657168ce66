"""The network's own thread: while requests are in flight, the caller's thread is free, and a stop can drop them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import queue
import ssl
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import httpx

from bnfctl import console
from bnfctl.client.answers import Answers
from bnfctl.client.requests import MalformedError, Request, about_content
from bnfctl.client.servers import FailureError, RefusedError, Server, Servers, check_answer, message_of
from bnfctl.errors import BnfctlError

POLL = 0.1
"""Seconds between two looks at whether to stop."""
_REFUSALS = (400, 413, 422)
_FORBIDDEN = 403
"""A wrong key; but also how some servers refuse a text."""

Item = tuple[str, dict[str, Any]]
"""(key of a request, its answer)"""


@dataclass
class Settings:
    """What every network of a client shares."""

    servers: Servers
    concurrency: int
    timeout: float
    retries: int
    key: str | None = field(repr=False)
    usage: dict[str, int]
    tls: ssl.SSLContext = field(default_factory=httpx.create_ssl_context)


class Network:
    """A thread with connections, from `with` to its end; what is in flight then is dropped, what was answered kept.

    `done` has the answers, in order of completion and already durable, and the errors.
    """

    def __init__(self, settings: Settings, answers: Answers | None) -> None:
        self.settings, self._answers = settings, answers
        self.done: queue.SimpleQueue[Item | BaseException] = queue.SimpleQueue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bnfctl-client", daemon=True)

    def __enter__(self) -> Network:
        self._thread.start()
        self._wait(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, request: Request, key: str) -> None:
        """Begin a request, as soon as there is room."""

        def begin() -> None:
            task = asyncio.create_task(self._answer(request, key))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._loop.call_soon_threadsafe(begin)

    def fetch(self, url: str, body: dict[str, Any] | None, tries: int) -> dict[str, Any] | None:
        """The JSON object at a full URL, or None where there is no such path; raises BnfctlError and Interrupted."""
        future = asyncio.run_coroutine_threadsafe(self._fetch(url, body, tries), self._loop)
        while True:
            try:
                return future.result(timeout=POLL)
            except concurrent.futures.TimeoutError:
                if console.stop_requested():
                    future.cancel()
                    console.check_stop()

    def _wait(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # The caller's thread is above, the network's thread below.

    async def _open(self) -> None:
        # One small pool of connections per request in flight: a pool looks at all of its connections for each request.
        self._free: asyncio.LifoQueue[httpx.AsyncClient | None] = asyncio.LifoQueue()
        for _ in range(self.settings.concurrency):
            self._free.put_nowait(None)
        self._fresh: asyncio.Queue[tuple[Item, asyncio.Event]] = asyncio.Queue()
        self._keeper = asyncio.create_task(self._keep())

    def _connections(self) -> httpx.AsyncClient:
        headers = {"Content-Type": "application/json"}
        if self.settings.key:
            headers["Authorization"] = f"Bearer {self.settings.key}"
        return httpx.AsyncClient(
            headers=headers, verify=self.settings.tls,
            timeout=httpx.Timeout(None, connect=min(self.settings.timeout, 10.0)),
            limits=httpx.Limits(keepalive_expiry=3.0),
            mounts={"all://localhost": None, "all://127.0.0.1": None, "all://[::1]": None},  # never through a proxy
        )  # fmt: skip

    async def _shut(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._fresh.join()
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        while not self._free.empty():
            if (http := self._free.get_nowait()) is not None:
                await http.aclose()
        await self._loop.shutdown_default_executor()

    async def _keep(self) -> None:
        """Make answers durable, all that came in meanwhile at once; only then hand them out."""
        while True:
            batch = [await self._fresh.get()]
            while not self._fresh.empty():
                batch.append(self._fresh.get_nowait())
            items = [item for item, _ in batch]
            try:
                if self._answers is not None:
                    await asyncio.to_thread(self._answers.put, items)
                for item in items:
                    self.done.put(item)
            except Exception as error:  # the caller raises it
                self.done.put(error)
            for _, kept in batch:
                kept.set()
                self._fresh.task_done()

    async def _answer(self, request: Request, key: str) -> None:
        try:
            http = await self._free.get() or self._connections()
            try:
                answer = await self._try(http, request)
                if "refused" in answer:
                    if self._answers is not None:
                        self._answers.release(key)
                    self.done.put((key, answer))
                    return
                kept = asyncio.Event()
                self._fresh.put_nowait(((key, answer), kept))
                await kept.wait()  # in flight until then, so a kill never loses more than what is in flight
            finally:
                self._free.put_nowait(http)
        except Exception as error:  # the caller raises it
            self.done.put(error)

    async def _try(self, http: httpx.AsyncClient, request: Request) -> dict[str, Any]:
        servers, retries = self.settings.servers, self.settings.retries
        tries = attempt = 0
        while True:
            server = await servers.take()
            tries += 1
            try:
                answer = await self._send(http, server, request)
            except FailureError as failure:
                servers.failed(server, failure, attempt)
                attempt += not failure.busy  # a server that is busy but answers others will get to this one
                if attempt > retries or servers.hopeless(retries):
                    raise BnfctlError(
                        f"no answer after {tries} {'try' if tries == 1 else 'tries'}: {failure}",
                        where=server.url + request.path,
                        hint="the same command goes on where this one stopped; --retries N tries more often",
                    ) from None
                self.settings.usage["retries"] += 1
            else:
                servers.worked(server)
                return answer
            finally:
                server.in_flight -= 1

    async def _send(self, http: httpx.AsyncClient, server: Server, request: Request) -> dict[str, Any]:
        response = await self._exchange(http, server.url + request.path, request.body)
        if request.may_refuse and response.status_code in (*_REFUSALS, _FORBIDDEN):
            message = message_of(response)
            if response.status_code != _FORBIDDEN or about_content(message):
                return {"refused": f"{response.status_code} {self._shown(message)}"}
        found = self._checked(response)
        try:
            return request.read(found)
        except MalformedError as error:
            raise FailureError(self._shown(str(error))) from None

    async def _fetch(self, url: str, body: dict[str, Any] | None, tries: int) -> dict[str, Any] | None:
        attempt = 0
        async with self._connections() as http:
            while True:
                try:
                    response = await self._exchange(http, url, body)
                    return None if response.status_code in (404, 405) else self._checked(response)
                except FailureError as failure:
                    attempt += 1
                    if attempt >= tries:
                        raise BnfctlError(str(failure), where=url, hint="is the server up?") from None
                    await asyncio.sleep(self.settings.servers.backoff.seconds(attempt - 1))

    async def _exchange(self, http: httpx.AsyncClient, url: str, body: dict[str, Any] | None) -> httpx.Response:
        content = None if body is None else json.dumps(body).encode()
        try:
            async with asyncio.timeout(self.settings.timeout):
                return await http.request("GET" if body is None else "POST", url, content=content)
        except (TimeoutError, httpx.TimeoutException):
            raise FailureError(f"no answer within {self.settings.timeout:g} s") from None
        except httpx.HTTPError as error:
            raise FailureError(f"{type(error).__name__} {self._shown(str(error))}".strip()) from None

    def _checked(self, response: httpx.Response) -> dict[str, Any]:
        """The object that was answered; errors without the key, whatever the server repeats of it."""
        try:
            check_answer(response)
        except FailureError as error:
            raise FailureError(self._shown(str(error)), error.wait, error.busy) from None
        except RefusedError as error:
            raise RefusedError(self._shown(error.what), where=error.where, hint=error.hint) from None
        try:
            found = response.json()
        except (ValueError, RecursionError):
            raise FailureError("an answer that is not JSON") from None
        if not isinstance(found, dict):
            raise FailureError("an answer that is no JSON object")
        return found

    def _shown(self, text: str) -> str:
        return text.replace(self.settings.key, "[key]") if self.settings.key else text
