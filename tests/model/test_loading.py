"""A model folder in, a model folder out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bnfctl.errors import UsageError
from bnfctl.model.loading import checkpoint_dtype, load_model, save_model, stored_dtypes
from bnfctl.model.sharding import full_state
from tests.model.tiny import write_model


def load(folder: Path) -> Any:
    return load_model(folder, torch.float32, "sdpa", False, torch.device("cpu"))


def save(model: Any, source: Path, target: Path, dtype: str = "bfloat16") -> None:
    save_model(model, full_state(model, True), source, target, dtype)


def test_masters_are_float32_and_dropout_is_off(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "m"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.attention_dropout == 0.5 and not any(module.training for module in model.modules())


def test_no_model_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot load the model"):
        load(tmp_path)


def test_stored_dtypes_are_those_of_every_tensor(tmp_path: Path) -> None:
    """One float32 tensor among bfloat16 ones counts; integers do not."""
    file = write_model(tmp_path / "m") / "model.safetensors"
    assert stored_dtypes(tmp_path / "m") == {"bfloat16"}
    tensors = {**load_file(file), "steps": torch.tensor([3])}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, file)
    assert stored_dtypes(tmp_path / "m") == {"float32", "bfloat16"}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_folder_loads(tmp_path: Path, kind: str, tied: bool) -> None:
    source = write_model(tmp_path / "m", tie_word_embeddings=tied)
    policy = load(source)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)
    save(policy, source, tmp_path / "out", kind)
    dtype = getattr(torch, kind)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert getattr(torch, config["dtype"]) == dtype and config["attention_dropout"] == 0.5
    assert config["use_cache"] is True and config["architectures"] == ["LlamaForCausalLM"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {dtype}
    assert ("lm_head.weight" in names) == (not tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    for name, parameter in policy.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.to(dtype))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w7 w8")["input_ids"] == [7, 8]
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_companion_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    # Hub models carry such a file; transformers refuses to write it (a temperature without sampling).
    (source / "generation_config.json").write_text('{"temperature": 0.3,  "do_sample": false}')
    save(load(source), source, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    (source / "generation_config.json").unlink()
    save(load(source), source, tmp_path / "out")
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_saving_replaces_a_torn_folder_and_repeats_its_bytes(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    policy = load(source)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_bytes(b"torn")
    save(policy, source, tmp_path / "out")
    save(policy, source, tmp_path / "again")
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
        load(folder)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UsageError, match="cannot load the model"):
        load(folder)
