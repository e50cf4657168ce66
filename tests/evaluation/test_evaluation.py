"""Evaluations of judged tasks, of responses and judgments made elsewhere, and of every task at once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from bnfctl import dryrun, launch
from bnfctl.artifact import Artifact, Pinned, Store
from bnfctl.config import EvalConfig
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.evaluation.inputs import name_of
from bnfctl.evaluation.rows import rows_of
from bnfctl.stages import eval as eval_stage
from bnfctl.tables import MODELS, load
from bnfctl.tasks.judged_rows import from_row
from tests.evaluation.world import EVERY_TASK, data, say
from tests.stages.chain import run
from tests.stub_server import StubServer
from tests.tasks.judged_world import answer_row, hand_count, mine, said_so, write
from tests.tasks.test_wildbench import score_rows
from tests.tasks.test_zeroeval import GSM

COUNT = 6


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data(tmp_path_factory.mktemp("items"), COUNT)


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """Responses of `mine` to every question of Arena-Hard."""
    return write(tmp_path / "mine.jsonl", [answer_row(n, mine(n), "mine", 2024) for n in range(COUNT)])


def judged(items: Path, *files: Path, **changes: Any) -> EvalConfig:
    given = {"tasks": ("arena-hard",), "responses": tuple(map(str, files)), "data_dir": str(items), "retries": 0}
    return EvalConfig(**{**given, **changes})


def of(artifact: Artifact, task: str, model: str) -> dict[str, Any]:
    return dict(artifact.manifest.summary["tasks"][task]["models"][model])


def test_the_win_rate_is_a_hand_count(store: Store, items: Path, answers: Path) -> None:
    with StubServer(say=say) as stub:
        made = run(judged(items, answers, server=(stub.url,)), store)
        figures = of(made, "arena-hard", "mine")
        assert (
            figures["mean"] == figures["win_rate"]["mean"] == pytest.approx(hand_count([mine(n) for n in range(COUNT)]))
        )
        assert 0 < figures["mean"] < 1 and figures["low"] < figures["mean"] < figures["high"]
        assert figures["judge"]["served_model"] == "stub" and figures["interval"] == "bootstrap"
        assert sum(stub.asked.values()) == 2 * COUNT
        rows = rows_of(made, "arena-hard", ["model", "item_id", "response", "grade", "extra", "answers", "tokens"])
        assert [row["item_id"] for row in rows] == [f"q{n}" for n in range(COUNT)]
        assert [row["response"] for row in rows] == [mine(n) for n in range(COUNT)]
        assert from_row(rows[0]).answers["game1"][0]["choices"][0]["text"].startswith("I wrote my own")
        # what was paid for is kept beside the artifacts: the same again costs nothing, nor does another table
        again = launch.execute("eval", judged(items, answers, server=(stub.url,)), store, force=True).artifact
        assert again.manifest.digest == made.manifest.digest
        assert again.manifest.provenance["usage"]["requests"] == 0
        assert sum(stub.asked.values()) == 2 * COUNT


def test_two_models_make_a_table(store: Store, items: Path, answers: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [{"id": f"q{n}", "response": "word " * (3 + n)} for n in range(COUNT)])
    with StubServer(say=say) as stub:
        made = run(judged(items, answers, other, server=(stub.url,)), store)
    table = made.manifest.summary["tasks"]["arena-hard"]
    assert made.manifest.summary["models"] == ["mine", "other"] and table["warnings"] == []
    (pair,) = table["comparisons"]
    means = {name: found["mean"] for name, found in table["models"].items()}
    assert (pair["first"], pair["second"], pair["n"]) == ("mine", "other", COUNT)
    assert pair["mean"] == pytest.approx(means["mine"] - means["other"]) and pair["p_holm"] == pair["p"]
    text = eval_stage.table_of(made)
    assert "judged by stub" in text and "mine - other" in text


def test_the_base_is_compared_item_by_item(store: Store, items: Path, answers: Path, tmp_path: Path) -> None:
    better = write(tmp_path / "better.jsonl", [{"id": f"q{n}", "response": mine(n) + " x" * 90} for n in range(COUNT)])
    with StubServer(say=say) as stub:
        base = run(judged(items, answers, server=(stub.url,)), store)
        made = run(judged(items, better, server=(stub.url,), base=base.ref), store)
        many = run(judged(items, answers, better, server=(stub.url,)), store)
        with pytest.raises(UsageError, match="the base holds 2 models") as caught:
            run(judged(items, better, server=(stub.url,), base=many.ref), store)
    assert caught.value.where == "--base"
    figures = of(made, "arena-hard", "better")
    assert figures["base_mean"] == pytest.approx(of(base, "arena-hard", "mine")["mean"])
    assert figures["gain"] == pytest.approx(figures["mean"] - figures["base_mean"])
    assert figures["gain"] > 0.3 and figures["gain_low"] <= figures["gain"] <= figures["gain_high"]
    assert figures["p_holm"] == figures["p"] < 0.05 and figures["detectable"] > 0


def test_answers_without_a_verdict_are_null_and_say_why(store: Store, items: Path, answers: Path) -> None:
    texts = {0: ("[[A>B]] or [[B>A]]", "stop"), 1: ("I was cut", "length")}
    with StubServer(lambda call: call.number in texts and said_so(call, *texts[call.number]), say=say) as stub:
        made = run(judged(items, answers, server=(stub.url,), concurrency=1), store)
        assert len(stub.asked) == 2 * COUNT + 1, "the one without a label is asked to finish"
    rows = rows_of(made, "arena-hard", ["extra"])
    assert [json.loads(row["extra"])["nulls"] for row in rows] == [{"game1": "labels differ"}, *[{}] * (COUNT - 1)]
    assert of(made, "arena-hard", "mine")["null_share"] == pytest.approx(1 / (2 * COUNT))


def test_max_calls_is_a_stop_that_loses_nothing(store: Store, items: Path, answers: Path) -> None:
    with StubServer(say=say) as stub:
        with pytest.raises(BnfctlError, match="5 calls were made") as caught:
            run(judged(items, answers, server=(stub.url,), max_calls=5), store)
        assert caught.value.where == "--max-calls" and sum(stub.asked.values()) == 5
        made = run(judged(items, answers, server=(stub.url,)), store)
        assert sum(stub.asked.values()) == 2 * COUNT and made.manifest.provenance["usage"]["cached"] == 5


def test_a_dry_run_says_what_a_judge_will_be_asked(store: Store, items: Path, answers: Path) -> None:
    with StubServer(say=say) as stub:
        planned = eval_stage.plan(judged(items, answers, server=(stub.url,)), store)
        document = dryrun.describe(planned, {}, store, False)
        assert not stub.asked
    (line,) = document["judge"]
    assert line.startswith(f"arena-hard: {2 * COUNT} calls, about ") and line in dryrun.as_text(document)


def test_judgments_of_elsewhere_need_no_judge(store: Store, tmp_path: Path) -> None:
    config = EvalConfig(tasks=("wildbench",), responses=(str(write(tmp_path / "x.jsonl", score_rows())),))
    made = run(config, store)
    found = of(made, "wildbench", "org/mine")
    assert found["judge"]["served_model"] == "unknown" and found["n"] == sum(1 for row in score_rows() if row["score"])
    scores = [float(row["score"]) for row in score_rows() if row["score"]]
    assert found["score"] == pytest.approx(fmean(scores)) and found["mean"] == pytest.approx(20 * (fmean(scores) - 5))
    assert "score of 10" in eval_stage.table_of(made)
    named = run(dataclasses.replace(config, served_model="gpt-4o"), store)
    assert of(named, "wildbench", "org/mine")["judge"]["served_model"] == "gpt-4o"


def test_figures_of_different_judges_come_with_a_warning(
    store: Store, items: Path, answers: Path, tmp_path: Path
) -> None:
    games = [{"user_prompt": "", "judgment": "", "score": label} for label in ("A>B", "B>A")]
    elsewhere = [{"question_id": f"q{n}", "model": "other", "judge": "gpt-4o", "games": games} for n in range(COUNT)]
    with StubServer(say=say) as stub:
        made = run(judged(items, answers, write(tmp_path / "judged.jsonl", elsewhere), server=(stub.url,)), store)
    table = made.manifest.summary["tasks"]["arena-hard"]
    assert table["warnings"][0] == "different judges: these figures do not compare"
    assert "warning: different judges" in eval_stage.table_of(made)
    assert table["models"]["other"]["judge"]["served_model"] == "gpt-4o" and table["models"]["other"]["mean"] == 0


def test_a_base_of_another_judge_comes_with_a_warning(store: Store, tmp_path: Path) -> None:
    config = EvalConfig(tasks=("wildbench",), responses=(str(write(tmp_path / "x.jsonl", score_rows())),))
    base = run(dataclasses.replace(config, served_model="one"), store)
    same = run(dataclasses.replace(config, served_model="one", base=base.ref), store)
    assert same.manifest.summary["tasks"]["wildbench"]["warnings"] == []
    other = run(dataclasses.replace(config, served_model="two", base=base.ref), store)
    warnings = other.manifest.summary["tasks"]["wildbench"]["warnings"]
    assert warnings[0] == "different judges: these figures do not compare" and "org/mine (base)" in warnings[1]


@pytest.mark.parametrize(
    ("task", "file", "more"),
    [
        ("arena-hard", "arena-hard-v0.1/question.jsonl", {"server": ("http://127.0.0.1:9/v1",), "retries": 0}),
        ("gsm8k", "gsm8k.jsonl", {}),
    ],
)
def test_what_the_hub_does_not_give_is_named(store: Store, task: str, file: str, more: dict[str, Any]) -> None:
    planned = eval_stage.plan(EvalConfig(tasks=(task,), model="lab", sampler="hf", **more), store)
    with pytest.raises(UsageError, match="could not resolve") as caught:
        planned.require_resolved("eval")
    assert caught.value.hint == f"--data-dir FOLDER with {file} in it"


def test_zeroeval_files_are_graded_without_a_model(store: Store, tmp_path: Path) -> None:
    rows = [{**row, "output": [json.dumps({"reasoning": "r", "answer": str(n + 4)})]} for n, row in enumerate(GSM)]
    rows[1]["output"] = ["no idea"]
    files = []
    for model, mine_ in (("good", rows), ("half", [*rows[:2], *({**row, "output": ["?"]} for row in rows[2:])])):
        files.append(tmp_path / f"{model}.json")
        files[-1].write_text(json.dumps([{**row, "generator": model} for row in mine_]))
    made = run(EvalConfig(tasks=("gsm8k",), responses=tuple(map(str, files))), store)
    good, half = of(made, "gsm8k", "good"), of(made, "gsm8k", "half")
    assert (good["mean"], good["no_answer"], half["mean"]) == (0.8, 0.2, 0.2) and good["tokens"] is None
    (pair,) = made.manifest.summary["tasks"]["gsm8k"]["comparisons"]
    assert pair["mcnemar"] == {"first_only": 3, "second_only": 0, "p": 0.25}
    assert "model" not in made.manifest.inputs and made.manifest.inputs["responses-1"]["path"] == str(files[1])
    items = str(write(tmp_path / "items" / "gsm8k.jsonl", GSM).parent)  # rows of an evaluation don't bring them along
    again = run(EvalConfig(tasks=("gsm8k",), responses=(made.ref,), data_dir=items), store)
    assert of(again, "gsm8k", "good")["mean"] == 0.8 and again.manifest.inputs["responses-0"]["kind"] == "artifact"
    first = run(EvalConfig(tasks=("gsm8k",), responses=(str(files[0]),), limit=2), store)
    assert (of(first, "gsm8k", "good")["n"], of(first, "gsm8k", "good")["mean"]) == (2, 0.5)


def test_lab_tasks_take_responses_too(store: Store, tmp_path: Path) -> None:
    own = run(EvalConfig(tasks=("lab-reasoning",), model="lab", sampler="hf", limit=8), store)
    rows = [{"item_id": row["item_id"], "response": row["response"]} for row in own.rows()]
    made = run(EvalConfig(tasks=("lab-reasoning",), responses=(str(write(tmp_path / "x.jsonl", rows)),)), store)
    assert of(made, "lab-reasoning", "x")["mean"] == of(own, "lab-reasoning", "lab")["mean"]


def test_the_model_and_files_make_one_pool(store: Store, items: Path, answers: Path) -> None:
    with StubServer(say=say) as stub:
        config = judged(items, answers, server=(stub.url,), model="lab", sampler="hf", limit=2)
        config = dataclasses.replace(config, seed=1)
        made = run(config, store)
    table = made.manifest.summary["tasks"]["arena-hard"]
    assert made.manifest.summary["models"] == ["lab", "mine"] == table["pool"]
    assert table["models"]["lab"]["tokens"] > 0 and table["models"]["mine"]["tokens"] is None
    assert {row["item_id"] for row in made.rows(["item_id"])} == {"q0", "q1"}


def test_a_prompt_that_fills_the_context_has_an_empty_response(store: Store, tmp_path: Path, brief: Path) -> None:
    rows = [{**GSM[0], "id": "long", "question": "why? " * 400}, {**GSM[0], "id": "short"}]
    template = tmp_path / "prompt.txt"
    template.write_text("{question}")
    config = EvalConfig(
        tasks=("gsm8k",), model=str(brief), sampler="hf", template=str(template), chunk=1,
        data_dir=str(write(tmp_path / "items" / "gsm8k.jsonl", rows).parent),
    )  # fmt: skip
    made = run(config, store)
    long, short = made.rows()
    assert (long["response"], long["tokens"], long["finish_reason"], long["grade"]) == ("", 0, "no_room", 0)
    assert short["tokens"] > 0
    assert of(made, "gsm8k", "brief")["no_room"] == 1 and of(made, "gsm8k", "brief")["n"] == 2
    assert "1 prompts fill the context of brief" in eval_stage.table_of(made)


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"responses": ()}, "MODEL", "nothing to evaluate"),
        ({"server": ()}, "--server", "the responses wait for a judge"),
        ({"server": (), "responses": (), "model": "lab"}, "--server", "arena-hard needs a judge"),
        ({"tasks": ("arena-hard", "gsm8k")}, "--tasks", "--responses are of one task"),
        ({"tasks": ("gsm8k",)}, "--server", "--server changes nothing here: no task of gsm8k has a judge"),
        ({"tasks": ("gsm8k",), "server": (), "max_calls": 3}, "--max-calls", "changes nothing here"),
        ({"reference": "lab"}, "--reference", "is for --tasks shifts"),
        ({"judge": "lab"}, "--server", "--judge starts a server here"),
        ({"judge": "lab", "server": (), "served_model": "x"}, "--served-model", "is for --server"),
        ({"shift_prompts": "lab:chat"}, "--shift-prompts", "changes nothing here"),
        ({"responses": ("missing.jsonl",)}, "--responses", "no such file"),
        ({"data_dir": "."}, "--data-dir .", "no arena-hard-v0.1/question.jsonl"),
        ({"judge_prompt": "missing.yaml"}, "--judge-prompt", "no such file"),
        ({"length_unit": "nowhere"}, "--length-unit", "no model 'nowhere'"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_said_first(
    store: Store, items: Path, answers: Path, changes: dict[str, Any], where: str, what: str
) -> None:
    with StubServer(say=say) as stub:
        with pytest.raises(UsageError, match=what) as caught:
            run(judged(items, answers, **{"server": (stub.url,), **changes}), store)
        assert caught.value.where == where and caught.value.hint and not stub.asked
    assert list(store.artifacts("eval")) == []


def test_the_judge_is_in_the_key(store: Store, items: Path, answers: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{prompt} {response_a} {response_b}")
    with StubServer(say=say, models=("one", "two")) as stub:
        shared = {"server": (stub.url,), "served_model": "one"}
        changes: list[dict[str, Any]] = [
            {}, {"served_model": "two"}, {"judge_prompt": str(prompt)}, {"judge_temperature": None}, {"verdicts": "2025"},
            {"judge_tokens": 99}, {"judge_json": False}, {"length_unit": "lab"},
        ]  # fmt: skip
        keys = {eval_stage.plan(judged(items, answers, **{**shared, **change}), store).key for change in changes}
        same = eval_stage.plan(judged(items, answers, **shared, concurrency=1, timeout=9.0, max_calls=9), store).key
    assert len(keys) == len(changes) and same in keys


def test_models_are_called_the_same_everywhere() -> None:
    assert name_of(Pinned("folder", "/some/where/llama", "d", "/some/where/llama")) == "llama"
    assert name_of(Pinned("hub-model", "org/model@abc", "abc")) == "org/model"
    assert name_of(Pinned("artifact", "train/abc", "d", "/x")) == "train/abc"


@pytest.fixture
def brief(tmp_path: Path) -> Path:
    """The lab's model with less room: on prompts of another world it would write to the end of its context."""
    folder = tmp_path / "brief"
    shutil.copytree(load(MODELS, "lab", "model"), folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 700}))
    return folder


