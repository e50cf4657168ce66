"""The five stages.  Each module has STAGE, VERSION, `plan(config, store)` and `run(config, draft) -> summary`.

`plan` resolves and checks everything without torch; `run` does the work inside a draft.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Prerequisite:
    """What `plan` returns where another stage has to run first: its artifact then goes into `field`."""

    stage: str
    config: Any
    field: str
    why: str


def module(stage: str) -> Any:
    """The module of a stage, by its name."""
    return import_module(f"bnfctl.stages.{stage}")
