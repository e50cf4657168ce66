"""Evaluations: files that name the same model, tables as others publish them, commits of hub data, names of judges."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bnfctl import cli, hub, launch, tasks
from bnfctl.artifact import Artifact, Pinned, Plan, Store
from bnfctl.config import EvalConfig
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.evaluation import gates, inputs, shown
from bnfctl.pipeline import Run, read
from bnfctl.stages import eval as eval_stage
from bnfctl.tables import TASKS, load
from tests.evaluation.world import data, say
from tests.stages.chain import run
from tests.stub_server import Call, StubServer
from tests.tasks.judged_world import answer_row, mine, theirs, write
from tests.tasks.test_zeroeval import GSM

COUNT = 4


def result_file(path: Path, answers: list[str], model: str, first: int = 0) -> Path:
    """A result file of ZeroEval: `answers` to the questions from number `first` on."""
    rows = [
        {**GSM[first + n], "output": [json.dumps({"reasoning": "r", "answer": answer})], "generator": model}
        for n, answer in enumerate(answers)
    ]
    path.write_text(json.dumps(rows))
    return path


def regraded(store: Store, *files: Path, **changes: Any) -> Artifact:
    return run(EvalConfig(tasks=("gsm8k",), responses=tuple(map(str, files)), **changes), store)


def right(n: int) -> str:
    return str(GSM[n]["answer"]).rsplit("#", 1)[-1].strip()


def test_files_that_name_the_same_model_are_called_as_the_files(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = [right(n) for n in range(3)], ["-1"] * 3
    files = [
        result_file(tmp_path / "new-coder.json", good, "coder"),
        result_file(tmp_path / "coder.json", bad, "coder"),
    ]
    made = regraded(store, *files)
    models = made.manifest.summary["tasks"]["gsm8k"]["models"]
    assert {name: found["mean"] for name, found in models.items()} == {"new-coder": 1, "coder": 0}
    assert {row["model"] for row in made.rows(["model"])} == {"new-coder", "coder"}
    more = [result_file(tmp_path / f"x{n}.json", good if n else bad, "x") for n in range(5)]
    assert shown.headline_of(regraded(store, *more)) == "gsm8k of 5 models 0.0000 to 1.0000"
    assert "2 files have responses of coder to the same items" in capsys.readouterr().err
    with pytest.raises(UsageError, match="two responses of coder to the same items") as caught:
        regraded(store, files[1], files[1])
    assert caught.value.where == str(files[1])


def test_parts_of_one_models_responses_are_one_model(store: Store, tmp_path: Path) -> None:
    files = [
        result_file(tmp_path / f"part-{n}.json", ["-1"] if n else [right(0), right(1)], "m", 2 * n) for n in (0, 1)
    ]
    made = regraded(store, *files).manifest.summary["tasks"]["gsm8k"]["models"]
    assert (made["m"]["n"], made["m"]["mean"]) == (3, pytest.approx(2 / 3))
    assert regraded(store, *files, limit=2).manifest.summary["tasks"]["gsm8k"]["models"]["m"]["n"] == 2


def test_the_model_is_not_in_a_file_too(store: Store, tmp_path: Path) -> None:
    item = tasks.make("lab-chat").requests(1)[0].id
    file = write(tmp_path / "x.jsonl", [{"id": item, "response": "y", "model": "lab"}])
    with pytest.raises(UsageError, match="lab is the model and in a file"):
        run(EvalConfig(tasks=("lab-chat",), model="lab", sampler="hf", limit=1, responses=(str(file),)), store)


def test_judged_files_with_the_same_items_are_two_models(store: Store, tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{name}.jsonl", [answer_row(n, text(n), "same", 2024) for n in range(COUNT)])
        for name, text in (("a", mine), ("b", theirs))
    ]
    with StubServer(say=say) as stub:
        config = EvalConfig(
            tasks=("arena-hard",), responses=tuple(map(str, files)), data_dir=str(data(tmp_path / "items", COUNT)),
            server=(stub.url,), retries=0,
        )  # fmt: skip
        found = run(config, store).manifest.summary["tasks"]["arena-hard"]["models"]
    assert set(found) == {"a", "b"} and found["b"]["mean"] == 0.5 != found["a"]["mean"]


def test_rows_without_an_id_are_known_by_their_question(store: Store, tmp_path: Path) -> None:
    rows = [
        {"question": GSM[n]["question"], "answer": GSM[n]["answer"], "output": f'{{"answer": "{right(n)}"}}'}
        for n in range(3)
    ]
    files = [write(tmp_path / f"{name}.jsonl", given) for name, given in (("a", rows), ("b", rows[::-1]))]
    found = regraded(store, *files).manifest.summary["tasks"]["gsm8k"]
    assert found["models"]["a"]["mean"] == 1 and found["comparisons"][0]["n"] == 3
    with pytest.raises(UsageError, match="no id") as caught:
        regraded(store, write(tmp_path / "c.jsonl", [{"output": "x"}]))
    assert caught.value.where == f"{tmp_path / 'c.jsonl'}:1"


def test_a_files_name_is_in_the_key(store: Store, tmp_path: Path) -> None:
    """It is the model's, where rows name none; and a boxed answer counts for Llama-3.1 only."""
    rows = [{**GSM[0], "output": [f"so \\boxed{{{right(0)}}}"]}]
    means = {}
    for model in ("other", "Llama-3.1-8B"):
        (means[model],) = [
            found["mean"]
            for found in regraded(store, write(tmp_path / f"{model}.jsonl", rows))
            .manifest.summary["tasks"]["gsm8k"]["models"]
            .values()
        ]
    assert means == {"other": 0, "Llama-3.1-8B": 1}
    (tmp_path / "moved").mkdir()
    moved = write(tmp_path / "moved" / "other.jsonl", rows)
    assert launch.execute("eval", EvalConfig(tasks=("gsm8k",), responses=(str(moved),)), store).cached


