"""The lineage: every artifact, and a command that asks for the very same thing again."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from bnfctl.artifact import Artifact, Pinned, Plan, Store
from bnfctl.config import CONFIGS, BuildConfig, EvalConfig, GenerateConfig, ScoreConfig, TrainConfig
from bnfctl.options import as_json, base_type, fields, flag_name, resolve
from bnfctl.recipes import train_recipe
from bnfctl.report.collect import collect
from bnfctl.report.document import document_of
from bnfctl.report.lineage import command, lineage, lineage_table
from tests.report.evals import BASE, graded, publish

LAB = Pinned("lab", "lab", "a" * 64)


def made(store: Store, stage: str, config: Any, inputs: dict[str, Pinned]) -> Artifact:
    with store.draft(Plan(stage, 2, config, inputs)) as draft:
        draft.open()
        (draft.path / "metrics.jsonl").write_text(str(config))
        return draft.publish({"models": [], "tasks": {}})


def read(line: str) -> dict[str, Any]:
    """The flags of a command line, by field, as the command line gives them to `resolve`."""
    words = shlex.split(line)
    cls = CONFIGS[words[1]]
    assert words[0] == "bnfctl"
    by_flag = {flag_name(field.name): field.name for field in fields(cls)}
    found: dict[str, Any] = {}
    rest = words[2:]
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            found[next(field.name for field in fields(cls) if field.metadata["positional"])] = word
        elif word.startswith("--no-"):
            found[by_flag[f"--{word[5:]}"]] = "false"
        elif base_type(cls, by_flag[word])[0] is bool:
            found[by_flag[word]] = "true"
        else:
            found[by_flag[word]] = rest.pop(0)
    return found


CASES = [
    ("generate", GenerateConfig(prompts="my prompts.jsonl", model="lab", n=3, temperature=0.0, sort=True, subset="a'b"), {"model": LAB}),
    ("score", ScoreConfig(input="x", scorer="rules", rule="regex", pattern=r"\d+ $"), {}),
    ("build", BuildConfig(input="x", drop_empty=False, pairing_ratio=0.25, weights=(1.0, 2.5), also=("y", "z")), {}),
    ("train", TrainConfig(model="lab", loss="dpo", loss_arg=("beta=0.01", "label_smoothing=0.1")), {"model": LAB}),
    ("train", TrainConfig(model="lab", lr=5e-7, batch_size=32, seed=3, lora=8, lora_save="adapter"), {"model": LAB}),
    ("eval", EvalConfig(tasks=("gsm8k", "crux"), model="lab", limit=20, judge_temperature=None), {"model": LAB}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "config", "inputs"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_command_asks_for_the_same_config(store: Store, stage: str, config: Any, inputs: dict[str, Pinned]) -> None:
    line = command(made(store, stage, config, inputs))
    assert line is not None
    again, _ = resolve(CONFIGS[stage], read(line), None, train_recipe if stage == "train" else None)
    assert as_json(again) == as_json(config)


def test_a_field_at_its_default_that_a_recipe_would_change_is_written(store: Store) -> None:
    """The recipe of the lab has another learning rate than the default."""
    line = command(made(store, "train", TrainConfig(model="lab", lr=5e-7, batch_size=32), {"model": LAB}))
    assert line == "bnfctl train --model lab --lr 5e-07"
    recipe = TrainConfig(model="lab", lr=1.8e-4, batch_size=32, loss="dpo")
    assert command(made(store, "train", recipe, {"model": LAB})) == "bnfctl train --model lab --loss dpo"


def test_inputs_are_written_as_what_they_were_pinned_to(store: Store) -> None:
    build = made(store, "build", BuildConfig(input="file.jsonl"), {})
    config = TrainConfig(model="owner/base", data=None)
    train = made(store, "train", config, {"model": BASE, "data": build.pinned()})
    assert command(train) == f"bnfctl train --model {BASE.ref} --data {build.ref}"
    base = publish(store, graded("gsm8k", [1.0]))
    policy = publish(store, graded("gsm8k", [0.0]), train.pinned(), base=base)
    assert command(policy) == f"bnfctl eval {train.ref} --tasks gsm8k --base {base.ref}"


def test_a_value_that_no_flag_can_hold_gives_no_command(store: Store) -> None:
    assert command(made(store, "train", TrainConfig(model="lab", loss_arg=("a=1,2",)), {"model": LAB})) is None


def test_every_artifact_is_listed_with_what_it_was_made_from(store: Store) -> None:
    base = publish(store, graded("gsm8k", [1.0]))
    policy = publish(store, graded("gsm8k", [0.0]), Pinned("folder", "/models/mine", "c" * 64), base=base)
    store.set_name("mine", policy.ref)
    entries = lineage(collect([policy], store))
    assert [(one["ref"], one["name"], one["digest"], one["key"]) for one in entries] == [
        (base.ref, None, base.manifest.digest, base.manifest.key), (policy.ref, "mine", policy.manifest.digest, policy.manifest.key),
    ]  # fmt: skip
    assert entries[1]["inputs"]["base"] == {"kind": "artifact", "ref": base.ref, "digest": base.manifest.digest}
    assert entries[1]["config"] == {"tasks": ["gsm8k"], "model": "/models/mine", "base": base.ref}
    assert entries[1]["provenance"]["bnfctl"]
    assert document_of(collect([policy], store), draws=20).lineage == entries
    rows = lineage_table(entries).rows
    assert [row[0].text for row in rows] == [base.ref, policy.ref]
    assert f"base {base.ref} ({base.manifest.digest[:12]})" in rows[1][4].text and "--base" in rows[1][6].text
