"""A rank that dies ends the others: a counter per rank in the rendezvous store, watched by all.

Collectives alone do not tell: under NCCL they wait for a dead peer until their own timeout, hours later.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from bnfctl import console
from bnfctl.errors import BnfctlError

BEAT_SECONDS = 5.0
SILENT_SECONDS = 45.0
"""A rank whose counter stands still for so long is dead; so is a store that does not answer for so long."""
STOP_SECONDS = 2.0
"""How long a rank that was asked to stop looks for the one that broke its collective."""
GRACE_SECONDS = 8.0
"""How long this rank may take to end by itself after another one ended with an error, which may be its own too."""
_HINT = "the same command resumes"


class LostRank(BnfctlError):  # noqa: N818  (it says what happened, as Interrupted does)
    """Another rank ended, so this one cannot go on (exit 1, or that rank's own exit code)."""

    def __init__(self, who: str, hint: str | None = None) -> None:
        super().__init__(f"{who} ended; this rank stops", hint=hint or _HINT)


class Heartbeat:
    """One rank's beat, and its watch over the others; `host` owns the store and leaves last."""

    def __init__(
        self, store: Store, rank: int, size: int, *, host: bool, keeper: str, lost: Callable[[BnfctlError], None]
    ) -> None:
        """store: a connection of its own, since another thread may be waiting on the caller's.

        keeper: who is gone when the store is.  lost: called with the reason before this process ends.
        """
        self._store, self._rank, self._size = store, rank, size
        self._host, self._keeper, self._lost = host, keeper, lost
        self._seen = dict.fromkeys((k for k in range(size) if k != rank), 0)
        """The last counter of every rank that has not left."""
        self._still = dict.fromkeys(self._seen, 0)
        """Rounds since it moved."""
        self._verdict: BnfctlError | None = None
        self._spared = False
        """Whether the main thread takes the verdict itself: it is not stuck in a collective."""
        self._stopped = threading.Event()
        self._answered = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def who(self) -> BnfctlError:
        """Why a collective has failed: the rank that ended, as soon as its silence is long enough to name it."""
        self._spared = True
        limit, failed = SILENT_SECONDS + 2 * BEAT_SECONDS, time.monotonic()
        while self._verdict is None and time.monotonic() - failed < limit:
            time.sleep(0.1)
            with contextlib.suppress(RuntimeError):
                self._departures()
            if console.stop_requested():
                # The launcher has seen who ended, tells that itself, and kills soon.
                limit = min(limit, STOP_SECONDS)
        return self._verdict or LostRank("another rank")

    def leave(self, error: BnfctlError | None) -> None:
        """End the watch and say so, so that the others neither wait nor take it for a death.

        error: why this rank ends before its work is done; if that is its own fault, the others end with it.  The
        host waits until all others have left or died.
        """
        self._spared = True
        lost = isinstance(error, LostRank)
        own = error is not None and error is not self._verdict and not lost
        farewell = threading.Thread(target=self._say_left, args=(error if own else None,), daemon=True)
        farewell.start()
        farewell.join(1.0)
        while farewell.is_alive() and self._verdict is None and not lost:  # the watch sees a store that does not answer
            farewell.join(0.05)
        if self._host and (lost or self._verdict is not None):
            self._linger()
        self._stopped.set()

    def _say_left(self, error: BnfctlError | None) -> None:
        with contextlib.suppress(RuntimeError):  # the store may be gone, and with it everyone who could wait
            self._store.set(f"left/{self._rank}", json.dumps(error.as_dict() if error else None))
            left = self._store.add("left", 1)
            while self._host and left < self._size:
                time.sleep(0.05)
                left = self._store.add("left", 0)

    def _linger(self) -> None:
        """Keep the store up until the others have seen for themselves who is gone, or they would blame this rank."""
        time.sleep(BEAT_SECONDS + 1.0)

    def _beat(self) -> None:
        while not self._stopped.is_set():
            try:
                self._store.add(f"beat/{self._rank}", 1)
                self._look()
            except RuntimeError:
                # The keeper may have ended with an error that this rank has too: time to say it.
                self._decide(LostRank(self._keeper), GRACE_SECONDS)
                return
            self._answered.set()
            self._stopped.wait(BEAT_SECONDS)

    def _look(self) -> None:
        self._departures()
        for rank, before in list(self._seen.items()):
            now = self._store.add(f"beat/{rank}", 0)
            # One that has not come yet is slow, not dead: whoever waits for it has a limit of its own.
            self._still[rank] = self._still[rank] + 1 if now == before and now else 0
            if rank in self._seen:  # not taken off meanwhile, by the main thread
                self._seen[rank] = now
            # Rounds, not a clock: a machine that was asleep must not find everyone dead.
            if self._still[rank] * BEAT_SECONDS >= SILENT_SECONDS:
                self._decide(LostRank(f"rank {rank}"), 0.0)

    def _departures(self) -> None:
        """Take those that have left off the list; one that left with an error of its own ends this rank too."""
        if self._store.add("left", 0) == 0:
            return
        for rank in list(self._seen):
            if self._store.check([f"left/{rank}"]):
                reason = json.loads(self._store.get(f"left/{rank}"))
                self._seen.pop(rank, None)
                if reason is not None:
                    self._decide(_elsewhere(rank, reason), GRACE_SECONDS)

    def _decide(self, verdict: BnfctlError, grace: float) -> None:
        """Hold the verdict ready for the main thread; end the process if that does not end by itself."""
        if self._verdict is None and not self._stopped.is_set():
            self._verdict = verdict
            threading.Thread(target=self._end, args=(verdict, grace), daemon=True).start()

    def _end(self, verdict: BnfctlError, grace: float) -> None:
        self._stopped.wait(grace)
        if self._spared or self._stopped.is_set():
            return
        self._lost(verdict)
        sys.stderr.flush()
        if self._host:
            self._linger()
        os._exit(verdict.exit_code)

    def _watch(self) -> None:
        """Notice a beat that is stuck itself: a machine without power closes no connection."""
        missed = 0
        while not self._stopped.wait(1.0):
            missed = 0 if self._answered.is_set() else missed + 1
            self._answered.clear()
            if missed >= SILENT_SECONDS:
                self._decide(LostRank(self._keeper), 0.0)
                return


def _elsewhere(rank: int, reason: dict[str, Any]) -> BnfctlError:
    """Another rank's own error, as this one ends with it."""
    error = BnfctlError(f"{reason['error']} (rank {rank})", where=reason["where"], hint=reason["hint"])
    error.exit_code = reason["exit_code"]
    return error
