"""The five stages.  Each module has STAGE, VERSION, `plan(config, store)` and `run(config, draft) -> summary`.

`plan` resolves and checks everything without torch; `run` does the work inside a draft.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from bnfctl.artifact import Pinned
from bnfctl.errors import BnfctlError, UsageError


@dataclass(frozen=True)
class Prerequisite:
    """What `plan` returns where another stage has to run first: its artifact then goes into `field`."""

    stage: str
    config: Any
    field: str
    why: str


def name_served(config: Any) -> tuple[Any, dict[str, Pinned]]:
    """The config with the name of its servers' model in it, and nothing; or the config, and an input not resolved.

    The latter where no server answers: a dry run goes on with it.  Raises as `client.served.name_for` otherwise.
    """
    from bnfctl.client.served import name_for  # httpx, which those without servers have no use for
    from bnfctl.client.servers import RefusedError

    try:
        return replace(config, served_model=name_for(config)), {}
    except (UsageError, RefusedError):
        raise
    except BnfctlError as error:
        where = error.where or config.server[0]
        return config, {"server": Pinned("server", where, None, None, error.what)}


def module(stage: str) -> Any:
    """The module of a stage, by its name."""
    return import_module(f"bnfctl.stages.{stage}")