@pytest.mark.slow
def test_every_task_with_the_lab_model(tmp_path: Path, store: Store, brief: Path) -> None:
    """Of 24 items the first 20; what the judges must have given is known."""
    with StubServer(say=say) as stub:
        config = EvalConfig(
            tasks=EVERY_TASK, model=str(brief), sampler="hf", limit=20, data_dir=str(data(tmp_path / "items", 24)),
            server=(stub.url,), reference=str(brief), shift_prompts="lab:chat",
        )  # fmt: skip
        made = run(config, store)
    summary = made.manifest.summary["tasks"]
    found = {task: summary[task]["models"]["brief"] for task in EVERY_TASK}
    assert {task: one["n"] for task, one in found.items()} == dict.fromkeys(EVERY_TASK, 20)
    responses = [row["response"] for row in rows_of(made, "arena-hard", ["response"])]
    assert found["arena-hard"]["mean"] == pytest.approx(hand_count(responses)) and found["arena-hard"]["mean"] > 0
    assert found["wildbench"]["score"] == pytest.approx(fmean(1 + n % 10 for n in range(20)))
    assert found["wildbench-pairs"]["mean"] == pytest.approx(50)
    assert found["shifts"]["z2_sum"]["mean"] == 0
    table = eval_stage.table_of(made)
    assert all(task in table for task in EVERY_TASK if task != "shifts") and "log-likelihood shift" in table
