"""generate and score on servers, as a user types them: killed, resumed elsewhere, found again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import Done
from tests.stub_server import StubServer, text_of


def say(body: dict[str, Any], child: int) -> str:
    """A judge prefers the response that comes first in the alphabet."""
    text = body["messages"][0]["content"]
    if "<<< response A" not in text:
        return text_of(body, child)
    first, second = (text.split(f"<<< response {name} ")[1].splitlines()[1] for name in "AB")
    return f"[[{'AB'[second < first]}]]"


def test_generate_and_score_on_servers(tmp_path: Path, warm_bnfctl: Callable[..., Done]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(40)))
    generate = ("generate", "--prompts", prompts, "--sampler", "server", "--n", "3", "--chunk", "8", "--json")
    with StubServer(say=say) as one, StubServer(say=say) as two, StubServer(say=say) as three:
        calm = warm_bnfctl(*generate, "--server", one.url, "--home", tmp_path / "calm")
        assert calm.code == 0, calm.err
        killed = warm_bnfctl(*generate, "--server", two.url, "--concurrency", "2", env={"BNFCTL_FAULT_AT": "30"})
        assert killed.code == -9, killed.err
        resumed = warm_bnfctl(*generate, "--server", three.url, "--concurrency", "9")
        assert resumed.code == 0, resumed.err
        assert resumed.json["digest"] == calm.json["digest"]
        assert 0 < len(three.asked) < 40
        assert len(set(two.asked) & set(three.asked)) <= 4  # under way at the kill
        found = warm_bnfctl(*generate, "--served-model", "stub", "--server", "http://127.0.0.1:1/v1")
        assert found.json["cached"], found.err
        assert "not installed" not in found.err

        score = ("score", resumed.json["artifact"], "--scorer", "judge", "--server", one.url, "--json")
        scored = warm_bnfctl(*score)
        assert scored.code == 0, scored.err
        assert scored.json["summary"] == {"candidates": 120, "null_rewards": 0, "mean_reward": 0.5}
        row = json.loads(warm_bnfctl("show", scored.json["artifact"], "--rows", "1").out)
        assert row["reward"] in (0.0, 0.5, 1.0)
        assert {pair["text"] for pair in json.loads(row["extra"])["pairs"]} <= {"[[A]]", "[[B]]"}
        other = warm_bnfctl(*score, "--judge-prompt", tmp_path / "none.txt")
        assert (other.code, other.json["where"]) == (2, "--judge-prompt")
