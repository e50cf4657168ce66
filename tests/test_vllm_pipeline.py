"""The pipeline with the real vLLM engine."""

from __future__ import annotations

from collections.abc import Callable

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
