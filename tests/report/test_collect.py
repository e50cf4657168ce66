"""Which artifacts belong to a report, which runs are one method, and what methods are called."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

import pytest

from bnfctl.artifact import Artifact, Pinned, Plan, Store
from bnfctl.config import EvalConfig, TrainConfig
from bnfctl.errors import UsageError
from bnfctl.report.collect import collect
from bnfctl.report.document import document_of
from tests.report.evals import BASE, graded, publish
from tests.report.page_world import publish_build

ROWS = graded("gsm8k", [1.0, 0.0, 1.0])


def trained(store: Store, build: Artifact, model: Pinned = BASE, **config: Any) -> Artifact:
    plan = Plan("train", 2, TrainConfig(model=model.ref, **config), {"model": model, "data": build.pinned()})
    with store.draft(plan) as draft:
        draft.open()
        (draft.path / "metrics.jsonl").write_text(f'{{"step": 1, "split": "train", "x": "{plan.key}"}}\n')
        return draft.publish({"loss": plan.config.loss, "steps": 1, "final": {"step": 1}})


def labels(artifacts: list[Artifact], store: Store) -> list[tuple[str, str, int]]:
    return [(method.base, method.label, len(method.runs)) for method in collect(artifacts, store).methods]


def test_the_lineage_is_walked_and_seeds_are_one_method(store: Store) -> None:
    build = publish_build(store)
    base = publish(store, ROWS)
    runs = [trained(store, build, loss=loss, seed=seed) for loss, seed in (("bnf", 0), ("bnf", 1), ("dpo", 0))]
    evals = [publish(store, ROWS, run.pinned(), base=base) for run in runs]
    store.set_name("pairs", build.ref)
    found = collect(evals, store)
    assert [(method.label, len(method.runs)) for method in found.methods] == [("Base", 1), ("DPO", 1), ("BNF", 2)]
    assert {one.ref for one in found.evals} == {base.ref, *(one.ref for one in evals)}
    assert [one.ref for one in found.builds] == [build.ref] and len(found.trains) == 3
    assert found.names[build.ref] == "pairs"
    assert [run.seed for run in found.methods[2].runs] == [0, 1] and found.methods[2].runs[0].pairing_ratio == 1.0
    assert found.methods[0].base == "owner/base" and not found.missing


def test_hyper_parameters_tell_methods_of_one_loss_apart(store: Store) -> None:
    build, half = publish_build(store), publish_build(store, ratio=0.5, records=20)
    runs = [
        trained(store, build, loss="dpo", loss_arg=("beta=0.01",)), trained(store, build, loss="dpo", loss_arg=("beta=0.1",)),
        trained(store, build, loss="bnf", lr=5e-7), trained(store, build, loss="bnf", lr=1e-6),
        trained(store, half, loss="bnf", lr=1e-6), trained(store, build, loss="kto", devices=1),
        trained(store, build, loss="kto", seed=3, log_every=2),
    ]  # fmt: skip
    assert [label for _, label, _ in labels(runs, store)] == [
        "DPO beta=0.01", "DPO beta=0.1", "KTO", "BNF (lr=5e-07, 100% pairs)", "BNF (lr=1e-06, 100% pairs)",
        "BNF (lr=1e-06, 50% pairs)",
    ]  # fmt: skip


def test_data_that_differ_in_nothing_but_themselves_are_named_by_their_build(store: Store) -> None:
    builds = [publish_build(store, seed=1, records=10), publish_build(store, seed=2, records=11)]
    runs = [trained(store, build) for build in builds]
    assert [label for _, label, _ in labels(runs, store)] == [f"BNF ({build.ref})" for build in builds]


def test_a_trained_model_can_be_a_base_too(store: Store) -> None:
    build = publish_build(store)
    sft = trained(store, build, loss="sft")
    store.set_name("my-sft", sft.ref)
    bnf = trained(store, build, sft.pinned(), loss="bnf")
    evals = [publish(store, ROWS, one.pinned()) for one in (sft, bnf)]
    assert labels(evals, store) == [("owner/base", "SFT", 1), ("my-sft", "Base", 1), ("my-sft", "BNF", 1)]
    tables = {table.id: table for table in document_of(collect(evals, store), draws=20).tables}
    assert [row[0].text for row in tables["main-my-sft"].rows] == ["Base", "BNF"]
    assert [row[0].text for row in tables["main-owner-base"].rows] == ["SFT"]


def test_a_model_whose_training_is_gone_belongs_to_the_base_it_was_compared_with(store: Store) -> None:
    run = trained(store, publish_build(store))
    base = publish(store, ROWS)
    made = publish(store, ROWS, run.pinned(), base=base)
    shutil.rmtree(run.path)
    assert labels([made], store) == [("owner/base", "Base", 1), ("owner/base", run.ref, 1)]


def test_a_model_of_a_file_is_no_base_whatever_it_is_called(store: Store) -> None:
    made = collect([publish(store, {"Base": ROWS, "a\u202eb\n": ROWS}, None)], store).methods
    assert [(method.label, method.is_base) for method in made] == [("the model Base", False), ("a\\u202eb\\n", False)]


def test_two_commits_of_a_model_are_two_bases(store: Store) -> None:
    other = dataclasses.replace(BASE, ref="owner/base@ffff", digest="c" * 64)
    found = collect([publish(store, ROWS, one) for one in (BASE, other)], store)
    assert [method.label for method in found.methods] == [
        f"owner/base ({one.digest[:8]})" for one in (BASE, other) if one.digest
    ]


def test_files_of_models_that_ran_here_are_theirs(store: Store) -> None:
    """A second judge reads the responses of an eval: the rows keep the model's name."""
    build = publish_build(store)
    run = trained(store, build)
    here = publish(store, ROWS, run.pinned())
    again = publish(store, {run.ref: graded("crux", [1.0]), "gpt": graded("crux", [0.0])}, None)
    found = collect([here, again], store)
    assert [(method.label, method.base) for method in found.methods] == [("BNF", "owner/base"), ("gpt", "owner/base")]
    assert [one.ref for one in found.methods[0].runs[0].evals] == [here.ref, again.ref]


