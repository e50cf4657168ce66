"""The model card: its front matter, what it says and what it must not, and that its instructions work."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bnfctl import losses, options
from bnfctl.artifact import Artifact, Pinned, Plan, Store
from bnfctl.config import BuildConfig, TrainConfig
from bnfctl.model.adapters import Lora, add_adapters, save_adapter
from bnfctl.model.card import card
from bnfctl.tables import LOSSES
from tests.model.tiny import write_model

CONFIG = TrainConfig(model="m", loss="simpo", loss_arg=("beta=10",), lr=1e-6, dtype="bfloat16", devices=8, keep=3)
HUB = Pinned("hub-model", "meta-llama/Meta-Llama-3-8B-Instruct@c0ffee", "c0ffee")
FINAL = {
    "step": 4, "split": "train", "lr": 1e-9, "objective": 0.123456, "objective_chosen": None, "objective_rejected": None,
    "logp_chosen": -1.5, "logp_rejected": -2.5, "shift_chosen": None, "shift_rejected": None, "margin": None,
    "accuracy": None, "grad_norm": 3.25,
}  # fmt: skip
TEST = {**FINAL, "split": "test", "objective": 0.25, "margin": 12.0, "accuracy": 0.875}
SUMMARY: dict[str, Any] = {
    "loss": "simpo", "steps": 4, "records": 512, "records_left_out": 0, "tokens": 9999, "parameters": 8, "final": FINAL,
    "test": TEST, "cut": 3,
}  # fmt: skip


def header(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return loaded


def block(text: str, language: str) -> str:
    [found] = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return str(found)


@pytest.fixture
def hub_build(store: Store) -> Pinned:
    """A build of a published set."""
    source = Pinned("hub-data", "princeton-nlp/llama3-ultrafeedback-armorm@beef", "beef")
    plan = Plan("build", 1, BuildConfig(input=source.ref), {"input": source})
    with store.draft(plan) as draft:
        draft.open()
        return draft.publish({"tokenizer": None, "model": None}).pinned()


def test_front_matter_of_a_hub_model_on_a_hub_set(hub_build: Pinned) -> None:
    assert header(card(CONFIG, {"model": HUB, "data": hub_build}, SUMMARY)) == {
        "base_model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "base_model_relation": "finetune",
        "datasets": ["princeton-nlp/llama3-ultrafeedback-armorm"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bnfctl", "alignment", "simpo"],
    }


def test_it_says_what_was_made_from_what(hub_build: Pinned) -> None:
    text = card(CONFIG, {"model": HUB, "data": hub_build}, SUMMARY)
    assert text.split("---\n")[2].startswith("\n# Meta-Llama-3-8B-Instruct-simpo\n")
    assert "meta-llama/Meta-Llama-3-8B-Instruct) at commit `c0ffee`" in text
    assert f"build artifact, digest `{hub_build.digest}`" in text
    assert "huggingface.co/datasets/princeton-nlp/llama3-ultrafeedback-armorm) at commit `beef`" in text
    assert "`simpo` with beta = 10, gamma = 1.375." in text
    assert "4 steps, 512 records, 9999 trained tokens" in text
    assert "arXiv:2410.04834" in text


def test_results_quote_the_last_lines_and_leave_out_what_is_null(hub_build: Pinned) -> None:
    inputs = {"model": HUB, "data": hub_build}
    text = card(CONFIG, inputs, SUMMARY)
    assert "|  | last training step | test split |" in text
    assert "| objective | 0.1235 | 0.25 |" in text
    assert "| accuracy |  | 0.875 |" in text
    assert "objective_chosen" not in text and "grad_norm" not in text
    assert "test split" not in card(CONFIG, inputs, {**SUMMARY, "test": None})
    assert "No step was logged" in card(CONFIG, inputs, {**SUMMARY, "test": None, "final": None})


def test_the_training_block_is_a_config_of_the_same_key(hub_build: Pinned, tmp_path: Path) -> None:
    text = card(CONFIG, {"model": HUB, "data": hub_build}, SUMMARY)
    file = tmp_path / "train.yaml"
    file.write_text(block(text, "yaml"))
    again, _ = options.resolve(TrainConfig, {"model": "m"}, file)
    assert options.key_fields(again) == options.key_fields(CONFIG)
    assert again.devices is None and "devices" not in text and "keep" not in text


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_stated_with_its_hyper_parameters(loss: str, hub_build: Pinned) -> None:
    text = card(TrainConfig(model="m", loss=loss), {"model": HUB, "data": hub_build}, SUMMARY)
    stated = re.search(rf"^`{loss}`(, which has no hyper-parameters| with (.*))\.$", text, re.MULTILINE)
    assert stated
    pairs = [part.split(" = ") for part in (stated[2] or "").split(", ") if part]
    assert losses.make(loss, tuple("=".join(pair) for pair in pairs)) == losses.make(loss)
    assert len(pairs) == len(dataclasses.fields(losses.make(loss)))  # type: ignore[arg-type]


def test_given_hyper_parameters_replace_the_defaults(hub_build: Pinned) -> None:
    orpo = TrainConfig(model="m", loss="orpo", loss_arg=("lambda = 0.25",))
    assert "`orpo` with lambda = 0.25." in card(orpo, {"model": HUB, "data": hub_build}, SUMMARY)


def test_the_same_content_elsewhere_has_the_same_card(tmp_path: Path, make_build: Callable[..., Artifact]) -> None:
    build = make_build().pinned()
    texts = set()
    for place in ("here", "there"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        config = dataclasses.replace(CONFIG, model=str(folder), devices=1 if place == "here" else 2)
        model = Pinned("folder", str(folder), "f" * 64, str(folder))
        texts.add(card(config, {"model": model, "data": build}, SUMMARY))
    [text] = texts
    assert "folder, digest `ffff" in text
    assert str(tmp_path) not in text
    assert "base_model" not in header(text) and "datasets" not in header(text)


def test_a_model_that_bnfctl_trained_and_sampled_from(make_build: Callable[..., Artifact], tmp_path: Path) -> None:
    model = Pinned("artifact", "train/0123456789ab", "e" * 64, str(tmp_path))
    build = make_build(model=dataclasses.asdict(model)).pinned()
    text = card(CONFIG, {"model": model, "data": build}, SUMMARY)
    assert text.count(f"train artifact, digest `{'e' * 64}`") == 2
    assert "responses sampled from" in text
    assert str(tmp_path) not in text and "0123456789ab" not in text, "an equal model of another key is the same input"


LICENSES = {
    "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\ntags: [x]\n---\n# Base": {
        "license": "other", "license_name": "llama3", "license_link": "LICENSE"
    },
    "---\nlicense: [mit, bsd]\n---\n": {},
    "# Base\n---\nlicense: mit\n---": {},
    "---\nlicense: {broken\n---\n": {},
    "---": {},
}  # fmt: skip


@pytest.mark.parametrize("readme", LICENSES)
def test_the_license_is_the_one_in_the_bases_readme(
    readme: str, tmp_path: Path, make_build: Callable[..., Artifact]
) -> None:
    (tmp_path / "README.md").write_text(readme)
    inputs = {"model": Pinned("folder", str(tmp_path), "f" * 64, str(tmp_path)), "data": make_build().pinned()}
    found = header(card(CONFIG, inputs, SUMMARY))
    assert {name: value for name, value in found.items() if name.startswith("license")} == LICENSES[readme]


def test_its_python_loads_the_model(tmp_path: Path, make_build: Callable[..., Artifact]) -> None:
    folder = write_model(tmp_path / "aligned")
    inputs = {"model": Pinned("folder", str(folder), "f" * 64, str(folder)), "data": make_build().pinned()}
    text = card(CONFIG, inputs, SUMMARY)
    made = run_python(text, folder)
    assert made["model"].dtype == torch.bfloat16
    assert made["tokenizer"].chat_template
    assert block(text, "bash") == "vllm serve THIS_FOLDER\n"
    remote = card(dataclasses.replace(CONFIG, trust_remote_code=True), inputs, SUMMARY)
    assert remote.count("trust_remote_code=True") == 2 and "--trust-remote-code" in block(remote, "bash")


def test_its_python_loads_adapters(tmp_path: Path, hub_build: Pinned) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = write_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = Lora(4, 8.0, ("q_proj",))
    add_adapters(model, lora, seed=0)
    state = {name: value + 1 if "lora_B" in name else value for name, value in model.state_dict().items()}
    save_adapter(state, lora, str(base), tmp_path / "adapter", torch.float32)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    config = dataclasses.replace(CONFIG, lora=4, lora_save="adapter")
    text = card(config, {"model": HUB, "data": hub_build}, SUMMARY)
    loaded = run_python(text, tmp_path / "adapter")["model"]
    assert any("lora_B" in name and bool((value == 1).all()) for name, value in loaded.state_dict().items())
    assert header(text)["library_name"] == "peft"
    assert header(text)["base_model_relation"] == "adapter"
    assert "--max-lora-rank 8 --lora-modules simpo=THIS_FOLDER" in block(text, "bash")
    merged = card(dataclasses.replace(config, lora_save="merged"), {"model": HUB, "data": hub_build}, SUMMARY)
    assert header(merged)["library_name"] == "transformers"


def run_python(text: str, folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = {}
    exec(block(text, "python").replace("THIS_FOLDER", str(folder)), made)
    return made
