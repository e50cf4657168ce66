"""Judged tasks with a judge that vLLM serves, started by the run itself or running elsewhere: what goes over the wire.

The judge is a model without attention: after a prompt it says one label of Arena-Hard, and where only JSON may follow,
an object of WildBench.  So all verdicts are known, and the JSON mode is seen to be asked for.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bnfctl.artifact import Artifact, Store
from bnfctl.client import local
from bnfctl.config import EvalConfig
from bnfctl.errors import BnfctlError
from bnfctl.launch import execute
from tests import models
from tests.conftest import Done
from tests.processes import alive, processes_with
from tests.real_server import vllm_server
from tests.tasks.judged_world import answer_row, arena, wild_row, write

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
LABEL, OBJECT = "[[A>>B]]", '{"score":"7"}'
COUNT = 3
CONTEXT = 8192
"""The prompts are of 3,000 bytes, each a token, and a judgment may have 4,096."""


def make_judge(folder: Path) -> Path:
    """Says LABEL, or OBJECT where a JSON object must follow, and ends its turn."""
    import torch
    from tokenizers import AddedToken
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = models.make_tokenizer(folder)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (LABEL, OBJECT)])
    tokenizer.save_pretrained(folder)
    label, answer, start, end = tokenizer.convert_tokens_to_ids([LABEL, OBJECT, "<|assistant|>", models.TURN_END])
    shape = {**models._shape(CONTEXT), "vocab_size": models.VOCABULARY + 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=258, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
        seen, said = model.model.embed_tokens.weight, model.lm_head.weight
        seen[:, 0] = 1.0
        seen[start], seen[[label, answer]] = torch.eye(64)[1], torch.eye(64)[2]
        said[label, 1], said[answer, 1], said[end, 2] = 9.0, 8.0, 9.0
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, end]}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judge(tmp_path_factory.mktemp("models") / "the-judge")


def data_folder(folder: Path) -> Path:
    data = arena(folder, COUNT, 2024).data_dir
    assert data is not None
    write(data / "wildbench.jsonl", [wild_row(n) for n in range(COUNT)])
    return data


def processes_of(folder: Path) -> list[int]:
    return [pid for pid in processes_with(str(folder)) if alive(pid)]


def check_arena(found: dict[str, Any], rows: list[dict[str, Any]], model: str, name: str) -> None:
    """A wins every game: the baseline in the first, the model in the second."""
    assert [row["grade"] for row in rows] == [0.5] * COUNT
    assert [json.loads(row["extra"])["verdicts"] for row in rows] == [["A>>B", "A>>B"]] * COUNT
    for answer in (json.loads(row["answers"])[part] for row in rows for part in ("game1", "game2")):
        assert [choice["text"] for choice in answer[0]["choices"]] == [LABEL] and len(answer) == 1
        assert answer[0]["choices"][0]["finish"] == "stop"
        assert answer[0]["usage"]["completion_tokens"] == 2 and answer[0]["usage"]["prompt_tokens"] > 1000
        assert answer[0]["server"]["model"] == name
    figures = found["models"][model]
    assert (figures["mean"], figures["n"], figures["ungraded"]) == (0.5, COUNT, 0)
    who = figures["judge"]
    assert who["served_model"] == name and who["server"].startswith(f"server {name}, vllm ")
    assert who["answered_as"] == [name] and who["parameters"]["temperature"] == 0.0


def test_a_judge_that_the_run_starts_itself(judge: Path, tmp_path: Path, bnfctl: Callable[..., Done]) -> None:
    policy = models.make_llama(tmp_path / "policy", stop=0.5)
    common = ("--data-dir", data_folder(tmp_path), "--sampler", "hf", "--json")
    done = bnfctl("eval", policy, "--tasks", "arena-hard,wildbench", "--judge", judge, *common, timeout=600)
    assert done.code == 0, done.err
    assert not processes_of(judge), "the server outlives the run"

    artifact = Artifact(Path(done.json["artifact"]))
    name = f"the-judge@{artifact.manifest.inputs['judge']['digest'][:12]}"
    assert f"starting a server of {name}; its log: " in done.err and f"{name} is up after" in done.err
    rows = {name: [row for row in artifact.rows() if row["task"] == name] for name in ("arena-hard", "wildbench")}
    tasks = artifact.manifest.summary["tasks"]
    assert all(row["tokens"] > 0 and row["response"] for row in rows["arena-hard"] + rows["wildbench"])
    check_arena(tasks["arena-hard"], rows["arena-hard"], "policy", name)
    assert [row["grade"] for row in rows["wildbench"]] == [7.0] * COUNT
    assert [json.loads(row["answers"])["score"][0]["choices"][0]["text"] for row in rows["wildbench"]] == [
        OBJECT
    ] * COUNT
    usage = artifact.manifest.provenance["usage"]
    assert (usage["requests"], usage["cached"], usage["completion_tokens"]) == (3 * COUNT, 0, 6 * COUNT)
    assert (artifact.path / "log" / "judge.log").stat().st_size > 0
    assert local.KEY_ENV not in (artifact.path / "manifest.json").read_text()


def test_a_judge_that_runs_elsewhere(
    judge: Path, tmp_path: Path, store: Store, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "theirs.jsonl", [answer_row(n, f"text {n}", "theirs", 2024) for n in range(COUNT)])
    with vllm_server(judge, context=CONTEXT, name="the-judge") as url:
        config = EvalConfig(
            tasks=("arena-hard",), responses=(str(file),), data_dir=str(data_folder(tmp_path)), server=(url,), retries=1
        )
        artifact = execute("eval", config, store).artifact
        assert "6 calls, 0 answered before" in capfd.readouterr().err
        check_arena(artifact.manifest.summary["tasks"]["arena-hard"], list(artifact.rows()), "theirs", "the-judge")
        again = execute("eval", config, store, force=True).artifact
        assert "0 calls, 6 answered before" in capfd.readouterr().err
        assert again.manifest.digest == artifact.manifest.digest
        monkeypatch.setenv("ANOTHER_KEY", "nonsense")
        with pytest.raises(BnfctlError, match="401"):
            execute("eval", dataclasses.replace(config, api_key_env="ANOTHER_KEY"), store, force=True)