def test_models_of_files_belong_to_the_base_they_were_compared_with(store: Store) -> None:
    other = dataclasses.replace(BASE, ref="owner/other@ffff", digest="c" * 64)
    bases = [publish(store, ROWS, one) for one in (BASE, other)]
    files = publish(store, {"gpt": ROWS}, None, base=bases[1])
    loose = publish(store, {"claude": ROWS}, None)
    runs = [trained(store, publish_build(store), one) for one in (BASE, other)]
    assert labels([*runs, *bases, files, loose], store) == [
        ("owner/base", "Base", 1), ("owner/base", "BNF", 1), ("owner/other", "Base", 1), ("owner/other", "BNF", 1),
        ("owner/other", "gpt", 1), ("", "claude", 1),
    ]  # fmt: skip


def test_inputs_that_are_gone_or_other_are_said(store: Store) -> None:
    build = publish_build(store)
    base = publish(store, ROWS)
    made = publish(store, ROWS, trained(store, build).pinned(), base=base)
    shutil.rmtree(build.path)
    found = collect([made], store)
    assert found.missing == (f"{build.ref}, of which {made.manifest.inputs['model']['ref']} was made, is gone",)
    assert document_of(found, draws=20).notes[0] == found.missing[0]
    text = (base.path / "manifest.json").read_text().replace(base.manifest.digest, "0" * 64)
    (base.path / "manifest.json").write_text(text)
    found = collect([made], store)
    assert any("made again" in line and base.ref in line for line in found.missing) and len(found.evals) == 1


def test_an_eval_of_the_older_version_is_refused(store: Store) -> None:
    plan = Plan("eval", 1, EvalConfig(tasks=("gsm8k",), model="lab"), {"model": Pinned("lab", "lab", "a" * 64)})
    with store.draft(plan) as draft:
        draft.open()
        old = draft.publish({"tasks": {"gsm8k": {"version": "1", "mean": 0.5}}})
    with pytest.raises(UsageError, match="older version: run it again") as refused:
        collect([old], store)
    assert refused.value.where == old.ref and refused.value.hint == "bnfctl eval lab --tasks gsm8k"


def test_nothing_to_report_on_is_an_error(store: Store) -> None:
    with pytest.raises(UsageError, match="nothing to report on"):
        collect([], store)
    with store.draft(Plan("reference", 1, TrainConfig(model="lab", data="x"), {})) as draft:
        draft.open()
        reference = draft.publish({})
    with pytest.raises(UsageError, match="no report shows"):
        collect([reference], store)


def test_bases_of_one_slug_or_of_long_names_have_tables_of_their_own(store: Store) -> None:
    names = ["o/a b", "o/a-b", "o/a b-2", f"o/{'x' * 250}"]
    runs = [
        trained(store, publish_build(store), dataclasses.replace(BASE, ref=f"{name}@1", digest=str(n) * 64))
        for n, name in enumerate(names)
    ]
    found = document_of(collect([publish(store, ROWS, run.pinned()) for run in runs], store), draws=20)
    ids = [table.id for table in found.tables]
    assert len(set(ids)) == len(ids) and max(map(len, ids)) < 100 and sum(one.startswith("main-") for one in ids) == 4
