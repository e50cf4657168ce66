"""generate: what a row holds, what the key covers, and that an interruption leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bnfctl import launch
from bnfctl.artifact import Store
from bnfctl.config import GenerateConfig
from bnfctl.errors import UsageError
from tests.models import BOS, TEMPLATE, make_llama
from tests.stages.chain import PROMPTS, SAMPLES, Chain, interrupt, prompt_rows, published, run, write_jsonl

BEGIN = 256
STOPS = (257, 259)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(5))


def asked(prompts: Path, policy: Path, **changes: Any) -> GenerateConfig:
    few: dict[str, Any] = {"sampler": "hf", "n": 2, "max_tokens": 6, "chunk": 2}
    return GenerateConfig(**{"prompts": str(prompts), "model": str(policy), **few, **changes})


def test_rows_are_the_samples_in_prompt_order(chain: Chain) -> None:
    rows = list(chain.candidates.rows())
    wanted = [(f"q{i}", sample) for i in range(PROMPTS) for sample in range(SAMPLES)]
    assert [(row["prompt_id"], row["sample"]) for row in rows] == wanted
    for row in rows:
        number = int(row["prompt_id"][1:])
        assert row["prompt"] == [{"role": "user", "content": f"What is {number} + {number}?"}]
        assert row["answer"] == str(2 * number)
        assert isinstance(row["seed"], int) and 0 <= row["seed"] < 2**53
    summary = chain.candidates.manifest.summary
    assert (summary["prompts"], summary["candidates"]) == (PROMPTS, PROMPTS * SAMPLES)
    assert summary["cut"] == sum(row["finish_reason"] == "length" for row in rows)


def test_the_rendered_prompt_has_exactly_one_bos(chain: Chain) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chain.policy)
    assert tokenizer.encode("a")[0] == BEGIN and "bos_token" in TEMPLATE, "both add one, which is the trap"
    for row in chain.candidates.rows():
        text = f"{BOS}<|user|>{row['prompt'][0]['content']}<|turn_end|><|assistant|>"
        assert row["prompt_ids"] == tokenizer.encode(text, add_special_tokens=False)
        assert row["prompt_ids"].count(BEGIN) == 1


@pytest.mark.parametrize("options", [{"template": TEMPLATE.replace("{{- bos_token -}}", "")}, {"adds_bos": False}])
def test_one_bos_whoever_adds_it(options: dict[str, Any], prompts: Path, tmp_path: Path, store: Store) -> None:
    folder = make_llama(tmp_path / "other", **options)
    for row in run(asked(prompts, folder, limit=1), store).rows():
        assert row["prompt_ids"].count(BEGIN) == 1 and row["prompt_ids"][0] == BEGIN


def test_ids_end_with_a_stop_id_exactly_where_the_model_stopped(chain: Chain) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chain.policy)
    found = set()
    for row in chain.candidates.rows():
        found.add(row["finish_reason"])
        stopped = row["finish_reason"] == "stop"
        assert (row["token_ids"][-1] in STOPS) == stopped
        content = row["token_ids"][:-1] if stopped else row["token_ids"]
        assert not set(content) & set(STOPS)
        assert stopped or len(content) == 10
        assert row["text"] == tokenizer.decode(content, skip_special_tokens=True)
    assert found == {"stop", "length"}


def test_the_same_config_is_cached_and_another_seed_is_another_key(prompts: Path, policy: Path, store: Store) -> None:
    first = launch.execute("generate", asked(prompts, policy), store)
    again = launch.execute("generate", asked(prompts, policy), store)
    other = launch.execute("generate", asked(prompts, policy, seed=1), store)
    assert (first.cached, again.cached, other.cached) == (False, True, False)
    assert again.artifact.path == first.artifact.path
    assert other.artifact.manifest.key != first.artifact.manifest.key
    assert [r["token_ids"] for r in other.artifact.rows()] != [r["token_ids"] for r in first.artifact.rows()]


def test_a_changed_prompt_file_is_another_key(prompts: Path, policy: Path, store: Store) -> None:
    before = launch.plan("generate", asked(prompts, policy), store, lambda first: None).key
    write_jsonl(prompts, prompt_rows(4))
    assert launch.plan("generate", asked(prompts, policy), store, lambda first: None).key != before


def test_a_resumed_run_gives_the_digest_of_an_undisturbed_one(
    prompts: Path, policy: Path, store: Store, tmp_path: Path
) -> None:
    config = asked(prompts, policy)
    interrupt(config, store)
    parts = list(store.home.glob(".drafts/*/scratch/parts/*.parquet"))
    assert [part.name for part in parts] == ["0000000.parquet"], "the first of three chunks"
    assert published(store) == []
    resumed = run(config, store)
    written = resumed.manifest.provenance
    undisturbed = run(config, Store(tmp_path / "undisturbed"))
    assert resumed.manifest.digest == undisturbed.manifest.digest
    assert resumed.manifest.summary == undisturbed.manifest.summary
    assert written["engine"].startswith("transformers ")
    assert not (resumed.path / "scratch").exists()


def test_a_chunk_that_is_there_is_not_sampled_again(
    prompts: Path, policy: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    config = asked(prompts, policy)
    interrupt(config, store)
    interrupt(config, store)
    assert len(list(store.home.glob(".drafts/*/scratch/parts/*.parquet"))) == 2
    run(config, store)
    assert "resuming: 2 of 3 chunks are there" in capsys.readouterr().err


def test_a_long_prompt_is_an_error_with_its_line_or_a_count(policy: Path, store: Store, tmp_path: Path) -> None:
    rows = [{"id": "short", "prompt": "Hi"}, {"id": "long", "prompt": "x" * 300}]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    with pytest.raises(UsageError, match=r"prompt long has \d+ tokens; the model's context is 256") as caught:
        run(asked(path, policy), store)
    assert caught.value.where == f"{path}:2"
    assert caught.value.hint is not None and "--long-prompts drop" in caught.value.hint
    assert published(store) == []
    kept = run(asked(path, policy, long_prompts="drop"), store)
    assert {row["prompt_id"] for row in kept.rows()} == {"short"}
    assert (kept.manifest.summary["dropped_long"], kept.manifest.summary["prompts"]) == (1, 1)


def test_the_context_ends_a_response_sooner(policy: Path, store: Store, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "nearly.jsonl", [{"id": "nearly", "prompt": "x" * 248}])
    for row in run(asked(path, policy, max_tokens=50, n=4), store).rows():
        assert len(row["prompt_ids"]) == 252
        assert len(row["token_ids"]) == 4 or row["finish_reason"] == "stop"


def test_repeated_prompts_are_counted_and_limit_takes_the_first(policy: Path, store: Store, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "twice.jsonl", [{"prompt": "A"}, {"prompt": "A"}, {"prompt": "B"}, {"prompt": "C"}])
    made = run(asked(path, policy, limit=2, n=1), store)
    assert [row["prompt"][0]["content"] for row in made.rows()] == ["A", "B"]
    assert made.manifest.summary["repeated"] == 1


def test_several_greedy_responses_are_refused(prompts: Path, policy: Path, store: Store) -> None:
    with pytest.raises(UsageError, match="greedy responses") as caught:
        run(asked(prompts, policy, temperature=0.0), store)
    assert caught.value.where == "--n"
    (row, *_) = run(asked(prompts, policy, temperature=0.0, n=1), store).rows()
    assert row["sample"] == 0


def test_the_file_sampler_imports_responses_without_a_model(store: Store, tmp_path: Path) -> None:
    rows = [
        {"id": 1, "prompt": "2 + 2?", "answer": 4, "responses": ["4", {"text": "five", "model": "m"}]},
        {"id": 2, "messages": [{"role": "user", "content": "Hi"}], "response": "Hello"},
    ]
    path = write_jsonl(tmp_path / "responses.jsonl", rows)
    made = run(GenerateConfig(prompts=str(path), sampler="file"), store)
    found = [(r["prompt_id"], r["sample"], r["text"], r["source"], r["answer"]) for r in made.rows()]
    assert found == [("1", 0, "4", None, "4"), ("1", 1, "five", "m", "4"), ("2", 0, "Hello", None, None)]
    for row in made.rows():
        assert {row[name] for name in ("token_ids", "finish_reason", "seed", "prompt_ids")} == {None}
    assert made.manifest.summary == {"prompts": 2, "candidates": 3, "tokenizer": None}
    assert list(made.manifest.inputs) == ["prompts"]


def test_a_model_is_needed_unless_responses_are_imported(prompts: Path, store: Store) -> None:
    with pytest.raises(UsageError, match="model is missing") as caught:
        run(GenerateConfig(prompts=str(prompts), sampler="hf"), store)
    assert caught.value.where == "--model"
