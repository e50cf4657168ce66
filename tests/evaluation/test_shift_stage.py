"""`eval --tasks shifts` as a whole: which reference, whose responses, what is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bnfctl import launch
from bnfctl.artifact import Pinned, Plan, Store
from bnfctl.config import EvalConfig, TrainConfig
from bnfctl.errors import UsageError
from bnfctl.evaluation.shifting import FOLDER, bins, reference_of
from bnfctl.model.source import pin_model
from bnfctl.stages import eval as eval_stage
from tests.models import make_llama
from tests.stages.chain import interrupt, run, write_jsonl

CONFIG = EvalConfig(model="policy", tasks=("shifts",))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A reference and two policies, of two layers each; their responses end."""
    root = tmp_path_factory.mktemp("models")
    first, second, third = (
        make_llama(root / name, seed=seed, stop=2.0) for seed, name in enumerate(("base", "dpo", "bnf"))
    )
    return first, second, third


def asked(model: Path, prompts: Path, **changes: Any) -> EvalConfig:
    given = {"model": str(model), "tasks": ("shifts",), "shift_prompts": str(prompts), "sampler": "hf", "chunk": 4}
    return EvalConfig(**{**given, "dtype": "float32", **changes})


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"id": f"q{i}", "prompt": f"What is {i}?"} for i in range(6)])


def test_methods_on_the_references_responses_compare_token_by_token(
    models: tuple[Path, Path, Path], prompts: Path, store: Store
) -> None:
    base, *policies = models
    made = {}
    for model in policies:
        made[model.name] = run(asked(model, prompts, reference=str(base), shift_responses="reference"), store)
    own = {model.name: run(asked(model, prompts, reference=str(base)), store) for model in policies}
    found = {name: list(artifact.rows(folder=FOLDER)) for name, artifact in made.items()}
    for name, rows in found.items():
        assert [row["prompt_id"] for row in rows] == [f"q{i}" for i in range(6)]
        assert [row["tokens"] for row in rows] == [row["tokens"] for row in made[name].rows()]
    paired = bins({name: artifact.rows(folder=FOLDER) for name, artifact in made.items()}, "dpo", 5)
    assert paired.paired is not None and len(paired.paired) == 10
    apart = bins({name: artifact.rows(folder=FOLDER) for name, artifact in own.items()}, "dpo", 5)
    assert apart.paired is None and len(apart.histogram) == 10
    assert [row["response"] for row in made["dpo"].rows()] == [row["response"] for row in made["bnf"].rows()]
    assert [row["response"] for row in own["dpo"].rows()] != [row["response"] for row in own["bnf"].rows()]


def test_what_is_published(models: tuple[Path, Path, Path], prompts: Path, store: Store, tmp_path: Path) -> None:
    config = asked(models[1], prompts, reference=str(models[0]), limit=5)
    interrupt(config, store)
    made = run(config, store)
    assert made.manifest.digest == run(config, Store(tmp_path / "undisturbed")).manifest.digest
    assert made.verify() == [] and {entry["path"] for entry in made.manifest.files} == {
        "rows/00000.parquet", f"{FOLDER}/00000.parquet",
    }  # fmt: skip
    assert {"model", "reference", "shift_prompts"} == set(made.manifest.inputs)
    found = made.manifest.summary["tasks"]["shifts"]
    assert (found["reference"], found["responses"], found["models"]["dpo"]["n"]) == ("base", "policy", 5)
    assert "dpo against base" in eval_stage.table_of(made)
    json.dumps(made.manifest.summary, allow_nan=False)
    (made.path / FOLDER / "00000.parquet").write_bytes(b"other")
    assert made.verify() == [f"changed file {FOLDER}/00000.parquet"]


def test_the_reference_and_the_prompts_are_in_the_key(
    models: tuple[Path, Path, Path], prompts: Path, store: Store
) -> None:
    def key(**changes: Any) -> str:
        return launch.plan("eval", asked(models[1], prompts, **changes), store, lambda first: None).key

    one = key(reference=str(models[0]))
    assert one == key(reference=str(models[0]))
    assert len({one, key(reference=str(models[2])), key(reference=str(models[0]), shift_responses="reference")}) == 3
    prompts.write_text(prompts.read_text(encoding="utf-8").replace("What", "Who"), encoding="utf-8")
    assert key(reference=str(models[0])) != one


@pytest.fixture
def trained(store: Store, models: tuple[Path, Path, Path]) -> Callable[[Pinned], Pinned]:
    """A train artifact, pinned, that started from a model."""

    def make(start: Pinned) -> Pinned:
        plan = Plan("train", 2, TrainConfig(model=start.ref, data="build"), {"model": start})
        with store.draft(plan) as draft:
            draft.open()
            shutil.copytree(models[0], draft.path / "model")
            made = draft.publish({})
        return pin_model(str(made.path), store)

    return make


def test_the_reference_is_what_the_training_started_from(
    store: Store, models: tuple[Path, Path, Path], trained: Callable[[Pinned], Pinned]
) -> None:
    folder = pin_model(str(models[1]), store)
    first = trained(folder)
    assert reference_of(CONFIG, store, first) == folder
    assert reference_of(CONFIG, store, trained(first)) == first
    lab = pin_model("lab", store)
    assert reference_of(CONFIG, store, trained(lab)) == lab
    hub = Pinned("hub-model", "owner/name@abc", "abc")
    assert reference_of(CONFIG, store, trained(hub)) == hub
    assert reference_of(replace(CONFIG, reference=str(models[0])), store, first).path == str(models[0])


def test_a_reference_that_nobody_names_is_asked_for(store: Store, models: tuple[Path, Path, Path]) -> None:
    with pytest.raises(UsageError, match="no train artifact that names one") as caught:
        reference_of(CONFIG, store, pin_model(str(models[0]), store))
    assert caught.value.where == "--reference" and "--reference MODEL" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="no model 'nowhere'") as caught:
        reference_of(replace(CONFIG, reference="nowhere"), store, pin_model(str(models[0]), store))
    assert caught.value.where == "--reference"


def test_a_reference_that_changed_or_is_gone_is_refused(
    store: Store, models: tuple[Path, Path, Path], trained: Callable[[Pinned], Pinned], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(models[1], tmp_path / "start"))
    policy = trained(pin_model(str(folder), store))
    (folder / "generation_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match=f"started from has changed since: {folder}"):
        reference_of(CONFIG, store, policy)
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match="can't be read: no model") as caught:
        reference_of(CONFIG, store, policy)
    assert caught.value.where == "--reference" and "--reference MODEL" in (caught.value.hint or "")
