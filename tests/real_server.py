"""vLLM's own OpenAI server for tests, with its key where clients look for one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bnfctl.client.local import KEY_ENV, serving
from bnfctl.client.servers import DEFAULT_KEY
from bnfctl.model.vllm import server_command


@contextmanager
def vllm_server(model: Path, *, context: int = 256, name: str = "tiny") -> Iterator[str]:
    """The base URL of a server of `model` in float32; its log is shown where starting it fails."""
    command, environment = server_command(
        model, name, dtype="float32", gpu_memory=0.3, trust_remote_code=False, instead="--server URL", context=context
    )
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        with serving(command, environment, name, log=Path(folder) / "server.log") as (url,):
            patch.setenv(DEFAULT_KEY, os.environ[KEY_ENV])
            yield url
