"""A process that asks on a file of answers: `python -m tests.client.asking JSON`, a line for every answer, usage last."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bnfctl import console
from bnfctl.client.endpoint import Client
from bnfctl.client.requests import CHAT, Request, read_chat
from bnfctl.client.servers import Backoff
from bnfctl.errors import BnfctlError
from tests.stub_server import text_of

REPOSITORY = Path(__file__).parents[2]


def question(number: int) -> Request:
    body = {"model": "stub", "messages": [{"role": "user", "content": f"say {number}"}], "seed": number}
    return Request(number, CHAT, body, read_chat)


def expected(numbers: Iterable[int]) -> dict[int, str]:
    return {number: text_of(question(number).body, 0) for number in numbers}


def long_text(body: dict[str, Any], child: int) -> str:
    """Of 3 KB, which packing leaves at more than half."""
    return random.Random(text_of(body, child)).randbytes(1500).hex()


def asks(url: str, file: Path, **changes: Any) -> Client:
    given = {"concurrency": 8, "timeout": 30.0, "retries": 2, "max_calls": None, **changes}
    return Client([url], api_key_env="OPENAI_API_KEY", answers=file, backoff=Backoff(0.01, 0.05), **given)


class Asking:
    """Another process that asks; use as a context, which ends it."""

    def __init__(self, url: str, file: Path, numbers: Iterable[int], **changes: Any) -> None:
        given = json.dumps({"url": url, "file": str(file), "numbers": list(numbers), **changes})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.client.asking", given], cwd=REPOSITORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def line(self) -> Any:
        """The next one, once it is there."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def end(self) -> tuple[dict[int, str], dict[str, Any], str]:
        """(number -> text, usage and error, stderr) when it has ended; after a kill, without the usage."""
        out, errors = self.process.communicate(timeout=60)
        lines = [json.loads(line) for line in out.splitlines() if line.endswith("]") or line.endswith("}")]
        usage = lines.pop() if lines and isinstance(lines[-1], dict) else {}
        return dict(lines), usage, errors


def main(given: dict[str, Any]) -> None:
    console.catch_signals()
    if size := given.pop("file_size", None):  # of any file, in bytes: like a disk that is nearly full
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    client = asks(given.pop("url"), Path(given.pop("file")), **{k: v for k, v in given.items() if k != "numbers"})
    failure = None
    try:
        for number, answer in client.ask(map(question, given["numbers"])):
            print(json.dumps([number, answer["choices"][0]["text"]]), flush=True)
    except BnfctlError as error:
        failure = error.what
    print(json.dumps({**client.usage, "error": failure}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
