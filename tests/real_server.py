"""vLLM's own OpenAI server for tests, on a free port of 127.0.0.1; it ends with the test, whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

_SECONDS = 240.0
"""To come up: 20 s on an idle machine."""


@contextmanager
def vllm_server(model: Path, *, context: int = 256, name: str = "tiny") -> Iterator[str]:
    """The base URL of a server of `model` (float32, CPU settings under which seeds work)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", name,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len",
        str(context), "--block-size", "32", "--kv-cache-memory-bytes", str(128 << 20), "--no-enable-chunked-prefill",
        "--max-num-batched-tokens", "8192",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        # a session of its own: its worker process ends with it
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}/v1"
            _wait(server, url)
            yield url
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-4000:])
            raise
        finally:
            _end(server)


def _wait(server: subprocess.Popen[bytes], url: str) -> None:
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        assert server.poll() is None, f"the server ended with {server.returncode}"
        try:
            if httpx.get(f"{url}/models", trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"no server after {_SECONDS:.0f} s")


def _end(server: subprocess.Popen[bytes]) -> None:
    """Its whole process group, politely first."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, signum)
            server.wait(20)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    server.wait()
