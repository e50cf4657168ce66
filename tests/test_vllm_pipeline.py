"""The pipeline with the real vLLM engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Done

pytestmark = pytest.mark.vllm


def test_the_smoke_pipeline_and_the_aligned_model_run_on_vllm(bnfctl: Callable[..., Done]) -> None:
    done = bnfctl("run", REPOSITORY / "pipelines" / "smoke.yaml", "--json", "--set", "vars.sampler=vllm", timeout=900)
    assert done.code == 0, done.err
    steps = {step["step"]: step for step in done.json["steps"]}
    for name in ("responses", "base-eval", "aligned-eval"):
        manifest = bnfctl("show", steps[name]["artifact"], "--json").json
        assert manifest["provenance"]["engine"].startswith("vllm ")
    assert steps["aligned-eval"]["summary"]["tasks"]["lab-chat"]["models"].popitem()[1]["paired"] == 16
    again = bnfctl("run", REPOSITORY / "pipelines" / "smoke.yaml", "--json", "--set", "vars.sampler=vllm")
    assert all(step["cached"] for step in again.json["steps"])


def test_a_run_that_was_stopped_gives_the_same_candidates(tmp_path: Path, bnfctl: Callable[..., Done]) -> None:
    args = ("generate", "--model", "lab", "--prompts", "lab:chat", "--limit", "24", "--chunk", "8", "--max-tokens", "40",
            "--sampler", "vllm", "--json")  # fmt: skip
    calm = bnfctl(*args, "--home", tmp_path / "calm", timeout=600)
    assert calm.code == 0, calm.err
    # The 17th durable step lies after the first chunk: before it the config, the prompts and their counts are written.
    killed = bnfctl(*args, "--home", tmp_path / "killed", env={"BNFCTL_FAULT_AT": "17"}, timeout=600)
    assert killed.code == -9, killed.err
    assert list((tmp_path / "killed").rglob("parts/*.parquet"))
    resumed = bnfctl(*args, "--home", tmp_path / "killed", timeout=600)
    assert "resuming:" in resumed.err
    assert resumed.json["digest"] == calm.json["digest"]
