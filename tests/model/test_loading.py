"""A model folder in, a model folder out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from bnfctl.errors import UsageError
from bnfctl.model.loading import checkpoint_dtype, load_policy, save_policy
from tests.model.tiny import VOCABULARY, write_model

IDS = torch.tensor([[5, 9, 200, 306, 17]])


def folder_of(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def test_masters_are_float32_and_dropout_is_off(tmp_path: Path) -> None:
    policy = load_policy(write_model(tmp_path / "m"))
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert policy.model.config.attention_dropout == 0.5
    once, again = (policy.hidden(IDS, torch.ones_like(IDS)) for _ in range(2))
    assert torch.equal(once, again) and once.requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_body_and_head_are_the_model(tmp_path: Path, tied: bool) -> None:
    policy = load_policy(write_model(tmp_path / "m", tie_word_embeddings=tied))
    logits = policy.head.logits(policy.hidden(IDS, torch.ones_like(IDS))[0])
    torch.testing.assert_close(logits, policy.model(IDS).logits[0])
    assert (policy.head.matrix is policy.model.get_input_embeddings().weight) == tied


def test_padding_on_the_right_changes_nothing(tmp_path: Path) -> None:
    policy = load_policy(write_model(tmp_path / "m"))
    padded = torch.cat([IDS, torch.zeros(1, 4, dtype=torch.int64)], dim=1)
    mask = (torch.arange(9) < 5).long()[None]
    torch.testing.assert_close(
        policy.hidden(padded, mask)[:, :5], policy.hidden(IDS, torch.ones_like(IDS)), rtol=1e-5, atol=1e-5
    )


def test_gemma2_has_a_soft_cap_and_eager_attention(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0, query_pre_attn_scalar=16,
    )  # fmt: skip
    policy = load_policy(folder_of(Gemma2ForCausalLM(config), tmp_path / "m"))
    assert policy.head.softcap == 2.0
    assert policy.model.config._attn_implementation == "eager"
    logits = policy.head.logits(policy.hidden(IDS, torch.ones_like(IDS))[0])
    torch.testing.assert_close(logits, policy.model(IDS).logits[0])


def test_gpt2_names_its_parts_differently(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    policy = load_policy(folder_of(GPT2LMHeadModel(config), tmp_path / "m"))
    logits = policy.head.logits(policy.hidden(IDS, torch.ones_like(IDS))[0])
    torch.testing.assert_close(logits, policy.model(IDS).logits[0])


def test_unknown_changes_to_the_logits_are_refused(tmp_path: Path) -> None:
    """Granite divides its logits: a head that ignores that would train something else, silently."""
    config = GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, logits_scaling=4.0,
    )  # fmt: skip
    folder = folder_of(GraniteForCausalLM(config), tmp_path / "m")
    with pytest.raises(UsageError, match="changes its logits"):
        load_policy(folder)


def test_no_model_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_policy(tmp_path)


def test_bfloat16_computes_over_float32_masters(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    exact, policy = load_policy(folder), load_policy(folder, compute_dtype="bfloat16")
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    hidden = policy.hidden(IDS, torch.ones_like(IDS)).detach()
    expected = exact.hidden(IDS, torch.ones_like(IDS)).detach()
    assert hidden.dtype == torch.bfloat16
    assert 0 < float((hidden.float() - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("kind", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_folder_loads(tmp_path: Path, kind: str, tied: bool) -> None:
    source = write_model(tmp_path / "m", tie_word_embeddings=tied)
    policy = load_policy(source)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.01)
    save_policy(policy.model, source, tmp_path / "out", kind)
    dtype = torch.bfloat16 if kind == "auto" else getattr(torch, kind)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert getattr(torch, config["dtype"]) == dtype and config["attention_dropout"] == 0.5
    assert config["use_cache"] is True and config["architectures"] == ["LlamaForCausalLM"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {dtype}
    assert ("lm_head.weight" in names) == (not tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.to(dtype))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w7 w8")["input_ids"] == [7, 8]
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}


def test_companion_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    # Hub models carry such a file; transformers refuses to write it (a temperature without sampling).
    (source / "generation_config.json").write_text('{"temperature": 0.3,  "do_sample": false}')
    save_policy(load_policy(source).model, source, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    (source / "generation_config.json").unlink()
    save_policy(load_policy(source).model, source, tmp_path / "out")
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_saving_replaces_a_torn_folder_and_repeats_its_bytes(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    policy = load_policy(source)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_bytes(b"torn")
    save_policy(policy.model, source, tmp_path / "out")
    save_policy(policy.model, source, tmp_path / "again")
    files = sorted(p.name for p in (tmp_path / "again").iterdir())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == files
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_checkpoint_dtype_is_read_from_the_tensors(tmp_path: Path, kind: torch.dtype) -> None:
    folder = write_model(tmp_path / "m", dtype=kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float64"}))
    assert checkpoint_dtype(folder) == str(kind).removeprefix("torch.")


def test_a_checkpoint_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    left_out = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    save_file({name: value for name, value in tensors.items() if name != left_out}, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="the checkpoint lacks"):
        load_policy(folder)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UsageError, match="cannot load the model"):
        load_policy(folder)
