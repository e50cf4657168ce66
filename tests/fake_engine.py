"""A server in the manner of vLLM's, as a program: it lists one model for those who have the key, and has an engine.

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--name", default="fake")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--fail", default="")
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

    class Models(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/die":
                os._exit(5)
            good = self.headers.get("Authorization") == f"Bearer {key}"
            body = json.dumps({"data": [{"id": asked.name, "owned_by": "vllm"}]} if good else {"error": "no"}).encode()
            self.send_response(200 if good else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    HTTPServer((asked.host, asked.port), Models).serve_forever()


main()
