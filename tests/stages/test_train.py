"""train: which tokens are trained, which data is taken, and what comes out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bnfctl import dryrun, launch
from bnfctl.artifact import Artifact, Store
from bnfctl.config import BuildConfig, GenerateConfig, TrainConfig
from bnfctl.data.tokens import records
from bnfctl.errors import Interrupted, UsageError
from bnfctl.recipes import PUBLISHED_SETS
from bnfctl.stages import Prerequisite
from bnfctl.stages import train as train_stage
from bnfctl.tables import LOSSES
from tests.stages.chain import Chain, interrupt, published, run, stop_after, write_jsonl


def lines(artifact: Artifact, split: str = "train") -> list[dict[str, Any]]:
    found = map(json.loads, (artifact.path / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["split"] == split]


@pytest.fixture(scope="module")
def trained(chain: Chain) -> Artifact:
    return run(chain.train(eval_every=2, epochs=2), chain.store)


@pytest.fixture
def other_vocabulary(policy: Path, tmp_path: Path) -> Path:
    """The policy with a tokenizer in which two letters have changed places."""
    folder = tmp_path / "other"
    shutil.copytree(policy, folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def test_the_trained_tokens_are_the_sampled_ones(chain: Chain, trained: Artifact) -> None:
    rows = {row["record_id"]: row for row in chain.build.rows()}
    made_with = chain.build.manifest.summary["tokenizer"]
    train_set, test_set, counts = records(rows.values(), chain.train(), chain.policy, made_with)
    assert not any(counts.values())
    assert [r.id for r in train_set] == [i for i, row in rows.items() if row["split"] == "train"]
    assert [r.id for r in test_set] == [i for i, row in rows.items() if row["split"] == "test"] != []
    for record in [*train_set, *test_set]:
        row = rows[record.id]
        assert record.prompt_ids == row["prompt_ids"]
        assert [(side.label, side.ids) for side in record.sides] == [(1, row["chosen_ids"]), (-1, row["rejected_ids"])]
    summary = trained.manifest.summary
    assert summary["tokens"] == sum(len(side.ids) for record in train_set for side in record.sides)
    assert sum(line["tokens"] for line in lines(trained)) == 2 * summary["tokens"], "two epochs"


def test_ids_of_another_tokenizer_are_refused(chain: Chain, other_vocabulary: Path) -> None:
    before = published(chain.store)
    with pytest.raises(UsageError, match="another tokenizer") as caught:
        run(chain.train(model=str(other_vocabulary)), chain.store)
    assert (caught.value.exit_code, caught.value.where) == (2, "--data")
    assert caught.value.hint is not None and caught.value.hint.startswith("--retokenize")
    assert published(chain.store) == before


def test_retokenize_reads_the_texts_with_this_model(chain: Chain, other_vocabulary: Path) -> None:
    config = chain.train(model=str(other_vocabulary), retokenize=True)
    rows = list(chain.build.rows())
    train_set, _, _ = records(rows, config, other_vocabulary, chain.build.manifest.summary["tokenizer"])
    tokenizer = AutoTokenizer.from_pretrained(other_vocabulary)
    for record, row in zip(train_set, (row for row in rows if row["split"] == "train"), strict=True):
        assert record.prompt_ids != row["prompt_ids"], "every prompt has an a"
        assert tokenizer.decode(record.prompt_ids) == "<|begin|><|user|>" + row["prompt"][0]["content"] + (
            "<|turn_end|><|assistant|>"
        )
    tokens = sum(len(side.ids) for record in train_set for side in record.sides)
    assert run(config, chain.store).manifest.summary["tokens"] == tokens


def test_as_typed_the_only_build_of_the_model_is_taken(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = chain.copy(tmp_path / "store")
    prefs = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Q", "chosen": "yes", "rejected": "no"}])
    run(BuildConfig(input=str(prefs), test_fraction=0), store)
    made = run(chain.train(data=None), store)
    assert made.manifest.inputs["data"]["ref"] == chain.build.ref
    assert f"data: {chain.build.ref}, the only build made from {chain.policy}" in capsys.readouterr().err
    again = launch.execute("train", chain.train(), store)
    assert again.cached, "named or found, it is the same data"


def test_as_typed_a_copy_of_the_model_finds_the_build_too(chain: Chain, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(chain.policy, folder)
    plan = launch.plan(
        "train", chain.train(model=str(folder), data=None), chain.copy(tmp_path / "s"), lambda first: None
    )
    assert plan.inputs["data"].ref == chain.build.ref


def test_as_typed_several_builds_are_listed(chain: Chain, tmp_path: Path) -> None:
    store = chain.copy(tmp_path / "store")
    second = run(BuildConfig(input=chain.scores.ref, pairing_ratio=0.5), store)
    with pytest.raises(UsageError, match="several builds") as caught:
        run(chain.train(data=None), store)
    assert chain.build.ref in caught.value.what and second.ref in caught.value.what
    assert (caught.value.exit_code, caught.value.where) == (2, "--data")
    assert caught.value.hint in (f"--data {chain.build.ref}", f"--data {second.ref}")


def test_as_typed_without_a_build(policy: Path, store: Store) -> None:
    with pytest.raises(UsageError, match="no preference data made from") as caught:
        run(TrainConfig(model=str(policy)), store)
    assert caught.value.hint is not None and f"bnfctl generate --model {policy}" in caught.value.hint


@pytest.mark.parametrize("model", PUBLISHED_SETS)
def test_as_typed_a_model_of_the_paper_takes_its_published_set(model: str, store: Store) -> None:
    first = train_stage.plan(TrainConfig(model=model), store)
    assert isinstance(first, Prerequisite)
    assert (first.stage, first.field, first.config.input) == ("build", "data", PUBLISHED_SETS[model])
    assert PUBLISHED_SETS[model] in first.why and model in first.why
    with pytest.raises(UsageError, match=f"could not resolve {PUBLISHED_SETS[model]}: HF_HUB_OFFLINE is set") as caught:
        run(TrainConfig(model=model), store)
    assert caught.value.hint is not None and "bnfctl doctor" in caught.value.hint


def test_a_dry_run_estimates_memory_before_there_is_data(
    policy: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's folder is here, under a name that has a published set, and the set is not built yet."""
    name = next(iter(PUBLISHED_SETS))
    shutil.copytree(policy, tmp_path / "here" / name)
    monkeypatch.chdir(tmp_path / "here")
    planned = launch.plan("train", TrainConfig(model=name), store, lambda first: None)
    document = dryrun.describe(planned, {}, store, force=False)
    assert "data" in document["unresolved"]
    assert any(re.match(r"\d+\.\d MB per (process|GPU): (\w+ \d+\.\d, )+", line) for line in document["memory"]), (
        document["memory"]
    )


