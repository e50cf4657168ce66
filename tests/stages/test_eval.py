"""eval: rows, intervals, gains over a base on the same items, gates, resume."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

import pytest

from bnfctl import launch, machine, pool, tables
from bnfctl.artifact import Artifact, Store
from bnfctl.config import EvalConfig
from bnfctl.errors import BnfctlError, GateError, UsageError
from bnfctl.lab.world import prompts
from bnfctl.stages import eval as eval_stage
from tests.conftest import Done
from tests.models import make_llama
from tests.stages.chain import Chain, interrupt, published, run
from tests.stages.fakes import Length
from tests.stages.kills import kill_at

Z = NormalDist().inv_cdf(0.975)


@pytest.fixture(autouse=True)
def fake_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Length", "Always", "Third", "Never"):
        monkeypatch.setitem(tables.TASKS, name.lower(), f"tests.stages.fakes:{name}")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("other") / "model", seed=1, stop=2.0)


def asked(model: Path | str, *tasks: str, **changes: Any) -> EvalConfig:
    return EvalConfig(**{"model": str(model), "tasks": tasks, "sampler": "hf", "limit": 6, "chunk": 4, **changes})


def figures(artifact: Artifact, task: str) -> dict[str, Any]:
    """Of the only model."""
    (found,) = artifact.manifest.summary["tasks"][task]["models"].values()
    return dict(found)


def graded(artifact: Artifact, task: str) -> dict[str, float]:
    return {row["item_id"]: row["grade"] for row in artifact.rows() if row["task"] == task and row["grade"] is not None}


def test_rows_are_the_items_of_the_tasks_in_order(policy: Path, store: Store) -> None:
    made = run(asked(policy, "lab-reasoning", "length"), store)
    rows = list(made.rows())
    lab = list(prompts("reasoning", "test", 6))
    wanted = [("lab-reasoning", item["id"]) for item in lab] + [("length", f"item-{i}") for i in range(6)]
    assert [(row["task"], row["item_id"]) for row in rows] == wanted
    assert [row["prompt"][0]["content"] for row in rows[:6]] == [item["prompt"] for item in lab]
    for row in rows:
        assert row["finish_reason"] in ("stop", "length") and row["tokens"] > 0
    for row in rows[6:]:
        characters = len(row["response"])
        assert row["grade"] == (None if row["item_id"] == "item-0" else min(characters, 16) / 16)
        assert json.loads(row["extra"]) == {"characters": characters} and row["tokens"] <= 8
    assert figures(made, "lab-reasoning")["ungraded"] == 0


def test_means_and_intervals(policy: Path, store: Store) -> None:
    made = run(asked(policy, "length", "always", limit=9), store)
    grades = list(graded(made, "length").values())
    assert len(set(grades)) > 1
    length = figures(made, "length")
    assert (length["n"], length["ungraded"]) == (8, 1)
    assert length["mean"] == pytest.approx(fmean(grades))
    assert length["high"] - length["low"] == pytest.approx(2 * Z * stdev(grades) / math.sqrt(8))
    always = figures(made, "always")
    # all right: the Wilson interval is [n / (n + z^2), 1], where the normal one would be a point
    assert (always["n"], always["mean"], always["high"]) == (9, 1.0, pytest.approx(1.0))
    assert always["low"] == pytest.approx(9 / (9 + Z**2))


def test_the_interval_of_a_binary_task_is_wilsons(policy: Path, store: Store) -> None:
    summary = figures(run(asked(policy, "third", limit=9), store), "third")
    share = summary["mean"]
    assert share == pytest.approx(1 / 3)
    for bound in (summary["low"], summary["high"]):
        assert (share - bound) ** 2 == pytest.approx(Z**2 * bound * (1 - bound) / 9)
    assert summary["low"] < share < summary["high"]


def test_the_gain_is_over_the_items_that_both_have(policy: Path, other: Path, store: Store) -> None:
    base = run(asked(policy, "length", "always", limit=8), store)
    made = run(asked(other, "length", base=base.ref, limit=6), store)
    mine, theirs = graded(made, "length"), graded(base, "length")
    differences = [mine[item] - theirs[item] for item in mine]
    result = figures(made, "length")
    assert set(mine) < set(theirs) and any(differences)
    assert result["paired"] == len(differences) == 5
    assert result["gain"] == pytest.approx(fmean(differences))
    assert result["gain"] == pytest.approx(result["mean"] - result["base_mean"])
    half = Z * stdev(differences) / math.sqrt(5)
    assert (result["gain_low"], result["gain_high"]) == pytest.approx((result["gain"] - half, result["gain"] + half))
    assert made.manifest.inputs["base"]["ref"] == base.ref
    assert f"{result['gain']:+.3f}" in eval_stage.table_of(made)


def test_a_model_gains_nothing_over_itself(policy: Path, store: Store) -> None:
    base = run(asked(policy, "length"), store)
    result = figures(run(asked(policy, "length", base=base.ref), store), "length")
    assert (result["gain"], result["gain_low"], result["gain_high"]) == (0, 0, 0)


def test_a_task_that_the_base_lacks_is_named(policy: Path, other: Path, store: Store) -> None:
    base = run(asked(policy, "length"), store)
    with pytest.raises(UsageError, match="the base has no grades for always") as caught:
        run(asked(other, "length", "always", base=base.ref), store)
    assert (caught.value.exit_code, caught.value.where) == (2, "--base")
    assert caught.value.hint == f"bnfctl eval {policy} --tasks length,always"


def test_a_base_must_be_an_eval_artifact(chain: Chain, policy: Path) -> None:
    with pytest.raises(UsageError, match="is a build artifact; this takes eval") as caught:
        run(asked(policy, "length", base=chain.build.ref), chain.store)
    assert caught.value.where == "--base"


def test_a_base_that_was_graded_by_another_version_is_refused(
    policy: Path, other: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = run(asked(policy, "length"), store)
    monkeypatch.setattr(Length, "version", "2")
    with pytest.raises(UsageError, match="length: the base was graded by version 1, this is 2") as caught:
        run(asked(other, "length", base=base.ref), store)
    assert caught.value.hint is not None and "bnfctl eval" in caught.value.hint
    assert published(store) == [base.ref]


def test_a_new_version_of_a_task_is_another_key(policy: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = launch.plan("eval", asked(policy, "length"), store, lambda first: None).key
    monkeypatch.setattr(Length, "version", "2")
    assert launch.plan("eval", asked(policy, "length"), store, lambda first: None).key != before


def test_a_task_without_any_grade_is_an_error(policy: Path, store: Store) -> None:
    with pytest.raises(BnfctlError, match=f"never: no item of {policy.name} could be graded"):
        run(asked(policy, "never"), store)
    assert published(store) == []


def test_gates_hold_or_say_by_how_much_they_do_not(policy: Path, store: Store) -> None:
    base = run(asked(policy, "always", "length"), store)
    config = asked(policy, "always", "length", base=base.ref)
    made = run(config, store)
    held = ("always>=1", "always.low > 0.5", "length.gain<=0", "length.gain_low>=0")
    gated = launch.execute("eval", asked(policy, "always", "length", base=base.ref, require=held), store)
    assert gated.cached and gated.artifact.path == made.path, "gates are checked after, so they are not in the key"
    eval_stage.check(asked(policy, "always", "length", base=base.ref, require=held), made)
    failing = ("always<1", "always>=1", "length.gain>0.1")
    with pytest.raises(GateError, match=r"always.mean is 1.0000, not < 1; length.gain is 0.0000, not > 0.1") as caught:
        eval_stage.check(asked(policy, "always", "length", base=base.ref, require=failing), made)
    assert (caught.value.exit_code, caught.value.where) == (3, made.ref)


@pytest.mark.parametrize(
    ("gate", "what"),
    [
        ("always", "not a gate"),
        ("alway>=1", "did you mean 'always'"),
        ("always>=high", "'high' is not a number"),
        ("always.gain>=0", "a gain needs --base"),
        pytest.param(
            "always>=nan",
            "nan",
        ),
    ],
)
def test_a_bad_gate_is_refused_before_anything_is_sampled(gate: str, what: str, policy: Path, store: Store) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        run(asked(policy, "always", require=(gate,)), store)
    assert caught.value.where == "--require"
    assert not (store.home / ".drafts").exists()


def test_the_command_line_exits_with_3_where_a_gate_fails(
    policy: Path, store: Store, bnfctl: Callable[..., Done]
) -> None:
    made = run(asked(policy, "lab-reasoning", limit=2, chunk=256), store)
    args = ("eval", policy, "--tasks", "lab-reasoning", "--sampler", "hf", "--limit", "2")
    done = bnfctl(*args, "--require", "lab-reasoning>=0.9", "--require", "lab-reasoning<=1")
    assert done.code == 3, done.err
    assert done.out == f"{made.path}\n", "the result stands all the same"
    assert "error: lab-reasoning.mean is 0.0000, not >= 0.9\n" in done.err
    assert f"where: {made.ref}\n" in done.err and f"hint: bnfctl show {made.ref}" in done.err
    assert bnfctl(*args, "--require", "lab-reasoning<=1").code == 0


def test_a_resumed_run_gives_the_digest_of_an_undisturbed_one(policy: Path, store: Store, tmp_path: Path) -> None:
    config = asked(policy, "length", "always", limit=6, chunk=4)
    for parts in (1, 2, 3):
        interrupt(config, store)
        assert len(list(store.home.glob(".drafts/*/scratch/parts/*.parquet"))) == parts
    resumed = run(config, store)
    undisturbed = run(config, Store(tmp_path / "undisturbed"))
    assert resumed.manifest.digest == undisturbed.manifest.digest
    assert resumed.manifest.summary == undisturbed.manifest.summary


@pytest.mark.slow
def test_two_workers_and_a_kill_leave_the_digest_of_an_undisturbed_run(
    policy: Path, store: Store, tmp_path: Path
) -> None:
    config = asked(policy, "lab-reasoning", "lab-math", limit=12, chunk=2, dtype="float32")
    parts = kill_at(3, dataclasses.replace(config, devices=2), store)
    assert 3 <= parts < 12, "killed in the middle"
    resumed = run(dataclasses.replace(config, devices=2), store)
    undisturbed = run(config, Store(tmp_path / "undisturbed"))
    assert resumed.manifest.digest == undisturbed.manifest.digest
    assert resumed.manifest.summary == undisturbed.manifest.summary
    assert resumed.manifest.provenance["engine"].startswith("transformers")


def test_vllm_on_a_gpu_has_a_process_of_its_own(policy: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[pool.Job] = []

    def refuse(job: pool.Job, units: Any) -> Any:
        seen.append(job)
        raise UsageError("enough")

    monkeypatch.setattr(machine, "visible_gpus", lambda: 4)
    monkeypatch.setattr(pool, "run", refuse)
    for tensor_parallel, workers in ((1, 2), (4, 1)):
        with pytest.raises(UsageError, match="enough"):
            run(asked(policy, "lab-reasoning", sampler="vllm", tensor_parallel=tensor_parallel), store)
        assert (seen[-1].apart, seen[-1].workers, seen[-1].gpus_each) == (True, workers, tensor_parallel)
    with pytest.raises(UsageError, match="--tensor-parallel"):
        run(asked(policy, "lab-reasoning", sampler="hf", tensor_parallel=2), store)


def test_a_copy_of_the_model_is_cached_and_another_seed_is_not(policy: Path, store: Store, tmp_path: Path) -> None:
    made = run(asked(policy, "length"), store)
    shutil.copytree(policy, tmp_path / "copy")
    assert launch.execute("eval", asked(tmp_path / "copy", "length"), store).artifact.path == made.path
    assert run(asked(policy, "length", seed=1), store).manifest.digest != made.manifest.digest


GSM8K = [{"id": f"gsm8k-main-test-#{i}", "question": f"How many apples are {i} and 1?", "answer": f"# {i + 1}"}
         for i in range(3)]  # fmt: skip
CRUX = [{"id": f"crux-test-#{i}", "question": f"assert f({i}) == ??", "answer": f"'{i}'"} for i in range(3)]


@pytest.fixture
def items(tmp_path: Path) -> Path:
    folder = tmp_path / "items"
    folder.mkdir()
    for name, rows in (("gsm8k", GSM8K), ("crux", CRUX)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_benchmark_on_a_folder_of_items(policy: Path, store: Store, items: Path) -> None:
    short = items / "prompt.txt"  # the built-in prompt does not fit the tiny model
    short.write_text("{question}")
    config = asked(policy, "gsm8k", "crux", data_dir=str(items), mathverify=True, template=str(short))
    made = run(config, store)
    results = made.manifest.summary["tasks"]
    assert figures(made, "gsm8k")["n"] == figures(made, "crux")["n"] == 3
    assert {"no_answer", "reasoning_characters", "acc_mathverify"} <= set(figures(made, "gsm8k"))
    assert {"acc_literal", "acc_zeroeval-20240801"} <= set(figures(made, "crux"))
    assert "math-verify" in results["gsm8k"]["version"] and "math-verify" not in results["crux"]["version"]
    assert "no answer" in eval_stage.table_of(made)
    with (items / "crux.jsonl").open("a") as file:
        file.write(json.dumps({"id": "crux-test-#3", "question": "assert f() == ??", "answer": "1"}) + "\n")
    again = run(config, store)
    assert again.manifest.key != made.manifest.key and figures(again, "crux")["n"] == 4


def test_the_grader_and_the_template_are_in_the_key(policy: Path, store: Store, items: Path, tmp_path: Path) -> None:
    def key(**changes: Any) -> str:
        return str(eval_stage.plan(asked(policy, "crux", data_dir=str(items), **changes), store).key)

    template = tmp_path / "prompt.txt"
    template.write_text("Q: {question} Reply in JSON.")
    first = key(template=str(template))
    assert len({key(), key(crux_grader="literal"), first}) == 3
    template.write_text("Question: {question} Reply in JSON.")
    assert key(template=str(template)) != first


@pytest.mark.parametrize(
    ("task", "changes", "what"),
    [
        ("crux", {"mathverify": True}, "--mathverify changes nothing here"),
        ("lab-math", {"crux_grader": "literal"}, "--crux-grader changes nothing here"),
        ("gsm8k", {"data_dir": "."}, "no gsm8k.jsonl or gsm.jsonl"),
        ("crux", {"template": "missing.txt", "data_dir": "ITEMS"}, "no such file"),
    ],
)
def test_flags_of_tasks_are_checked_before_anything_runs(
    policy: Path, store: Store, items: Path, task: str, changes: dict[str, Any], what: str
) -> None:
    given = {name: str(items) if value == "ITEMS" else value for name, value in changes.items()}
    with pytest.raises(UsageError, match=what):
        eval_stage.plan(asked(policy, task, **given), store)
