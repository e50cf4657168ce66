"""A server in the manner of vLLM's, as a program: it has one model, for those who have the key, and an engine.

Its model says that A is much better.
Its engine is a process of its own that ignores what ends servers politely, as one that is busy on a GPU does.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--name", default="fake")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--fail", default="")
    parser.add_argument("--calls", type=int, default=1 << 30, help="answered before it dies")
    parser.add_argument("--stubborn", action="store_true")
    parser.add_argument("--notes", type=Path)
    asked = parser.parse_args()
    key = os.environ["VLLM_API_KEY"]
    if asked.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    engine = subprocess.Popen([sys.executable, "-c", sleep])
    note = {"pids": [os.getpid(), engine.pid], "session": os.getsid(0), "host": asked.host, "port": asked.port,
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "extra": os.environ.get("EXTRA"), "key": key}  # fmt: skip
    (asked.notes / f"{asked.port}.new").write_text(json.dumps(note))
    (asked.notes / f"{asked.port}.new").rename(asked.notes / f"{asked.port}.json")
    print("loading shard 1 of 1", flush=True)
    time.sleep(asked.slow)
    if asked.fail == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if asked.fail:
        print(f"(EngineCore pid=7) ValueError: {asked.fail}", file=sys.stderr)
        print("RuntimeError: Engine core initialization failed. See root cause above.", file=sys.stderr)
        sys.exit(3)

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content: dict[str, Any]) -> None:
            good = self.headers.get("Authorization") == f"Bearer {key}"
            body = json.dumps(content if good else {"error": "no"}).encode()
            self.send_response(200 if good else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path == "/die":
                os._exit(5)
            self.answer({"data": [{"id": asked.name, "owned_by": "vllm"}], "version": "0.0"})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if not asked.calls:
                print("MemoryError: no room for one more", flush=True)
                os._exit(5)
            asked.calls -= 1
            message = {"role": "assistant", "content": "[[A>>B]]"}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            self.answer(
                {"choices": choices, "usage": {"prompt_tokens": 9, "completion_tokens": 2}, "model": asked.name}
            )

        def log_message(self, *_: object) -> None:
            pass

    HTTPServer((asked.host, asked.port), Handler).serve_forever()


main()