def test_what_is_too_long_is_cut_or_dropped_and_counted(
    policy: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"id": "fits", "prompt": "Q", "chosen": "yes", "rejected": "no"},
        {"id": "cut", "prompt": "Q", "chosen": "y" * 60, "rejected": "n" * 60},
        {"id": "dropped", "prompt": "Q" * 60, "chosen": "yes", "rejected": "no"},
    ]
    build = run(BuildConfig(input=str(write_jsonl(tmp_path / "p.jsonl", rows)), test_fraction=0), store)
    made = run(TrainConfig(model=str(policy), data=build.ref, max_length=40), store)
    summary = made.manifest.summary
    assert {name: summary[name] for name in ("records", "cut", "no_room")} == {"records": 2, "cut": 2, "no_room": 1}
    prompt = len("Q") + 4  # BOS, user, end of turn, assistant
    assert summary["tokens"] == (len("yes") + 1) + (len("no") + 1) + 2 * (40 - prompt)
    assert "2 responses cut at the maximum length" in capsys.readouterr().err


def test_a_tokenizer_without_chat_template_is_named_by_its_folder(chain: Chain, tmp_path: Path) -> None:
    folder = tmp_path / "base model"
    shutil.copytree(chain.policy, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="no chat template") as caught:
        run(chain.train(model=str(folder), retokenize=True), chain.store)
    assert str(folder) in str(caught.value.where)


