"""generate: what a row holds, what the key covers, and that an interruption leaves no trace."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bnfctl import launch, machine, pool, shards
from bnfctl.artifact import Store
from bnfctl.client import served
from bnfctl.config import GenerateConfig
from bnfctl.data.candidates import SCHEMA
from bnfctl.data.records import Prompt
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.stages import generate
from tests.models import BOS, TEMPLATE, make_llama
from tests.stages.chain import PROMPTS, SAMPLES, Chain, interrupt, prompt_rows, published, run, write_jsonl
from tests.stages.kills import kill_at
from tests.stub_server import Call, StubServer

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


@pytest.mark.slow
def test_two_workers_and_a_kill_leave_the_digest_of_an_undisturbed_run(
    policy: Path, store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "many.jsonl", prompt_rows(24))
    config = asked(path, policy, chunk=1, max_tokens=40, dtype="float32")
    parts = kill_at(3, dataclasses.replace(config, devices=2), store)
    assert 3 <= parts < 24, "killed in the middle"
    resumed = run(config, store)
    assert f"resuming: {parts} of 24 chunks are there" in capfd.readouterr().err
    undisturbed = run(config, Store(tmp_path / "undisturbed"))
    assert resumed.manifest.digest == undisturbed.manifest.digest
    assert resumed.manifest.summary == undisturbed.manifest.summary
    assert resumed.manifest.provenance["tokens_per_second"] > 0
    assert (resumed.path / "log" / "worker-1.log").exists(), "the killed run had two"


def test_prompts_are_not_read_again_when_a_run_is_resumed(
    prompts: Path, policy: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = asked(prompts, policy)
    interrupt(config, store)
    undisturbed = run(config, Store(store.home / "undisturbed"))

    def never(*args: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(generate, "read_prompts", never)
    resumed = run(config, store)
    assert resumed.manifest.digest == undisturbed.manifest.digest
    assert resumed.manifest.summary == undisturbed.manifest.summary


def test_prompts_are_spooled_without_holding_them(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "x" * 4000

    def many(pinned: Any, config: GenerateConfig, counts: Counter[str]) -> Iterator[Prompt]:
        for number in range(12_000):
            yield Prompt(str(number), ({"role": "user", "content": f"{number} {text}"},), where=f"line {number}")
        counts["repeated"] += 3

    monkeypatch.setattr(generate, "read_prompts", many)
    config = GenerateConfig(prompts="lab:chat", sampler="server", server=("http://127.0.0.1:9/v1",), served_model="m")
    with store.draft(launch.plan("generate", config, store, lambda first: None)) as draft:
        draft.open()
        tracemalloc.start()
        try:
            counts = generate._spool(config, draft, None)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert counts == {"prompts": 12_000, "repeated": 3, "dropped_long": 0}
        assert peak < 12 << 20, "48 MB of prompts went through"
        rows = shards.Slices(sorted((draft.scratch / "prompts").glob("*.parquet")))
        (row,) = rows.read(9000, 9001)
        assert (row["id"], row["where"], row["messages"][0]["content"][:5]) == ("9000", "line 9000", "9000 ")


def test_the_summary_says_how_long_and_how_different_the_responses_are(
    prompts: Path, policy: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(asked(prompts, policy, n=8, max_tokens=30), store)
    summary, rows = made.manifest.summary, list(made.rows())
    lengths = [len(row["token_ids"]) for row in rows]
    assert summary["lengths"] == {
        str(least): sum(least <= length < 2 * least for length in lengths)
        for least in (1, 2, 4, 8, 16)
        if any(least <= length < 2 * least for length in lengths)
    }
    assert summary["tokens_per_response"] == pytest.approx(sum(lengths) / 40, abs=0.05)
    cut = sum(row["finish_reason"] == "length" for row in rows)
    assert 0 < cut < 40 and (summary["cut"], summary["cut_share"]) == (cut, round(cut / 40, 4))
    told = capsys.readouterr().err
    assert f"40 responses; {summary['tokens_per_response']} tokens each; " in told
    assert "tokens/s; " in told and "% cut at --max-tokens; " in told
    assert "responses by tokens: " in told
    assert made.manifest.provenance["tokens_per_second"] > 0


def test_the_share_of_prompts_whose_responses_are_all_the_same(tmp_path: Path) -> None:
    responses = {"a": ["x", "x", "x"], "b": ["x", "y", "x"], "c": ["x"], "d": ["y", "y"], "e": ["", " "]}
    rows = [{"prompt_id": prompt, "text": text, "token_ids": [7] * len(text), "finish_reason": "stop"}
            for prompt, texts in responses.items() for text in texts]  # fmt: skip
    shards.write_shards(tmp_path, rows, SCHEMA)
    measured = generate._measure(tmp_path)
    assert measured["all_same_share"] == 0.5, "a and d, of the four with several responses"
    assert measured["lengths"] == {"0": 1, "1": 10}
    shards.write_shards(tmp_path, rows[:1], SCHEMA)
    assert generate._measure(tmp_path)["all_same_share"] is None
    shards.write_shards(tmp_path, [], SCHEMA)
    assert generate._measure(tmp_path) == {"prompts": 0, "candidates": 0}


def test_arguments_of_the_chat_template_are_in_the_key_and_in_the_prompt(
    prompts: Path, store: Store, tmp_path: Path
) -> None:
    template = TEMPLATE + "{%- if style is defined -%}{{- style -}}{%- endif -%}"
    folder = make_llama(tmp_path / "styled", template=template, stop=2.0)
    plain = run(asked(prompts, folder), store)
    styled = run(asked(prompts, folder, chat_template_kwargs=("style=brief",)), store)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for before, after in zip(plain.rows(), styled.rows(), strict=True):
        assert tokenizer.decode(after["prompt_ids"]) == tokenizer.decode(before["prompt_ids"]) + "brief"


FILE = {"sampler": "file", "model": None, "n": 5, "max_tokens": 4096, "chunk": 64}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"sampler": "server"}, "--server"),
        ({"sampler": "server", "server": ("http://127.0.0.1:9/v1",), "devices": 2}, "--devices"),
        ({**FILE, "devices": 2}, "--devices"),
        ({**FILE, "model": "lab"}, "--model"),
        ({**FILE, "temperature": 0.1}, "--temperature"),
        ({"sampler": "hf", "server": ("http://127.0.0.1:9/v1",)}, "--server"),
        ({"tensor_parallel": 2}, "--tensor-parallel"),
        ({"sampler": "vllm", "tensor_parallel": 2}, "--tensor-parallel"),
        ({"devices": 3}, "--devices"),
        ({"sampler": "vllm", "tensor_parallel": 2, "devices": 1}, "--tensor-parallel"),
    ],
)
def test_flags_that_do_not_go_together(
    changes: dict[str, Any], where: str, prompts: Path, policy: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = 2 if "devices" in changes else 0
    monkeypatch.setattr(machine, "visible_gpus", lambda: gpus)
    with pytest.raises(UsageError) as caught:
        run(asked(prompts, policy, **changes), store)
    assert (caught.value.where, caught.value.exit_code) == (where, 2) and caught.value.hint


def test_devices_servers_and_their_like_are_not_in_the_key(prompts: Path, policy: Path, store: Store) -> None:
    def key(**changes: Any) -> str:
        return launch.plan("generate", asked(prompts, policy, **changes), store, lambda first: None).key

    assert key(devices=2) == key()
    server: dict[str, Any] = {"sampler": "server", "served_model": "m"}
    first = key(**server, server=("http://a:1/v1",))
    assert key(**server, server=("http://b:1/v1", "http://c:1/v1"), concurrency=3, timeout=5.0) == first
    assert len({first, key(**{**server, "served_model": "other"}, server=("http://a:1/v1",)), key()}) == 3
    assert key(**server, server=("http://a:1/v1",), model=None) != first, "the model's tokenizer makes ids"


def test_a_server_gives_text_and_no_ids(prompts: Path, store: Store) -> None:
    with StubServer() as server:
        config = asked(prompts, prompts, model=None, sampler="server", server=(server.url,))
        made = run(config, store)
        again = launch.execute("generate", config, store)
    assert again.cached and again.artifact.path == made.path
    rows = list(made.rows())
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [
        (f"q{i}", sample) for i in range(5) for sample in (0, 1)
    ]
    assert all(row["text"] and row["token_ids"] is None for row in rows)
    manifest = made.manifest
    assert manifest.summary["tokenizer"] is None and "lengths" not in manifest.summary
    assert manifest.summary["all_same_share"] == 0.0 and manifest.summary["prompts"] == 5
    assert manifest.config["served_model"] == "stub"
    assert manifest.provenance["engine"].startswith("server stub") and manifest.provenance["usage"]["requests"] == 5


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


def test_no_prompt_that_fits_is_an_error(policy: Path, store: Store, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "x" * 300}])
    with pytest.raises(UsageError, match="no prompt got a response"):
        run(asked(path, policy, long_prompts="drop"), store)
    assert published(store) == []


def test_a_prompt_that_a_server_finds_too_long_is_counted(store: Store, tmp_path: Path) -> None:
    def refuse(call: Call) -> bool:
        message = "This model's maximum context length is 10 tokens. However, you requested 12 tokens"
        long = "long" in call.body["messages"][0]["content"]
        return long and call.send(400, {"error": {"message": message}})

    path = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "short"}, {"prompt": "long"}])
    with StubServer(refuse) as server:
        config = asked(path, path, model=None, sampler="server", server=(server.url,), long_prompts="drop")
        summary = run(config, store).manifest.summary
    assert (summary["prompts"], summary["without_response"], summary["candidates"]) == (1, 1, 2)


def test_a_dry_run_needs_no_server(prompts: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "_TRIES", 1)
    config = asked(prompts, prompts, model=None, sampler="server", server=("http://127.0.0.1:9/v1",))
    planned = launch.plan("generate", config, store, lambda first: None)
    (unresolved,) = planned.unresolved
    assert "127.0.0.1:9" in unresolved.ref and unresolved.why
    with pytest.raises(BnfctlError) as caught:
        run(config, store)
    assert caught.value.exit_code == 1 and "127.0.0.1:9" in (caught.value.where or "") and caught.value.hint


def test_vllm_on_a_gpu_has_a_process_of_its_own(
    prompts: Path, policy: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []

    def seen(job: pool.Job, units: Any) -> Iterator[pool.Done]:
        jobs.append(job)
        raise UsageError("enough")
        yield

    monkeypatch.setattr(pool, "run", seen)
    for gpus, sampler in ((1, "vllm"), (1, "hf"), (0, "vllm")):
        monkeypatch.setattr(machine, "visible_gpus", lambda gpus=gpus: gpus)
        with pytest.raises(UsageError, match="enough"):
            run(asked(prompts, policy, sampler=sampler), store)
    assert [job.apart for job in jobs] == [True, False, False]


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
