"""LoRA: adapters alone are trained, the base is the reference, and what is saved is what was trained."""

from __future__ import annotations

import hashlib
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from bnfctl import console
from bnfctl.config import TrainConfig
from bnfctl.errors import Interrupted, UsageError
from bnfctl.model.adapters import without_adapters
from bnfctl.model.policy import set_attention
from bnfctl.training import loop, setup
from tests.losses.ragged import relative
from tests.model.tiny import VOCABULARY, opt_config, write_any, write_model
from tests.training.data import ALONE, at_reference, gradients, make_records, move, moved_run, train

CONFIG = TrainConfig(model="m", lr=2e-2, batch_size=4, epochs=2, lora=4, micro_tokens=64, save_dtype="float32")
RECORDS = make_records(9)
IDS = torch.tensor([[5, 9, 200, 306, 17, 44]])


@pytest.fixture(scope="module")
def exact_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in float32, so that no rounding of a saved model is in the way."""
    return write_model(tmp_path_factory.mktemp("lora") / "model", dtype=torch.float32)


def logits_of(folder: Path) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(input_ids=IDS).logits.detach()


def logits_now(run: setup.Run) -> Tensor:
    """Of the policy in memory, through the attention that its folder is loaded with."""
    packing = run.policy.attention
    set_attention(run.policy, "sdpa")
    with torch.no_grad():
        logits: Tensor = run.policy.model(input_ids=IDS).logits
    set_attention(run.policy, packing)
    return logits


def trained_run(model_dir: Path, work: Path, **fields: Any) -> tuple[setup.Run, dict[str, Any]]:
    """The run in memory, after the same steps that `train` takes."""
    config = {**vars(CONFIG), **fields}
    run = at_reference(model_dir, work, RECORDS, **config)
    line: dict[str, Any] = {}
    for step, positions in enumerate(run.plan.batches(), start=1):
        line = loop.take_step(run, positions, step, log=True)
    return run, line


def test_adapters_alone_are_trained(exact_dir: Path, tmp_path: Path) -> None:
    fresh = at_reference(exact_dir, tmp_path, RECORDS, lora=4)
    before = dict(fresh.policy.model.named_parameters())
    run, line = trained_run(exact_dir, tmp_path)
    trained = {name for name, p in run.policy.model.named_parameters() if p.requires_grad}
    assert trained == {name for name in before if "lora_" in name} and len(trained) == 2 * 7 * 2
    for name, parameter in run.policy.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
        assert parameter.grad is None or name in trained
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.policy.model.parameters() if p.requires_grad}
    assert line["shift_chosen"] > 0.1 and line["shift_rejected"] < -0.1


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_in_bfloat16_the_adapters_stay_float32(stored: torch.dtype, tmp_path: Path) -> None:
    """A frozen base is kept as it is stored; a bfloat16 adapter would not feel a small learning rate."""
    folder = write_model(tmp_path / "model", dtype=stored)
    run, line = trained_run(folder, tmp_path, dtype="bfloat16", lr=1e-5)
    kinds = {("lora_" in name, p.dtype) for name, p in run.policy.model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, stored)}
    moved = [p for name, p in run.policy.model.named_parameters() if "lora_B" in name]
    assert all(0 < float(p.detach().abs().max()) < 1e-3 for p in moved)
    assert line["coefficient"] > 0.99


def test_the_head_has_no_adapter_and_the_start_is_the_base(exact_dir: Path, tmp_path: Path) -> None:
    run = at_reference(exact_dir, tmp_path, RECORDS, lora=4, batch_size=9)
    assert not any("lora_" in name and "layers" not in name for name in run.policy.model.state_dict())
    assert torch.equal(logits_now(run), logits_of(exact_dir))
    line = loop.take_step(run, list(range(9)), 1, log=True)
    assert line["coefficient"] == pytest.approx(1, abs=1e-6) and line["shift_chosen"] == pytest.approx(0, abs=1e-6)


def test_the_seed_draws_the_adapters(exact_dir: Path, tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 0, 1):
        run = at_reference(exact_dir, tmp_path, RECORDS, lora=4, seed=seed)
        drawn.append({name: p for name, p in run.policy.model.named_parameters() if "lora_A" in name})
    for name, first in drawn[0].items():
        assert torch.equal(first, drawn[1][name]) and not torch.equal(first, drawn[2][name])
        assert 0.9 < float(first.detach().abs().max()) * first.shape[1] ** 0.5 <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_folder_is_the_adapted_model(dtype: str, exact_dir: Path, tmp_path: Path) -> None:
    """What has no adapter is the base's, bit for bit, whatever it was computed in."""
    run, _ = trained_run(exact_dir, tmp_path / "memory", dtype=dtype)
    train(replace(CONFIG, dtype=dtype), exact_dir, RECORDS, [], tmp_path / "saved")
    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved" / "model", exact_dir))
    state = run.policy.model.state_dict()
    assert merged.keys() == base.keys()
    for name, value in merged.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in state:
            a, b = (state[f"{stem}.lora_{side}.default.weight"] for side in "AB")
            torch.testing.assert_close(value, base[name] + 2.0 * (b @ a), rtol=1e-5, atol=1e-6)
            assert not torch.equal(value, base[name])
        else:
            assert torch.equal(value, base[name]), name
    adapted = logits_now(run)
    assert relative(logits_of(tmp_path / "saved" / "model"), adapted) < 1e-5
    assert relative(logits_of(exact_dir), adapted) > 0.01