def test_metrics_and_reports_on_the_test_split(chain: Chain, trained: Artifact) -> None:
    steps = trained.manifest.summary["steps"]
    records_in_split = chain.build.manifest.summary["train"]
    assert steps == 2 * -(-records_in_split // 4) >= 4
    assert [line["step"] for line in lines(trained)] == list(range(1, steps + 1))
    reports = lines(trained, "test")
    assert [line["step"] for line in reports] == [
        step for step in range(1, steps + 1) if step % 2 == 0 or step == steps
    ]
    for line in reports:
        assert all(isinstance(line[name], float) for name in ("objective", "margin", "accuracy"))
    assert trained.manifest.summary["test"] == reports[-1]
    assert trained.manifest.summary["final"] == lines(trained)[-1]
    assert "metrics.jsonl" in {entry["path"] for entry in trained.manifest.files}
    assert trained.verify() == []


def test_the_saved_folder_is_a_model_that_moved(chain: Chain, trained: Artifact) -> None:
    folder = trained.path / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = AutoModelForCausalLM.from_pretrained(chain.policy).state_dict()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(moved) == len(before)
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(chain.policy)
    assert ours.chat_template == theirs.chat_template and ours.get_vocab() == theirs.get_vocab()
    for name in ("generation_config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (chain.policy / name).read_bytes()
    assert not list(trained.path.rglob("*.bin")) and not list(trained.path.rglob("*.pt"))


def test_a_train_artifact_is_the_model_of_later_stages(chain: Chain, trained: Artifact, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"id": "a", "prompt": "Hi"}])
    sampled = run(GenerateConfig(prompts=str(prompts), model=trained.ref, sampler="hf", n=2, max_tokens=4), chain.store)
    assert sampled.manifest.inputs["model"]["digest"] == trained.manifest.digest
    assert len(list(sampled.rows())) == 2
    second = run(chain.train(model=trained.ref), chain.store)
    assert second.manifest.inputs["model"]["ref"] == trained.ref
    assert second.manifest.digest != trained.manifest.digest


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_runs(loss: str, chain: Chain) -> None:
    made = run(chain.train(loss=loss, eval_every=100), chain.store)
    assert made.manifest.summary["loss"] == loss
    first = lines(made)[0]
    assert first["grad_norm"] > 0 and isinstance(first["objective"], float)


def test_dpo_refuses_masked_data(chain: Chain, tmp_path: Path) -> None:
    store = chain.copy(tmp_path / "store")
    masked = run(BuildConfig(input=chain.scores.ref, pairing_ratio=0, test_fraction=0), store)
    with pytest.raises(UsageError, match="'dpo' needs both sides") as caught:
        run(chain.train(loss="dpo", data=masked.ref), store)
    assert caught.value.exit_code == 2
    assert caught.value.hint is not None
    assert "--loss bnf" in caught.value.hint and "--pairing-ratio 1" in caught.value.hint
    assert not list(store.artifacts("train"))
    assert run(chain.train(data=masked.ref), store).manifest.summary["records"] == masked.manifest.summary["records"]


def test_a_run_that_was_interrupted_gives_the_digest_of_an_undisturbed_one(
    chain: Chain, trained: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = chain.copy(tmp_path / "store")
    shutil.rmtree(store.home / "reference")
    config = chain.train(eval_every=2, epochs=2)
    interrupt(config, store)
    assert not list(store.home.glob(".drafts/train-*/scratch/checkpoints/step-*")), "it stopped in the reference"
    with pytest.MonkeyPatch.context() as patch:
        stop_after("steps", 2, patch)
        with pytest.raises(Interrupted):
            run(config, store)
    assert [path.name for path in store.home.glob(".drafts/train-*/scratch/checkpoints/*")] == ["step-000003"]
    assert not list(store.artifacts("train"))
    resumed = run(config, store)
    assert f"resuming after step 3 of {trained.manifest.summary['steps']}" in capsys.readouterr().err
    assert resumed.manifest.provenance["resumed_from_step"] == 3
    assert resumed.manifest.digest == trained.manifest.digest
    assert resumed.manifest.summary == trained.manifest.summary
    assert not (resumed.path / "scratch").exists()


def test_speed_and_checkpoints_are_not_in_the_key(chain: Chain, trained: Artifact) -> None:
    same = chain.train(eval_every=2, epochs=2, save_every=1, micro_tokens=64)
    assert launch.execute("train", same, chain.store).artifact.path == trained.path
