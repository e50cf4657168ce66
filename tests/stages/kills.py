"""A stage in a process of its own, killed with `kill -9` as soon as some of its parts are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from bnfctl.artifact import Store
from bnfctl.config import CONFIGS
from bnfctl.options import as_json
from tests.conftest import REPOSITORY

_CODE = """
import json, sys
from pathlib import Path
from bnfctl import console, launch, ranks
from bnfctl.artifact import Store
from bnfctl.stages import score
asked = json.loads(sys.argv[1])
score.UNIT = asked["unit"]
console.claim_stdout()
launch.execute(asked["stage"], ranks.config_from_json(asked["stage"], asked["config"]), Store(Path(asked["home"])))
"""


def kill_at(parts: int, config: Any, store: Store, *, unit: int = 256, timeout: float = 120) -> int:
    """Run the config's stage until it has so many parts, then kill its process; how many parts are left.

    unit: groups of a part, for score.  AssertionError where it ends by itself before.
    """
    stage = next(name for name, cls in CONFIGS.items() if type(config) is cls)
    asked = {"stage": stage, "config": as_json(config), "home": str(store.home), "unit": unit}
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", _CODE, json.dumps(asked)], env=environment, cwd=REPOSITORY, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + timeout
        while count(store) < parts:
            assert process.poll() is None, (process.stderr and process.stderr.read().decode())[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    time.sleep(1.0)  # its workers notice
    return count(store)


def count(store: Store) -> int:
    return len(list(store.home.glob(".drafts/*/scratch/parts/*.parquet")))
