"""generate with the real vLLM engine: kills, resumes and several engines leave no trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from bnfctl.artifact import Artifact, Store
from bnfctl.config import GenerateConfig
from bnfctl.samplers import prompt_seed
from tests.conftest import Done
from tests.stages.kills import kill_at

pytestmark = pytest.mark.vllm
PROMPTS, N, CHUNK = 200, 5, 16


def test_killed_and_resumed_by_two_engines_gives_the_candidates_of_an_undisturbed_run(
    tmp_path: Path, bnfctl: Callable[..., Done]
) -> None:
    config = GenerateConfig(
        prompts="lab:chat", model="lab", sampler="vllm", limit=PROMPTS, n=N, chunk=CHUNK, max_tokens=64
    )
    args = ("generate", "--model", "lab", "--prompts", "lab:chat", "--sampler", "vllm", "--limit", str(PROMPTS),
            "--n", str(N), "--chunk", str(CHUNK), "--max-tokens", "64", "--json")  # fmt: skip
    calm = bnfctl(*args, "--home", tmp_path / "calm", timeout=600)
    assert calm.code == 0, calm.err

    parts = kill_at(2, config, Store(tmp_path / "killed"), timeout=300)
    assert 2 <= parts < -(-PROMPTS // CHUNK), "killed in the middle"
    resumed = bnfctl(*args, "--home", tmp_path / "killed", "--devices", "2", timeout=600)
    assert resumed.code == 0, resumed.err
    assert f"resuming: {parts} of {-(-PROMPTS // CHUNK)} chunks are there" in resumed.err
    assert resumed.json["digest"] == calm.json["digest"]
    assert resumed.json["summary"] == calm.json["summary"]

    rows = list(Artifact(Path(resumed.json["artifact"])).rows())
    assert Counter(row["prompt_id"] for row in rows) == dict.fromkeys({row["prompt_id"] for row in rows}, N)
    assert len(rows) == PROMPTS * N
    assert all(row["seed"] == prompt_seed(0, row["prompt_id"]) + row["sample"] for row in rows)
    assert Counter(row["finish_reason"] for row in rows).keys() <= {"stop", "length"}
    assert all(len(row["token_ids"]) == 64 or row["finish_reason"] == "stop" for row in rows)
    summary = calm.json["summary"]
    assert sum(summary["lengths"].values()) == PROMPTS * N
    assert summary["cut"] == sum(row["finish_reason"] == "length" for row in rows)


def test_two_engines_from_the_start(tmp_path: Path, bnfctl: Callable[..., Done]) -> None:
    args = ("generate", "--model", "lab", "--prompts", "lab:reasoning", "--sampler", "vllm", "--limit", "40",
            "--n", "2", "--chunk", "4", "--max-tokens", "32", "--json")  # fmt: skip
    one, two = (bnfctl(*args, "--home", tmp_path / str(i), "--devices", str(i), timeout=600) for i in (1, 2))
    assert (one.code, two.code) == (0, 0), two.err
    assert one.json["digest"] == two.json["digest"]
    assert list((tmp_path / "2").rglob("log/worker-1.log")) and not list((tmp_path / "1").rglob("log/worker-1.log"))
    provenance = Artifact(Path(two.json["artifact"])).manifest.provenance
    assert provenance["engine"].startswith("vllm ") and provenance["tokens_per_second"] > 0