@pytest.mark.parametrize("targets", [("all-linear",), ("attn.c_proj",)])
def test_the_merged_folder_of_a_gpt2(targets: tuple[str, ...], tmp_path: Path) -> None:
    """Its matrices are [in, out]; attn.c_proj is square, so that nothing but the numbers tells a wrong merge."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2)
    folder = write_any(tmp_path / "gpt2", config)
    run, _ = trained_run(folder, tmp_path / "memory", lora_targets=targets)
    train(replace(CONFIG, lora_targets=targets), folder, RECORDS, [], tmp_path / "saved")
    adapted = logits_now(run)
    assert relative(logits_of(tmp_path / "saved" / "model"), adapted) < 1e-5
    assert relative(logits_of(folder), adapted) > 0.01


def test_the_adapter_folder_loads_in_peft(exact_dir: Path, tmp_path: Path) -> None:
    run, _ = trained_run(exact_dir, tmp_path / "memory", lora_alpha=3.0)
    train(replace(CONFIG, lora_save="adapter", lora_alpha=3.0), exact_dir, RECORDS, [], tmp_path / "saved")
    folder = tmp_path / "saved" / "model"
    assert (folder / "adapter_model.safetensors").stat().st_size < (exact_dir / "model.safetensors").stat().st_size / 2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 3.0, 0.0)
    assert (folder / "tokenizer.json").read_bytes() == (exact_dir / "tokenizer.json").read_bytes()
    base: Any = AutoModelForCausalLM.from_pretrained(exact_dir, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder)
    found = adapted(input_ids=IDS).logits.detach()
    assert relative(found, logits_now(run)) < 1e-5
    assert relative(found, logits_of(exact_dir)) > 0.01


def test_the_reference_is_the_base(exact_dir: Path, tmp_path: Path) -> None:
    """With the adapters off, live or from the rows of a full training."""
    run, _ = moved_run(exact_dir, tmp_path, RECORDS, home=tmp_path, lora=4, reference="live")
    full = at_reference(exact_dir, tmp_path / "full", RECORDS)
    with without_adapters(run.policy.model):
        assert torch.equal(logits_now(run), logits_of(exact_dir))
    assert not torch.equal(logits_now(run), logits_of(exact_dir))
    batch = run.splits["train"].collate([0, 5, 2])
    assert run.reference is not None and full.reference is not None
    live = run.reference.log_odds("train", batch)
    torch.testing.assert_close(live, full.reference.log_odds("train", batch), rtol=1e-6, atol=1e-5)
    assert all(p.requires_grad == ("lora_" in name) for name, p in run.policy.model.named_parameters())


def content(work: Path) -> dict[str, str]:
    files = [work / "metrics.jsonl", *(work / "model").rglob("*")]
    return {str(p.relative_to(work)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()}


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_a_stopped_run_resumes_to_the_same_bytes(kind: str, exact_dir: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, lora_save=kind)
    train(config, exact_dir, RECORDS, [], tmp_path / "calm")
    original = loop.take_step
    with pytest.MonkeyPatch.context() as patch:

        def stepping(run: Any, positions: list[int], step: int, log: bool) -> dict[str, Any]:
            if step == 3:
                patch.setattr(console, "_signal", signal.SIGTERM)
            return original(run, positions, step, log)

        patch.setattr(loop, "take_step", stepping)
        with pytest.raises(Interrupted):
            train(config, exact_dir, RECORDS, [], tmp_path / "stopped")
    (file,) = (tmp_path / "stopped").rglob("rank-*.safetensors")
    assert all("lora_" in key for key in load_file(file)), "the base is not in the checkpoint"
    train(config, exact_dir, RECORDS, [], tmp_path / "stopped")
    assert content(tmp_path / "calm") == content(tmp_path / "stopped")


@pytest.mark.parametrize("target", ["no_such_module", "lm_head", "embed_tokens"])
def test_targets_that_cannot_have_adapters(target: str, exact_dir: Path, tmp_path: Path) -> None:
    """peft would put one on the output matrix, but the head does not compute with it: it would stay at 0."""
    config = replace(CONFIG, lora_targets=(target,))
    with pytest.raises(UsageError) as caught:
        train(config, exact_dir, RECORDS, [], tmp_path)
    assert caught.value.where == "--lora-targets" and "all-linear" in str(caught.value.hint)


def test_named_targets(exact_dir: Path) -> None:
    policy = setup.load(replace(CONFIG, lora_targets=("q_proj", "up_proj")), exact_dir, ALONE, sharded=False)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in policy.model.state_dict() if ".lora_" in name}
    assert adapted == {"q_proj", "up_proj"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("loss", ["bnf", "dpo"])
def test_activation_checkpointing_changes_no_gradient(
    loss: str, lora: int, dtype: str, exact_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers are computed twice, with the model's attention dropout of 0.5 off."""
    found = {}
    for kind in ("off", "on"):
        fields = {"loss": loss, "lora": lora, "dtype": dtype, "activation_checkpointing": kind, "attention": "eager"}
        run, _ = moved_run(exact_dir, tmp_path, RECORDS, home=tmp_path, **fields)
        calls = 0
        attention = run.policy.body.layers[0].self_attn
        forward = attention.forward

        def counting(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(attention, "forward", counting)
        grads, _ = gradients(run, range(9))
        found[kind] = grads
        pieces = len(list(run.splits["train"].micro_batches(range(9))))
        assert calls == pieces * (2 if kind == "on" else 1)
        assert run.policy.model.config.attention_dropout == 0.5
    assert found["on"].keys() == found["off"].keys()
    for name, grad in found["on"].items():
        assert relative(grad, found["off"][name]) < 1e-6, name


@pytest.mark.parametrize("lora", [0, 4])
def test_activation_checkpointing_applies_no_dropout(lora: int, tmp_path: Path) -> None:
    """An OPT layer in training mode drops its hidden states out, in functions that no submodule's mode turns off."""
    folder = write_any(tmp_path / "opt", opt_config())
    found = {}
    for kind in ("off", "on"):
        run, _ = moved_run(folder, tmp_path, RECORDS, home=tmp_path, lora=lora, activation_checkpointing=kind)
        found[kind], _ = gradients(run, range(9))
    assert found["on"].keys() == found["off"].keys()
    assert all(relative(grad, found["off"][name]) < 1e-6 for name, grad in found["on"].items())


def test_checkpointing_leaves_the_first_step_at_the_reference(exact_dir: Path, tmp_path: Path) -> None:
    run = at_reference(exact_dir, tmp_path, RECORDS, lora=4, activation_checkpointing="on", batch_size=9)
    assert loop.take_step(run, list(range(9)), 1, log=True)["coefficient"] == pytest.approx(1, abs=1e-6)
    move(run.policy)
    once, again = (gradients(run, range(9))[0] for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)
