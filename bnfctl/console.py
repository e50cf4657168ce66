"""Everything a person or a script sees: one line (or one JSON document) on stdout, all else on stderr.

Libraries print to stdout when they like, so `claim_stdout` points fd 1 at stderr and keeps the real one;
only `emit` writes to it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from functools import cache
from types import FrameType, TracebackType
from typing import Any

from bnfctl.errors import BnfctlError, Interrupted

PLAIN_SECONDS = 30.0
"""Between two progress lines where stderr is not a terminal."""

_stdout_fd: int | None = None
_emitted = False
_signal: int | None = None
_signalled = 0.0
_ONE_STOP_SECONDS = 1.0
"""A scheduler's SIGTERM to every process reaches a child twice: at once, and through its parent."""


def claim_stdout() -> None:
    """Keep the real stdout for `emit`; from here on prints of any library go to stderr."""
    global _stdout_fd
    if _stdout_fd is None:
        sys.stdout.flush()
        _stdout_fd = os.dup(1)
        os.dup2(2, 1)
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for terminals; logs get our own plain lines


def emit(text: str) -> None:
    """Write the result to the real stdout.  A reader that has gone away (`| head`) is not an error."""
    global _emitted
    _emitted = True
    data = (text.rstrip("\n") + "\n").encode("utf-8", "replace")
    fd = 1 if _stdout_fd is None else _stdout_fd
    if _stdout_fd is None:
        sys.stdout.flush()
    try:
        while data:
            data = data[os.write(fd, data) :]
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def has_emitted() -> bool:
    """Whether the result is out already: an error then adds no second document."""
    return _emitted


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


@cache
def say_once(text: str) -> None:
    """`say`, but never again in this process: several tasks read one file, and all find the same."""
    say(text)


def report(error: BnfctlError) -> None:
    """The three-line form of an error: what, where, what to type next."""
    say(f"error: {error.what}")
    if error.where:
        say(f"where: {error.where}")
    if error.hint:
        say(f"hint: {error.hint}")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[int] = ()) -> str:
    """A table as text, as wide as its content; `right` are the columns to align right."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    drawn = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        number = index in right
        drawn.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    console = Console(width=10_000, color_system=None, highlight=False, markup=False, emoji=False)
    # A terminal that is too narrow breaks lines; a number that is broken in its middle could not be read.
    width = max(_width(), Measurement.get(console, console.options, drawn).minimum)
    with console.capture() as captured:
        console.print(drawn, width=width)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def _width() -> int:
    try:
        return max(60, os.get_terminal_size(2).columns)
    except OSError:
        return 200


class Progress:
    """How far a loop is: a live line on a terminal, otherwise a plain line every 30 s: done / total, rate, eta."""

    def __init__(self, total: int, unit: str, done: int = 0, quiet: bool = False) -> None:
        """quiet: say nothing (a rank that is not the first)."""
        self.total, self.unit, self.done, self.quiet = total, unit, done, quiet
        self._first, self._start = done, time.monotonic()
        self._next = self._start + PLAIN_SECONDS
        self._live: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and not self.quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Live

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._live = Live(*columns, console=Console(stderr=True), transient=True)
            self._live.start()
            self._task = self._live.add_task(self.unit, total=self.total, completed=self.done)
        return self

    def restart(self) -> None:
        """The rate counts from now: what came before was no work on the units (an engine was loaded)."""
        self._first, self._start = self.done, time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        if self._live is not None:
            self._live.update(self._task, completed=self.done, description=f"{self.unit} {note}".rstrip())
        elif now >= self._next and not self.quiet:
            self._next = now + PLAIN_SECONDS
            rate = (self.done - self._first) / max(now - self._start, 1e-9)
            eta = f"{(self.total - self.done) / rate:.0f} s" if rate else "unknown"
            say(f"{self.done} / {self.total} {self.unit}, {rate:.3g}/s, eta {eta} {note}".rstrip())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()


def catch_signals() -> None:
    """First SIGINT or SIGTERM: finish the shard or checkpoint, then stop.  The second one leaves at once."""
    signal.signal(signal.SIGINT, _on_signal)
    signal.signal(signal.SIGTERM, _on_signal)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    global _signal, _signalled
    now = time.monotonic()
    if signum == signal.SIGTERM == _signal and now - _signalled < _ONE_STOP_SECONDS:
        return
    if _signal is not None:
        os._exit(128 + signum)
    _signal, _signalled = signum, now
    say("stopping after the current shard or checkpoint; once more to leave at once")


def stop_requested() -> bool:
    """Whether a signal has asked this process to stop."""
    return _signal is not None


def stop_signal() -> int:
    """The signal that has asked this process to stop, or 0."""
    return _signal or 0


def check_stop() -> None:
    """Raise Interrupted if a stop was requested: call it where everything done so far is saved."""
    if _signal is not None:
        raise Interrupted(_signal)
