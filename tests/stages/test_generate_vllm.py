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


def test_kills_and_several_engines_leave_the_candidates_of_an_undisturbed_run(
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

    two = bnfctl(*args, "--home", tmp_path / "two", "--devices", "2", timeout=600)
    assert two.code == 0, two.err
    for other in (resumed, two):
        assert other.json["digest"] == calm.json["digest"]
        assert other.json["summary"] == calm.json["summary"]
    assert list((tmp_path / "two").rglob("log/worker-1.log")) and not list(
        (tmp_path / "calm").rglob("log/worker-1.log")
    )
    provenance = Artifact(Path(two.json["artifact"])).manifest.provenance
    assert provenance["engine"].startswith("vllm ") and provenance["tokens_per_second"] > 0
    check(Artifact(Path(resumed.json["artifact"])))


def check(candidates: Artifact) -> None:
    """Rows and summary agree with each other and with what was asked for."""
    rows, summary = list(candidates.rows()), candidates.manifest.summary
    assert Counter(row["prompt_id"] for row in rows) == dict.fromkeys({row["prompt_id"] for row in rows}, N)
    assert len(rows) == PROMPTS * N
    assert all(row["seed"] == prompt_seed(0, row["prompt_id"]) + row["sample"] for row in rows)
    assert Counter(row["finish_reason"] for row in rows).keys() <= {"stop", "length"}
    assert all(len(row["token_ids"]) == 64 or row["finish_reason"] == "stop" for row in rows)
    assert sum(summary["lengths"].values()) == PROMPTS * N
    assert summary["cut"] == sum(row["finish_reason"] == "length" for row in rows)