def test_the_first_of_several_samples_counts(store: Store, tmp_path: Path) -> None:
    row = {**GSM[0], "output": [json.dumps({"answer": right(0)}), json.dumps({"answer": "-1"})]}
    made = regraded(store, write(tmp_path / "sampled.jsonl", [row]))
    assert made.manifest.summary["tasks"]["gsm8k"]["models"]["sampled"]["mean"] == 1


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("folder", "a folder without Parquet files", "*.json"),
        ("other.jsonl", "no responses", "of other tasks than gsm8k"),
    ],
)
def test_a_place_without_responses_says_what_to_give(
    store: Store, tmp_path: Path, name: str, what: str, hint: str
) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "other.jsonl", [{"task": "crux", "item_id": "x", "response": "y"}])
    with pytest.raises(UsageError, match=what) as caught:
        regraded(store, tmp_path / name)
    assert caught.value.where == str(tmp_path / name) and hint in str(caught.value.hint)


def test_a_shell_may_spread_files_behind_the_flag(tmp_path: Path) -> None:
    one, two, three = (str(write(tmp_path / f"{n}.jsonl", [{}])) for n in range(3))
    words = ["eval", "--responses", one, two, three, "--tasks", "gsm8k", two]
    assert cli.spelled_out(words) == [
        "eval", "--responses", one, "--responses", two, "--responses", three, "--tasks", "gsm8k", two,
    ]  # fmt: skip
    assert cli.spelled_out([f"--responses={one}", two]) == [f"--responses={one}", "--responses", two]
    model = ["eval", "--responses", one, str(tmp_path), "--json"]  # a folder is the model
    assert cli.spelled_out(model) == model and cli.spelled_out(["--responses"]) == ["--responses"]


@pytest.mark.parametrize(
    ("value", "text"), [(293 / 800, "0.3662"), (359 / 800, "0.4488"), (593 / 800, "0.7412"), (1035 / 1319, "0.7847")]
)
def test_shares_are_rounded_as_published_percentages(value: float, text: str) -> None:
    """36.62, 44.88, 74.12 and 78.47 in ZeroEval's tables."""
    figures = {"n": 800, "mean": value, "low": 0.0, "high": 1.0, "tokens": None, "characters": 1590.083, "ungraded": 0,
               "acc_literal": value, "paired": 700}  # fmt: skip
    summary = {"models": ["m"], "tasks": {"crux": {"models": {"m": figures}}}}
    made: Any = SimpleNamespace(manifest=SimpleNamespace(stage_version=2, summary=summary))
    table = shown.table_of(made)
    heading, row = [line for line in table.splitlines() if "task" in line or line.strip().startswith("crux  ")]
    assert heading.split()[-1] == "literal" and row.split()[2] == row.split()[-1] == text and "1590.08" in row
    assert "gain of m: on the 700 of 800 items that the base has too" in table


def test_a_child_keeps_only_commits_that_a_field_can_say() -> None:
    hub = {name: Pinned("hub-data", f"org/{name}@abc", "abc") for name in ("model", "items-gsm8k")}
    config = EvalConfig(tasks=("gsm8k",), model="org/model")
    assert launch.pinned_config(config, Plan("eval", 2, config, hub)).model == "org/model@abc"


