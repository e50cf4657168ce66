"""A disk that is soon full: a tmpfs of some size, which only the programs run here see.

Mounting it takes a user namespace, which some machines and most containers refuse.  Then the test is skipped; where
BNFCTL_SMALL_DISK is `required`, it fails.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

VARIABLE = "BNFCTL_SMALL_DISK"
REQUIRED = "required"


def on_small_disk(disk: Path, size: str, program: str, *arguments: str, env: dict[str, str] | None = None) -> Any:
    """What a Python program prints as JSON, with a disk of `size` (as `mount` takes it) mounted on the folder `disk`."""
    asked = os.environ.get(VARIABLE, "")
    assert asked in ("", REQUIRED), f"{VARIABLE} is {asked!r}; it may be {REQUIRED!r}"
    if reason := refused():
        (pytest.fail if asked else pytest.skip)(f"no disk of its own may be mounted here: {reason}")
    disk.mkdir(exist_ok=True)
    mount = 'mount -t tmpfs -o size="$1" t "$2" && shift 2 && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", size, str(disk), sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=env, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def grow(disk: Path | str, size: str) -> None:
    """Make some room, from a program that runs there."""
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


@functools.cache
def refused() -> str:
    """Why no tmpfs can be mounted; empty where one can.  Asked with no program and no size of a test."""
    for tool in ("unshare", "mount"):
        if shutil.which(tool) is None:
            return f"there is no {tool} in the PATH"
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "t", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr.strip() or f"{command[0]} ended with {done.returncode}"
