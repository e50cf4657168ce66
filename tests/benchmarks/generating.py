"""Tokens per second of `bnfctl generate` against bare vLLM: the same model, prompts, settings and seeds.

Run by hand, where vLLM is installed: python -m tests.benchmarks.generating [--model FOLDER]

Each run is a process of its own.  The engine's start is left out of both; rendering the prompts is in both.  For
bnfctl that leaves "sampling" (from the first chunk to the last one saved, as its artifact says) and "command" (all
that `bnfctl generate` does besides starting the engine: reading and checking prompts, rewriting and measuring rows).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.clock import clocked, count_cpu_time, now

GOAL = 0.95
"""Of bare vLLM's tokens per second, while sampling."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a chat model; default: a random Llama with two layers of 64")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3, help="of each, in turn; the fastest counts")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds: other load matters less to them")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(Path(folder), options)
        results: dict[str, list[dict[str, Any]]] = {"bare": [], "bnfctl": []}
        for _ in range(options.runs):
            for name, found in results.items():
                found.append(run_child(name, job))
                print(name, json.dumps(found[-1]), file=sys.stderr, flush=True)
    tokens = {result["tokens"] for found in results.values() for result in found}
    assert len(tokens) == 1, f"not the same work: {tokens}"
    bare = min(result["seconds"] for result in results["bare"])
    print(f"{options.prompts} prompts x {options.n}, {tokens.pop():,} tokens, "
          f"{'CPU seconds' if options.cpu_time else 'seconds'}, fastest of {options.runs}")  # fmt: skip
    print(f"bare vLLM         {bare:7.2f} s")
    for part in ("sampling", "command"):
        ours = min(result[part] for result in results["bnfctl"])
        print(f"bnfctl, {part:9} {ours:7.2f} s   {bare / ours:.3f} of bare vLLM's tokens/s")
    share = bare / min(result["sampling"] for result in results["bnfctl"])
    print(f"goal: {GOAL:g} while sampling: {'met' if share >= GOAL else 'missed'}")


def prepare(folder: Path, options: argparse.Namespace) -> Path:
    """A file that says what to do, with the prompts and the model beside it."""
    from tests.models import make_llama

    model = options.model or str(make_llama(folder / "model", context=512, stop=1.0))
    rows = [{"id": str(i), "prompt": f"Tell me {i} things about {'abcdefghij'[i % 10] * (1 + i % 40)}."}
            for i in range(options.prompts)]  # fmt: skip
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {"model": model, "prompts": str(folder / "prompts.jsonl"), "n": options.n, "cpu_time": options.cpu_time,
           "max_tokens": options.max_tokens}  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    return folder / "job.json"


def run_child(name: str, job: Path) -> dict[str, Any]:
    """The measurement of one process."""
    command = [sys.executable, "-m", "tests.benchmarks.generating", "--child", name, str(job)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={"OMP_NUM_THREADS": "1", **os.environ}
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def child(name: str, job_path: Path) -> None:
    from bnfctl import console

    console.claim_stdout()
    job = json.loads(job_path.read_text())
    started = time.perf_counter()
    if job["cpu_time"]:
        count_cpu_time()
    result = bare(job) if name == "bare" else bnfctl(job, job_path.parent)
    console.emit(json.dumps({**result, "process": round(time.perf_counter() - started, 2)}))


def bare(job: dict[str, Any]) -> dict[str, Any]:
    """One call of the engine's `generate`, with all prompts."""
    from transformers import AutoTokenizer

    from bnfctl.data.chat import stop_ids
    from bnfctl.model.vllm import load_engine
    from bnfctl.samplers import prompt_seed

    folder = Path(job["model"])
    vllm, engine = load_engine(
        folder, dtype="auto", gpu_memory=0.9, trust_remote_code=False, instead="nothing", generation_config="vllm",
        enable_prefix_caching=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = stop_ids(folder, tokenizer)
    started = now()
    rows = [json.loads(line) for line in Path(job["prompts"]).read_text().splitlines()]
    prompts, parameters = [], []
    for row in rows:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        prompts.append(vllm.TokensPrompt(prompt_token_ids=tokenizer.encode(text, add_special_tokens=False)))
        parameters.append(vllm.SamplingParams(
            n=job["n"], seed=prompt_seed(0, row["id"]), temperature=0.8, top_p=0.95, max_tokens=job["max_tokens"],
            stop_token_ids=stops, detokenize=False,
        ))  # fmt: skip
    made = engine.generate(prompts, parameters, use_tqdm=False)
    seconds = now() - started
    return {"tokens": sum(len(one.token_ids) for of_prompt in made for one in of_prompt.outputs), "seconds": seconds}


def bnfctl(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The generate stage in this process, with an empty store."""
    from transformers import AutoTokenizer

    from bnfctl import launch
    from bnfctl.artifact import Store
    from bnfctl.config import GenerateConfig
    from bnfctl.samplers.vllm import VLLMSampler
    from bnfctl.stages.generate import Sampling

    config = GenerateConfig(
        prompts=job["prompts"], model=job["model"], sampler="vllm", n=job["n"], max_tokens=job["max_tokens"], devices=1
    )
    with tempfile.TemporaryDirectory(dir=folder) as home:
        first: list[float] = []
        inner = Sampling.run

        def sampling(self: Sampling, units: Any) -> Any:
            first.append(now())
            yield from inner(self, units)
            first.append(now())

        Sampling.run = sampling  # type: ignore[method-assign]
        AutoTokenizer.from_pretrained(job["model"])  # the imports that bare vLLM's engine start has in it
        started = now()
        with clocked(VLLMSampler, "__init__") as loading:
            artifact = launch.execute("generate", config, Store(Path(home))).artifact
        seconds = now() - started - sum(loading)
        tokens = sum(len(row["token_ids"]) for row in artifact.rows(["token_ids"]))
    return {"tokens": tokens, "sampling": first[1] - first[0], "command": seconds}


if __name__ == "__main__":
    main()
