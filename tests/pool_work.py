"""Work for the tests of the pool: writes a file per unit, and fails as it is told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from bnfctl import durable
from bnfctl.errors import UsageError


class Writing:
    """One file per unit, named after it, that says who wrote it and with what GPUs and threads."""

    provenance: ClassVar[dict[str, Any]] = {"engine": "pen 1.0"}

    def __init__(self, request: dict[str, Any]) -> None:
        self.request, self.folder = request, Path(request["folder"])
        print("a library that prints")
        if request.get("refuse"):
            raise UsageError("no such pen", where="--pen", hint="--pen blue")

    def run(self, units: Iterable[int]) -> Iterator[tuple[int, int, int]]:
        for unit in units:
            how = self.request.get("at", {}).get(str(unit))
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "exit":
                os._exit(7)
            if how == "leave an engine":
                if (engine := os.fork()) == 0:
                    time.sleep(600)
                    os._exit(0)
                durable.write_bytes(self.folder / "engine", str(engine).encode())
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raise":
                raise ValueError("out of ink")
            if how == "full":
                raise OSError(28, "No space left on device")
            if how == "ask to stop":
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(self.request.get("seconds", 0.0))
            seen = [os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", ""), os.environ.get("OMP_NUM_THREADS", "")]
            durable.write_bytes(self.folder / str(unit), " ".join(map(str, seen)).encode())
            print("it prints at every unit, too")
            yield unit, 2, 10 * unit
        if self.request.get("hang"):
            time.sleep(600)
