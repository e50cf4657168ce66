"""What a benchmark's parent asks of a child process, and what it gets back."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

MEGA = 2**20


@dataclass(frozen=True)
class Job:
    """One training, or one head, in a process of its own."""

    name: str
    """Of the trainer or the head."""
    folder: str
    """Holds the model and its tokenizer; records.json is beside it."""
    device: str
    dtype: str
    batch_pairs: int
    """Pairs per optimizer step."""
    micro_tokens: int | None
    """Ours: tokens per micro-batch, None is the trainer's own choice.  For a head: the tokens it is given."""
    share_prompt: bool = True
    rows: int | None = None
    """Peers: examples per forward pass; None for ours."""
    probe: tuple[int, ...] = ()
    """Peers: instead of a timing, find the fastest of these numbers of rows."""
    limit: int | None = None
    """Take the first pairs only."""
    cpu_time: bool = False
    """Count CPU seconds instead of the wall's."""
    lr: float = 1e-6

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Job:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Job(**{**values, "probe": tuple(values["probe"])})


@dataclass(frozen=True)
class Timing:
    """One pass over the data."""

    train: float
    """Seconds of the optimizer steps, with a reference that is computed within them."""
    reference: float | None = None
    """Seconds of a reference pass of its own; None where there is none."""
    note: str = ""
    peak_mib: float | None = None
    """Peak resident memory at the end of the last step, where more happens after it."""


@dataclass(frozen=True)
class Outcome:
    """What a child measured; `problem` says why it did not."""

    train: float = math.nan
    reference: float | None = None
    peak_mib: float = math.nan
    """Peak resident memory of the process, or of the GPU's allocator where there is one."""
    start_mib: float = math.nan
    """Resident memory after the imports, before the model."""
    peak_flops: float | None = None
    """Of the GPU, FLOP/s, where it is known."""
    rows: int | None = None
    note: str = ""
    problem: str = ""

    @property
    def total(self) -> float:
        return self.train + (self.reference or 0.0)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Outcome:
        return Outcome(**json.loads(path.read_text(encoding="utf-8")))


class NotRunError(Exception):
    """A trainer cannot run here; the message says what it needs."""
