"""Configs: decoding, precedence, the cache key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bnfctl.config import CONFIGS, GenerateConfig, TrainConfig
from bnfctl.errors import UsageError
from bnfctl.options import allowed, as_json, base_type, canonical, decode, fields, fingerprint, key_fields, opt, resolve
from bnfctl.recipes import train_recipe

REQUIRED: dict[str, dict[str, Any]] = {
    "generate": {"prompts": "p.jsonl"},
    "score": {"input": "generate/abcd"},
    "build": {"input": "score/abcd"},
    "train": {"model": "lab"},
    "eval": {"model": "lab", "tasks": "lab-chat"},
}


def other_value(cls: type, field: dataclasses.Field[Any], value: Any) -> Any:
    """Any allowed value of the field that is not `value`."""
    words = allowed(field)
    kind, _, many = base_type(cls, field.name)
    if words is not None:
        other = next(word for word in words if (word,) != value and word != value)
        return (other,) if many else other
    if many:
        return ("x=1",)
    if kind is bool:
        return not value
    if kind is str:
        return f"{value}x"
    low, high = field.metadata["low"], field.metadata["high"]
    for candidate in ((value or 0) + 1, (value or 0) / 2, high, low):
        if (
            candidate is not None
            and candidate != value
            and (low is None or candidate >= low)
            and (high is None or candidate <= high)
        ):
            return kind(candidate)
    raise AssertionError(field.name)


@pytest.mark.parametrize(("stage", "name"), [(s, f.name) for s, cls in CONFIGS.items() for f in fields(cls)])
def test_flipping_a_field_changes_the_key_exactly_when_it_says_so(stage: str, name: str) -> None:
    cls = CONFIGS[stage]
    config, _ = resolve(cls, REQUIRED[stage])
    field = next(f for f in fields(cls) if f.name == name)
    flipped = dataclasses.replace(config, **{name: other_value(cls, field, getattr(config, name))})
    changed = fingerprint(key_fields(config)) != fingerprint(key_fields(flipped))
    assert changed == (field.metadata["key"] and field.metadata["input"] is None)
    if not field.metadata["key"]:
        reasons = ("not in the key", "so it is not")
        assert any(reason in field.metadata["help"] for reason in reasons), f"{name} must say why it is not in the key"


@pytest.mark.parametrize("stage", CONFIGS)
def test_a_config_survives_its_json_form(stage: str) -> None:
    cls = CONFIGS[stage]
    config, _ = resolve(cls, REQUIRED[stage])
    again = cls(**{name: decode(cls, name, value, "json") for name, value in as_json(config).items()})
    assert again == config


def test_yaml_1_1_traps(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: no\nlr: 5e-7\nretokenize: on\nloss_arg: [beta=0.1]\ndata: null\n")
    config, origin = resolve(TrainConfig, {}, file)
    assert (config.model, config.lr, config.retokenize, config.loss_arg, config.data) == (
        "no",
        5e-7,
        True,
        ("beta=0.1",),
        None,
    )
    assert origin["lr"] == str(file)


def test_precedence_flag_yaml_recipe_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    name = "meta-llama/Meta-Llama-3-8B-Instruct"
    assert resolve(TrainConfig, {"model": name}, None, train_recipe)[0].lr == 6e-7
    file.write_text(f"model: {name}\nlr: 1e-6\nepochs: 2\n")
    assert resolve(TrainConfig, {}, file, train_recipe)[0].lr == 1e-6
    config, origin = resolve(TrainConfig, {"lr": "2e-6"}, file, train_recipe)
    assert (config.lr, config.epochs, config.batch_size) == (2e-6, 2, 128)
    assert origin["lr"] == "--lr" and origin["batch_size"] == "default"


@pytest.mark.parametrize(
    ("model", "lr"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.2", 5e-7),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 6e-7),
        ("google/gemma-2-9b-it", 8e-7),
        ("google/gemma-2-9b-it@abc123", 8e-7),
    ],
)
def test_the_papers_learning_rates(model: str, lr: float) -> None:
    config, origin = resolve(TrainConfig, {"model": model}, None, train_recipe)
    assert config.lr == lr
    assert "recipe of" in origin["lr"]


@pytest.mark.parametrize(
    ("flags", "what", "hint"),
    [
        ({"los": "bnf"}, "did you mean 'loss'", "known keys"),
        ({"model": "m", "loss": "bnff"}, "did you mean 'bnf'", "one of: bnf"),
        ({"model": "m", "lr": "fast"}, "lr is a number, not 'fast'", None),
        ({"model": "m", "epochs": "1.5"}, "epochs is a whole number", None),
        ({"model": "m", "epochs": "0"}, "at least 1", None),
        ({"model": "m", "retokenize": "maybe"}, "true or false", None),
        ({}, "model is missing", "Hub id"),
    ],
)
def test_bad_values_say_what_and_where(flags: dict[str, Any], what: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(TrainConfig, flags)
    assert what in caught.value.what
    assert caught.value.where
    assert hint is None or hint in str(caught.value.hint)


def test_unknown_yaml_key_and_broken_yaml(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("modle: lab\n")
    with pytest.raises(UsageError, match=r"unknown key 'modle' \(did you mean 'model'\?\)"):
        resolve(TrainConfig, {}, file)
    file.write_text("model: lab\nlr: [1\n")
    with pytest.raises(UsageError) as caught:
        resolve(TrainConfig, {}, file)
    assert caught.value.where == f"{file}:3"


def test_since_default_keeps_old_keys() -> None:
    @dataclasses.dataclass(frozen=True)
    class Old:
        n: int = opt(1, help="n")

    @dataclasses.dataclass(frozen=True)
    class New:
        n: int = opt(1, help="n")
        later: int = opt(0, help="added later", since_default=True)

    assert key_fields(Old()) == key_fields(New())
    assert key_fields(New(later=1)) != key_fields(Old())


def test_canonical_json_is_stable() -> None:
    assert canonical({"b": 1.0, "a": ["é"]}) == '{"a":["é"],"b":1.0}'.encode()
    with pytest.raises(ValueError, match="Out of range"):
        canonical({"a": float("nan")})


def test_lists_split_at_commas() -> None:
    assert decode(CONFIGS["eval"], "tasks", "lab-chat, lab-math", "--tasks") == ("lab-chat", "lab-math")
    assert GenerateConfig(prompts="p").n == 5