def test_a_trained_model_is_read_as_the_one_it_started_from(tmp_path: Path) -> None:
    def trained(name: str, model: Pinned) -> Pinned:
        (tmp_path / name).mkdir()
        manifest = {"schema_version": 1, "stage": "train", "stage_version": 1, "key": name * 12, "digest": "d",
                    "config": {}, "inputs": {"model": dataclasses.asdict(model)}, "files": [], "summary": {}}  # fmt: skip
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
        return Pinned("artifact", f"train/{name}", "d", str(tmp_path / name))

    first = Pinned("hub-model", "meta-llama/Llama-3.1-8B-Instruct@abc", "abc")
    twice = trained("b", trained("a", first))
    config = EvalConfig(tasks=("gsm8k",), model="x", data_dir=str(tmp_path))
    versions = {inputs.make_tasks(config, {"model": model})["gsm8k"].version for model in (first, twice)}
    assert len(versions) == 1 and versions.pop().endswith(", boxed")
    elsewhere = Pinned("folder", "/Llama-3.1/other", "d", "/Llama-3.1/other")
    assert "boxed" not in inputs.make_tasks(config, {"model": elsewhere})["gsm8k"].version


def test_a_pipelines_evaluation_takes_the_rows_of_an_earlier_one(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        "steps:\n  one: {stage: eval, tasks: lab-chat, model: lab, limit: 2}\n"
        "  two: {stage: eval, tasks: lab-chat, responses: one}\n"
    )
    verdicts = [verdict for _, verdict in Run(read(file), store).dry()]
    assert verdicts[1] == "to be made after one"


def test_a_group_of_shares_and_points_is_in_shares() -> None:
    config = EvalConfig(tasks=("arena-hard", "wildbench"), model="m", require=("qa>=0.35", "wildbench>=40"))
    tasks = {"arena-hard": {"models": {"m": {"mean": 0.3}}}, "wildbench": {"models": {"m": {"mean": 40.0}}}}
    made: Any = SimpleNamespace(ref="eval/x", manifest=SimpleNamespace(summary={"models": ["m"], "tasks": tasks}))
    gates.check(config, made)
    with pytest.raises(UsageError, match="no task 'shifts' here"):
        gates.parse("shifts>=0.1", EvalConfig(tasks=("shifts", "gsm8k"), model="m"))


def test_a_parameter_that_the_judge_refuses_is_named(store: Store, tmp_path: Path) -> None:
    def refuse(call: Call) -> bool:
        return "temperature" in call.body and call.send(400, {"error": {"message": "'temperature' does not support 0"}})

    file = write(tmp_path / "mine.jsonl", [answer_row(n, mine(n), "mine", 2024) for n in range(COUNT)])
    with StubServer(refuse, say=say) as stub:
        config = EvalConfig(
            tasks=("arena-hard",), responses=(str(file),), data_dir=str(data(tmp_path / "items", COUNT)),
            server=(stub.url,), retries=0,
        )  # fmt: skip
        with pytest.raises(BnfctlError, match="the judge refuses item q0") as caught:
            run(config, store)
        assert "--judge-temperature none" in str(caught.value.hint)
        made = run(dataclasses.replace(config, judge_temperature=None), store)
    assert "mine" in eval_stage.table_of(made) and all("temperature" not in body for body in stub.bodies[-2 * COUNT :])


def test_benchmarks_are_pinned_by_their_commit_or_their_content(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, str | None] = {}

    def commit_of(ref: str, kind: str) -> tuple[str, str]:
        name, revision = hub.split_revision(ref)
        asked[name] = revision
        return revision or "c" * 40, ""

    monkeypatch.setattr(hub, "commit_of", commit_of)
    names = ("gsm8k", "math-l5", "crux", "mmlu-redux", "arena-hard", "wildbench", "wildbench-pairs", "shifts")
    pins = inputs.pin_items(EvalConfig(tasks=names, model="x"), store)
    assert len(pins) == len(names) + 1 and len(asked) == 7
    loose = {name for name, revision in asked.items() if revision is None}
    sources = [load(TASKS, name, "task").source for name in names]
    digests = {source.hub: source.digest for source in sources}
    assert all(digests[name] for name in loose) and len(loose) == 2
    assert all(len(revision) == 40 for revision in asked.values() if revision is not None)
    assert pins["items-wildbench"].ref.endswith(f"@{asked['allenai/WildBench']}")
