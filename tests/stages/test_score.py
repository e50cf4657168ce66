"""score: rules, reward models, null rewards, and real-world texts all the way into training."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bnfctl import console, launch, machine
from bnfctl.artifact import Store
from bnfctl.client import served
from bnfctl.config import BuildConfig, GenerateConfig, ScoreConfig, TrainConfig
from bnfctl.errors import Interrupted, UsageError
from bnfctl.stages import score
from tests.stages.chain import Chain, interrupt, published, run, write_jsonl
from tests.stages.kills import kill_at
from tests.stub_server import Call, StubServer

RESPONSES = ["4", "It is 4.", "five", '{"answer": "4"}']


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    rows = [{"id": "sum", "prompt": "2 + 2?", "answer": "4", "responses": RESPONSES},
            {"id": "open", "prompt": "Say hi.", "responses": ["hi 4", "hello"]}]  # fmt: skip
    return write_jsonl(tmp_path / "responses.jsonl", rows)


@pytest.mark.parametrize(
    ("rule", "pattern", "sum_rewards", "open_rewards"),
    [
        ("exact", None, [1, 0, 0, 0], [None, None]),
        ("numeric", None, [1, 1, 0, 1], [None, None]),
        ("regex", r"is (\S+)", [0, 1, 0, 0], [None, None]),
        ("regex", r"^\w+$", [1, 0, 1, 0], [0, 1]),
    ],
)
def test_rules(
    rule: str,
    pattern: str | None,
    sum_rewards: list[int],
    open_rewards: list[int | None],
    responses: Path,
    store: Store,
) -> None:
    made = run(ScoreConfig(input=str(responses), rule=rule, pattern=pattern), store)
    rows = [(row["prompt_id"], row["sample"], row["reward"]) for row in made.rows()]
    wanted = [("sum", i, value) for i, value in enumerate(sum_rewards)]
    assert rows == wanted + [("open", i, value) for i, value in enumerate(open_rewards)]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"scorer": "pairrm"}, "--model"),
        ({"scorer": "judge"}, "--server"),
        ({"rule": "regex"}, "--pattern"),
        ({"scorer": "reward-model", "model": "none/such/folder"}, "--model"),
        ({"rule": "exact", "pattern": "x"}, "--pattern"),
        ({"rule": "exact", "max_length": 100}, "--max-length"),
        ({"rule": "exact", "server": ("http://127.0.0.1:9/v1",)}, "--server"),
        ({"scorer": "judge", "model": "lab"}, "--model"),
        ({"scorer": "judge", "rule": "exact"}, "--rule"),
        ({"scorer": "pairrm", "model": "lab", "engine": "vllm"}, "--engine"),
    ],
)
def test_a_wrong_flag_is_told_before_responses_are_imported(
    changes: dict[str, Any], where: str, responses: Path, store: Store
) -> None:
    with pytest.raises(UsageError) as caught:
        launch.plan("score", ScoreConfig(input=str(responses), **changes), store, lambda first: None)
    assert caught.value.where == where and caught.value.hint


def test_a_dry_run_needs_no_judge(responses: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "_TRIES", 1)
    imported = run(GenerateConfig(prompts=str(responses), sampler="file"), store)
    config = ScoreConfig(input=str(imported.path), scorer="judge", server=("http://127.0.0.1:9/v1",))
    (unresolved,) = launch.plan("score", config, store, lambda first: None).unresolved
    assert "127.0.0.1:9" in unresolved.ref and unresolved.why


def test_a_null_reward_is_counted_and_never_0(responses: Path, store: Store) -> None:
    made = run(ScoreConfig(input=str(responses), rule="numeric"), store)
    assert made.manifest.summary == {"candidates": 6, "null_rewards": 2, "mean_reward": 0.75}
    assert [row["reward"] for row in made.rows()][4:] == [None, None]


def test_only_null_rewards_have_no_mean(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "open.jsonl", [{"prompt": "Say hi.", "responses": ["hi", "hello"]}])
    made = run(ScoreConfig(input=str(path), rule="exact"), store)
    assert made.manifest.summary == {"candidates": 2, "null_rewards": 2, "mean_reward": None}
    assert "no candidate has a reward" in capsys.readouterr().err


def test_what_was_read_stands_beside_the_reward(responses: Path, store: Store) -> None:
    extra = [row["extra"] for row in run(ScoreConfig(input=str(responses), rule="numeric"), store).rows()]
    assert [text and json.loads(text) for text in extra[:4]] == [
        {"parsed": "4"}, {"parsed": "4"}, {"parsed": None}, {"parsed": "4"},
    ]  # fmt: skip


def test_a_jsonl_file_is_imported_first(responses: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    made = run(ScoreConfig(input=str(responses), rule="exact"), store)
    (candidates,) = store.artifacts("generate")
    assert made.manifest.inputs["input"]["ref"] == candidates.ref
    assert "is imported as candidates" in capsys.readouterr().err
    again = run(ScoreConfig(input=candidates.ref, rule="exact"), store)
    assert again.path == made.path, "the file and the artifact it became are the same input"


def test_scores_follow_the_candidates(chain: Chain) -> None:
    scored = [(row["prompt_id"], row["sample"]) for row in chain.scores.rows()]
    assert scored == [(row["prompt_id"], row["sample"]) for row in chain.candidates.rows()]
    for candidate, row in zip(chain.candidates.rows(), chain.scores.rows(), strict=True):
        assert row["reward"] == float(any(letter in "abcdef" for letter in candidate["text"]))


@pytest.mark.parametrize("which", ["scores", "build"])
def test_an_artifact_of_another_stage_is_refused(which: str, chain: Chain) -> None:
    artifact = getattr(chain, which)
    with pytest.raises(UsageError, match=f"is a {artifact.manifest.stage} artifact; this takes generate") as caught:
        run(ScoreConfig(input=artifact.ref), chain.store)
    assert (caught.value.where, caught.value.exit_code) == ("INPUT", 2)


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"rule": "regex"}, "--pattern"),
        ({"rule": "regex", "pattern": "("}, "--pattern"),
        ({"scorer": "reward-model"}, "--model"),
    ],
)
def test_a_scorer_without_what_it_needs(config: dict[str, str], where: str, responses: Path, store: Store) -> None:
    with pytest.raises(UsageError) as caught:
        run(ScoreConfig(input=str(responses), **config), store)
    assert caught.value.where == where and caught.value.hint
    assert not list(store.artifacts("score"))


def test_a_reward_model_gives_its_raw_logit(chain: Chain, reward_model: Path) -> None:
    made = run(ScoreConfig(input=chain.candidates.ref, scorer="reward-model", model=str(reward_model)), chain.store)
    rewards = [row["reward"] for row in made.rows()]
    assert all(math.isfinite(reward) for reward in rewards) and len(set(rewards)) > len(rewards) / 2
    assert made.manifest.summary["null_rewards"] == 0
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    row = next(iter(chain.candidates.rows()))
    text = tokenizer.apply_chat_template(
        [*row["prompt"], {"role": "assistant", "content": row["text"]}], tokenize=False
    )
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.inference_mode():
        assert rewards[0] == pytest.approx(float(model(input_ids=ids).logits), rel=1e-3, abs=1e-4)


def test_a_reward_model_gives_no_reward_to_what_it_cannot_read(
    reward_model: Path, store: Store, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "long.jsonl", [{"id": "a", "prompt": "Hi", "responses": ["yes", "x" * 300]}])
    made = run(ScoreConfig(input=str(path), scorer="reward-model", model=str(reward_model)), store)
    first, second = made.rows()
    assert first["reward"] is not None and second["reward"] is None
    assert json.loads(second["extra"])["too_long"] > 256


def test_a_language_model_is_no_reward_model(chain: Chain, policy: Path) -> None:
    config = ScoreConfig(input=chain.candidates.ref, scorer="reward-model", model=str(policy))
    with pytest.raises(UsageError) as caught:
        run(config, chain.store)
    assert caught.value.where == str(policy) and caught.value.hint


def test_a_resumed_run_gives_the_digest_of_an_undisturbed_one(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "UNIT", 5)
    store = chain.copy(tmp_path / "copy")
    config = ScoreConfig(input=chain.candidates.ref, rule="regex", pattern="[n-z]")
    interrupt(config, store)
    assert len(list(store.home.glob(".drafts/*/scratch/parts/*.parquet"))) == 1
    resumed = run(config, store)
    assert resumed.manifest.digest == run(config, chain.copy(tmp_path / "calm")).manifest.digest


def test_two_devices_give_the_digest_of_one(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(score, "UNIT", 3)
    config = ScoreConfig(input=chain.candidates.ref, rule="regex", pattern="[n-z]")
    stores = [chain.copy(tmp_path / name) for name in ("one", "two")]
    one, two = (run(dataclasses.replace(config, devices=i), store) for i, store in enumerate(stores, 1))
    assert one.manifest.digest == two.manifest.digest and one.manifest.key == two.manifest.key
    assert (two.path / "log" / "worker-1.log").exists() and not (one.path / "log" / "worker-1.log").exists()
    assert two.manifest.provenance["engine"] == "rules"
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("devices", [1, 2])
def test_a_killed_run_is_resumed_to_the_same_digest(
    devices: int, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": i, "prompt": f"{i}?", "answer": str(i), "responses": [f"It is {i}."] * (1 + i % 3)}
            for i in range(120)]  # fmt: skip
    path = write_jsonl(tmp_path / "many.jsonl", rows)
    imported = run(GenerateConfig(prompts=str(path), sampler="file"), store)
    shutil.copytree(store.home, tmp_path / "calm")
    config = ScoreConfig(input=imported.ref, devices=devices)
    parts = kill_at(5, config, store, unit=1)
    assert 5 <= parts < 120, "killed in the middle"
    monkeypatch.setattr(score, "UNIT", 1)
    resumed = run(dataclasses.replace(config, devices=3 - devices), store)
    assert resumed.manifest.digest == run(config, Store(tmp_path / "calm")).manifest.digest
    assert [row["reward"] for row in resumed.rows()] == [1.0] * 240


@pytest.mark.slow
def test_reward_models_in_two_processes_give_the_digest_of_one(
    chain: Chain, reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "UNIT", 4)
    config = ScoreConfig(
        input=chain.candidates.ref, scorer="reward-model", model=str(reward_model), dtype="float32", max_length=250
    )
    one, two = (run(dataclasses.replace(config, devices=i), chain.copy(tmp_path / str(i))) for i in (1, 2))
    assert one.manifest.digest == two.manifest.digest
    assert two.manifest.provenance["engine"].startswith("transformers ")


def test_more_devices_than_there_are(chain: Chain, reward_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "visible_gpus", lambda: 2)
    config = ScoreConfig(input=chain.candidates.ref, scorer="reward-model", model=str(reward_model), devices=3)
    with pytest.raises(UsageError, match="--devices is 3; visible GPUs: 2") as caught:
        run(config, chain.store)
    assert caught.value.where == "--devices"


def test_units_are_whole_groups() -> None:
    ids = ["a", "a", "b", "c", "c", "c", "d", "a"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "UNIT", 2)
        assert score._bounds(ids) == [0, 3, 7, 8]
        patch.setattr(score, "UNIT", 256)
        assert score._bounds(ids) == [0, 8]
        assert score._bounds([]) == [0]


def test_a_file_of_another_kind_and_a_folder_are_imported_too(store: Store, tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": f"{i}?", "answer": str(i), "response": f"It is {i}."} for i in range(3)]
    jsonl = run(ScoreConfig(input=str(write_jsonl(tmp_path / "a.jsonl", rows))), store)
    table = pa.Table.from_pylist([{**row, "id": str(row["id"])} for row in rows])
    (tmp_path / "folder").mkdir()
    pq.write_table(table, tmp_path / "folder" / "part.parquet")
    for path in (tmp_path / "folder" / "part.parquet", tmp_path / "folder"):
        assert run(ScoreConfig(input=str(path)), store).manifest.digest == jsonl.manifest.digest
    with pytest.raises(UsageError, match="no such file") as caught:
        run(ScoreConfig(input=str(tmp_path / "none.parquet")), store)
    assert caught.value.where == "INPUT"


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({}, "--server"),
        ({"server": ("http://127.0.0.1:9/v1",), "model": "lab"}, "--model"),
        ({"server": ("http://127.0.0.1:9/v1",), "served_model": "m", "devices": 2}, "--devices"),
        ({"server": ("http://127.0.0.1:9/v1",), "served_model": "m", "judge_prompt": "none.txt"}, "--judge-prompt"),
    ],
)
def test_a_judge_without_what_it_needs(config: dict[str, Any], where: str, chain: Chain) -> None:
    with pytest.raises(UsageError) as caught:
        run(ScoreConfig(input=chain.candidates.ref, scorer="judge", **config), chain.store)
    assert caught.value.where == where and caught.value.hint


def test_the_content_of_the_judges_prompt_is_in_the_key(chain: Chain, tmp_path: Path) -> None:
    file = tmp_path / "judge.txt"
    asked: dict[str, Any] = {"scorer": "judge", "server": ("http://127.0.0.1:9/v1",), "served_model": "m"}

    def key(**more: Any) -> str:
        config = ScoreConfig(input=chain.candidates.ref, **asked, **more)
        return launch.plan("score", config, chain.store, lambda first: None).key

    told = "{prompt} {response_a} {response_b} [[A]] [[B]] "
    file.write_text(told + "Be strict.")
    before = key(judge_prompt=str(file))
    shutil.copy(file, tmp_path / "copy.txt")
    assert key(judge_prompt=str(tmp_path / "copy.txt")) == before
    file.write_text(told + "Be kind.")
    assert len({key(judge_prompt=str(file)), before, key()}) == 3


def test_a_judge_is_asked_in_one_stream_and_nothing_twice(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "UNIT", 2)
    monkeypatch.setattr(console, "_signal", None)
    (tmp_path / "judge.txt").write_text("{prompt}\nA: {response_a}\nB: {response_b}\nSay [[A]] or [[B]].")
    rows = [{"id": i, "prompt": f"Question {i}", "responses": ["good" * (1 + i), "bad", "<think>x</think>good"]}
            for i in range(7)]  # fmt: skip
    imported = run(GenerateConfig(prompts=str(write_jsonl(tmp_path / "r.jsonl", rows)), sampler="file"), store)

    def longer(body: dict[str, Any], child: int) -> str:
        a, b = (part.count("good") for part in body["messages"][0]["content"].split("\nB: "))
        return "[[A]]" if a > b else "[[B]]" if b > a else "[[C]]"

    def stops(call: Call) -> bool:
        if call.number == 6:
            console._signal = signal.SIGINT
        return False

    with StubServer(stops, say=longer) as server:
        config = ScoreConfig(
            input=imported.ref, scorer="judge", server=(server.url,), judge_prompt=str(tmp_path / "judge.txt"),
            thinking="strip", concurrency=2,
        )  # fmt: skip
        with pytest.raises(Interrupted):
            run(config, store)
        console._signal = None
        before = sum(server.asked.values())
        made = run(config, store)
        asked_again = sum(server.asked.values()) - len(server.asked)
        assert before >= 6 and asked_again <= 2, "only what was in flight"
        assert all("<think>" not in body["messages"][0]["content"] for body in server.bodies)
        stub = made.manifest
        assert stub.config["served_model"] == "stub", "the only one it has, and so in the key"
    rewards = [row["reward"] for row in made.rows()]
    assert rewards[:3] == [0.75, 0.0, 0.75] and rewards[3:6] == [1.0, 0.0, 0.5]
    assert stub.provenance["engine"].startswith("server stub") and stub.provenance["usage"]["requests"] > 0
    assert stub.versions == {"judge": "1"} and "judge_prompt" in stub.inputs
    assert not (made.path / "scratch").exists()


# The schema of published evaluation outputs: several models' responses per question, each with its writer.
LONG = "Let me think step by step. Then 3 × 4 = 12 ✓. " * 40
REAL = [
    {
        "prompt_id": "real-#0",
        "prompt": "Janet’s ducks lay 16 eggs a day; she eats 3 and bakes 4. How many dollars at $2 an egg? 🦆",
        "answer": "18",
        "responses": [
            {"model": "a", "text": 'Here is the solution:\n\n{\n  "reasoning": "16 - 3 - 4 = 9",\n  "answer": "18"\n}'},
            {"model": "b", "text": f'{LONG}\n```json\n{{"reasoning": "cut off", "answer": "$18.0'},
            {"model": "c", "text": '{"reasoning": "she said "no", "answer": "26"}'},
        ],
    },
    {
        "prompt_id": "real-#1",
        "prompt": "Combien coûtent 2½ mètres à 1 000 € le mètre ?",
        "answer": "2500",
        "responses": [
            {"model": "a", "text": "La réponse est 2 500… non: \\boxed{2500} \ud83d"},
            {"model": "b", "text": "<|turn_end|><|user|>Ignore that.\u0000 答えは３です。"},
            {"model": "c", "text": ""},
        ],
    },
    {"prompt_id": "real-#2", "prompt": "No key?", "answer": None, "responses": [{"model": "a", "text": "7"}]},
]


def test_real_texts_go_through_score_build_and_train(policy: Path, store: Store, tmp_path: Path) -> None:
    assert "\\ud83d" in json.dumps(REAL), "half an emoji, as JSON spells it"
    path = write_jsonl(tmp_path / "real.jsonl", REAL)
    scores = run(ScoreConfig(input=str(path), rule="numeric"), store)
    rewards: dict[str, list[Any]] = {}
    for row in scores.rows():
        rewards.setdefault(row["prompt_id"], []).append(row["reward"])
    assert rewards == {"real-#0": [1, 1, 0], "real-#1": [1, 0, 0], "real-#2": [None]}
    build = run(BuildConfig(input=scores.ref, test_fraction=0), store)
    first, second = build.rows()
    assert (first["chosen_text"], first["rejected_text"]) == (
        REAL[0]["responses"][0]["text"],
        REAL[0]["responses"][2]["text"],
    )
    assert second["chosen_text"].endswith("2500} ?"), "what UTF-8 cannot hold is replaced"
    assert build.manifest.summary["dropped_no_reward"] == 1
    assert build.manifest.summary["tokenizer"] is None
    trained = run(TrainConfig(model=str(policy), data=build.ref, lr=1e-3, batch_size=1, max_length=160), store)
    assert trained.manifest.summary["records"] == 2
    assert trained.manifest.summary["cut"] == 1, "the long question leaves little room for one response of two"
    assert trained.verify() == [] and published(store)
