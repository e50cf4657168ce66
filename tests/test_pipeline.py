"""Pipeline files: variables, inputs by step name, errors, dry runs; and every shipped file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bnfctl import losses, options, pipeline
from bnfctl.artifact import Artifact, Store
from bnfctl.errors import UsageError
from bnfctl.recipes import PUBLISHED_SETS
from tests.conftest import REPOSITORY, Done

SHIPPED = sorted((REPOSITORY / "pipelines").glob("*.yaml"))

TWO_TRAININGS = """
vars: {model: lab, loss: bnf}
steps:
  pairs: {stage: build, input: prefs.jsonl}
  one: {stage: train, model: "${vars.model}", data: pairs, loss: "${vars.loss}"}
  two: {stage: train, model: "${vars.model}", data: pairs, loss: sft, lr: 1e-5}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_pipeline_is_valid_and_dry_runs(path: Path, store: Store) -> None:
    verdicts = pipeline.Run(pipeline.read(path), store).dry()
    assert [verdict for _, verdict in verdicts]
    assert all("to be made" in verdict for _, verdict in verdicts)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_loss_of_a_shipped_pipeline_can_be_made(path: Path, store: Store) -> None:
    run = pipeline.Run(pipeline.read(path), store)
    trainings = [run.config(step, placeholders=True) for step in run.steps if step.stage == "train"]
    assert trainings
    for config in trainings:
        assert losses.make(config.loss, config.loss_arg).needs_pairs == (config.loss in ("dpo", "simpo"))


RECIPES: dict[str, dict[str, tuple[float, dict[str, float]]]] = {
    "mistral-7b-bnf": {
        "bnf": (5e-7, {}),
        "dpo": (5e-7, {"beta": 0.01}),
        "simpo": (5e-7, {"beta": 2.5, "gamma": 2.5 * 0.1}),
    },
    "llama3-8b-bnf": {
        "bnf": (6e-7, {}),
        "dpo": (3e-7, {"beta": 0.01}),
        "simpo": (1e-6, {"beta": 10.0, "gamma": 10 * 0.3}),
    },
    "gemma2-9b-bnf": {
        "bnf": (8e-7, {}),
        "dpo": (5e-7, {"beta": 0.01}),
        "simpo": (8e-7, {"beta": 10.0, "gamma": 10 * 0.5}),
    },
}
"""The paper's learning rates, and SimPO's table: learning rate, beta, and gamma as beta times its gamma / beta."""


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_have_the_published_hyper_parameters(name: str, store: Store) -> None:
    run = pipeline.Run(pipeline.read(REPOSITORY / "pipelines" / f"{name}.yaml"), store)
    trainings = {step.name: run.config(step, placeholders=True) for step in run.steps if step.stage == "train"}
    found = {}
    for branch, config in trainings.items():
        loss: Any = losses.make(config.loss, config.loss_arg)
        assert config.loss == branch
        found[branch] = (config.lr, dataclasses.asdict(loss))
    assert found == {branch: (lr, pytest.approx(values)) for branch, (lr, values) in RECIPES[name].items()}


@pytest.mark.parametrize("name", RECIPES)
def test_the_branches_of_a_recipe_share_records_and_reference(name: str, store: Store) -> None:
    run = pipeline.Run(pipeline.read(REPOSITORY / "pipelines" / f"{name}.yaml"), store)
    branches = [run.config(step, placeholders=True) for step in run.steps if step.stage == "train"]
    [build] = [step.name for step in run.steps if step.stage == "build"]
    assert {step.raw["data"] for step in run.steps if step.stage == "train"} == {build}
    common = {options.canonical({**options.key_fields(c), "loss": 0, "loss_arg": 0, "lr": 0}) for c in branches}
    assert len(common) == 1, "only the loss and its learning rate differ"
    first = branches[0]
    assert (first.batch_size, first.epochs, first.max_length, first.warmup) == (128, 1, 4096, 0.1)
    assert (first.model, run.config(run.steps[0]).input) in PUBLISHED_SETS.items()


def test_variables_and_set(tmp_path: Path) -> None:
    path = write(tmp_path, TWO_TRAININGS)
    steps = pipeline.read(path, ["vars.loss=nll-pll"]).steps
    assert [step.raw.get("loss") for step in steps] == [None, "nll-pll", "sft"]
    assert steps[1].raw["model"] == "lab"


@pytest.mark.parametrize(
    ("text", "settings", "what"),
    [
        ("steps: {a: {stage: build, input: x}}\nstepz: 1", (), r"unknown key 'stepz' \(did you mean 'steps'"),
        ("vars: {}", (), "no steps"),
        ("steps: {a: {stage: build, input: x}}\nreport: [a]", (), "report names a folder"),
        ("- 1", (), "expected `vars:` and `steps:`"),
        ("steps: {a: {input: x}}", (), "a step needs a stage"),
        ("steps: {a: {stage: biuld, input: x}}", (), "did you mean 'build'"),
        ("steps: {a: {stage: build, inptu: x}}", (), r"unknown key 'inptu' \(did you mean 'input'"),
        ("steps: {a: {stage: build, input: '${vars.x}'}}", (), "unknown variable"),
        ("vars: {x: 1}\nsteps: {a: {stage: build, input: x}}", ("vars.y=1",), "no variable 'y'"),
        ("vars: {x: 1}\nsteps: {a: {stage: build, input: x}}", ("x=1",), "not a setting"),
        ("steps: {a: {stage: build}}", (), "input is missing"),
        ("steps: {a: {stage: build, input: x, pairing_ratio: much}}", (), "pairing_ratio is a number"),
        (
            "steps: {a: {stage: train, model: lab, data: b}, b: {stage: build, input: x}}",
            (),
            "step 'b' does not come before",
        ),
    ],
)
def test_bad_files_say_where(tmp_path: Path, store: Store, text: str, settings: tuple[str, ...], what: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError, match=what) as caught:
        pipeline.Run(pipeline.read(path, settings), store)
    assert str(path) in str(caught.value.where) or caught.value.where == "--set"


def test_unknown_step_to_start_from(tmp_path: Path, store: Store) -> None:
    asked = pipeline.read(write(tmp_path, TWO_TRAININGS))
    with pytest.raises(UsageError, match="did you mean 'pairs'"):
        pipeline.Run(asked, store, start="pair")


def test_inputs_by_step_name_become_artifacts(
    tmp_path: Path, store: Store, make_build: Callable[..., Artifact]
) -> None:
    run = pipeline.Run(pipeline.read(write(tmp_path, TWO_TRAININGS)), store)
    made = make_build()
    run.made["pairs"] = made
    configs = [run.config(step) for step in run.steps[1:]]
    assert [config.data for config in configs] == [str(made.path)] * 2
    assert [config.loss for config in configs] == ["bnf", "sft"]
    plans = [run.plan(step, lambda first: None) for step in run.steps[1:]]
    assert plans[0].key != plans[1].key
    assert all(plan.inputs["data"].digest == made.manifest.digest for plan in plans)


PREFERENCES = """{"prompt": "Say hi.", "chosen": "hi", "rejected": "no"}
{"prompt": "Say bye.", "chosen": "bye", "rejected": "no"}
"""

SMALL = """
vars: {seed: "0"}
steps:
  pairs: {stage: build, input: PREFS, seed: "${vars.seed}"}
  masked: {stage: build, input: PREFS, pairing_ratio: 0}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    prefs = tmp_path / "prefs.jsonl"
    prefs.write_text(PREFERENCES)
    return write(tmp_path, SMALL.replace("PREFS", str(prefs)))


SEVERAL_SCORERS = """
steps:
  responses: {stage: generate, sampler: file, prompts: RESPONSES}
  first: {stage: score, input: responses, rule: exact}
  second: {stage: score, input: responses, rule: numeric}
  third: {stage: score, input: responses, rule: regex, pattern: "^(.)$"}
  pairs: {stage: build, input: first, also: %s, filter: second, filter_min: 0.5}
"""


def test_an_input_field_takes_several_steps(tmp_path: Path, store: Store) -> None:
    responses = tmp_path / "responses.jsonl"
    responses.write_text('{"prompt": "2 + 3?", "responses": ["5", "4", "It is 5."], "answer": "5"}\n')
    text = SEVERAL_SCORERS.replace("RESPONSES", str(responses))
    for also in ("second", "[second]", '"second, third"'):
        asked = pipeline.read(write(tmp_path, text % also))
        nothing = pipeline.Run(asked, Store(tmp_path / "empty"))
        assert {step.name: verdict for step, verdict in nothing.dry()}["pairs"] == "to be made after first"
        made = {result.step.name: result.artifact for result in pipeline.Run(asked, store).run()}
        inputs = made["pairs"].manifest.inputs
        assert inputs["input"]["ref"] == made["first"].ref
        assert inputs["filter"]["ref"] == made["second"].ref
        others = [inputs[name]["ref"] for name in sorted(inputs) if name.startswith("also")]
        assert others == [made[name].ref for name in ("second", "third")[: 1 + ("," in also)]]


def test_an_input_field_refuses_what_is_no_list_of_steps(tmp_path: Path, store: Store) -> None:
    for also, what in (("[[first]]", "also takes a list of names"), ("responses", "also takes a score step")):
        with pytest.raises(UsageError, match=what):
            pipeline.Run(pipeline.read(write(tmp_path, SEVERAL_SCORERS % also)), store)


def test_run_then_cached_then_forced(small: Path, warm_bnfctl: Callable[..., Done]) -> None:
    first = warm_bnfctl("run", small, "--json")
    assert first.code == 0, first.err
    assert [step["cached"] for step in first.json["steps"]] == [False, False]
    again = warm_bnfctl("run", small, "--json")
    assert [step["cached"] for step in again.json["steps"]] == [True, True]
    assert "[pairs] cached build/" in again.err
    other = warm_bnfctl("run", small, "--json", "--set", "vars.seed=5")
    assert [step["cached"] for step in other.json["steps"]] == [False, True]
    forced = warm_bnfctl("run", small, "--json", "--force", "--from", "masked")
    assert [step["cached"] for step in forced.json["steps"]] == [True, False]
    same: Any = [step["digest"] for step in first.json["steps"]]
    assert [step["digest"] for step in forced.json["steps"]] == same
    assert Path(warm_bnfctl("run", small).out.strip()).is_dir(), "stdout is the last artifact's path, and nothing else"


def test_a_report_that_could_not_be_written_is_said_first(small: Path, warm_bnfctl: Callable[..., Done]) -> None:
    mine = small.parent / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    small.write_text(f"report: {mine}\n" + small.read_text())
    for flags in ((), ("--dry-run",)):
        done = warm_bnfctl("run", small, *flags)
        assert done.code == 2 and "this folder holds other things: notes.txt" in done.err and "[pairs]" not in done.err


def graded(tmp_path: Path, more: str = "") -> Path:
    """Two graded steps, of which the first has half of its items right, and a report."""
    rows = [
        {"session_id": f"q{n}", "question": "2 + 3?", "answer": "5", "output": [f'{{"reasoning": "", "answer": "{said}"}}']}
        for n, said in enumerate(("5", "4"))
    ]  # fmt: skip
    responses = tmp_path / "responses.json"
    responses.write_text(json.dumps(rows))
    step = f"{{stage: eval, tasks: gsm8k, responses: {responses}"
    text = f"steps:\n  graded: {step}{more}}}\n  later: {step}, limit: 1}}\nreport: {tmp_path / 'page'}\n"
    return write(tmp_path, text)


def test_the_report_of_a_pipeline_is_of_its_steps(tmp_path: Path, warm_bnfctl: Callable[..., Done]) -> None:
    done = warm_bnfctl("run", graded(tmp_path), "--json")
    assert done.code == 0 and done.json["report"] == str(tmp_path / "page" / "index.html"), done.err
    assert f"report: {done.json['report']}" in done.err
    page = (tmp_path / "page" / "index.html").read_text()
    assert all(step["artifact"].rpartition("/")[2] in page for step in done.json["steps"])


def test_a_gate_that_fails_ends_the_run_with_what_was_measured(
    tmp_path: Path, warm_bnfctl: Callable[..., Done]
) -> None:
    done = warm_bnfctl("run", graded(tmp_path, ", require: gsm8k>=0.9"), "--json")
    assert done.code == 3 and "error: gsm8k.mean is 0.5000, not >= 0.9" in done.err
    assert [step["step"] for step in done.json["steps"]] == ["graded"], "the step behind the gate is not made"
    assert "gsm8k 0.5000" in done.err and Path(done.json["report"]).is_file()


def test_from_needs_the_steps_before(small: Path, warm_bnfctl: Callable[..., Done]) -> None:
    done = warm_bnfctl("run", small, "--from", "masked")
    assert done.code == 2
    assert "comes before --from and is not made yet" in done.err
    assert "hint: start earlier: --from pairs" in done.err


def test_a_failed_step_says_where_its_log_is_and_a_rerun_goes_on(small: Path, warm_bnfctl: Callable[..., Done]) -> None:
    prefs = small.parent / "prefs.jsonl"
    good = prefs.read_text()
    prefs.write_text(good + "{broken\n")
    failed = warm_bnfctl("run", small)
    assert failed.code == 2
    assert "error: broken JSON" in failed.err
    assert f"{prefs}:3" in failed.err
    log = failed.err.rsplit("log: ", 1)[1].splitlines()[0]
    assert "broken JSON" in Path(log).read_text()
    prefs.write_text(good)
    assert warm_bnfctl("run", small).code == 0


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("steps: {s: {stage: score, input: x.jsonl}, t: {stage: train, model: lab, data: s}}", "data takes a build step; 's' is a score"),
        ("steps: {s: {stage: score, input: x.jsonl}, e: {stage: eval, model: s, tasks: lab-chat}}", "model takes a train step"),
        ("steps: {b: {stage: build, input: [x, y]}}", "input takes one value"),
    ],
)  # fmt: skip
def test_inputs_that_cannot_fit_are_refused_before_anything_runs(
    tmp_path: Path, store: Store, text: str, what: str
) -> None:
    with pytest.raises(UsageError, match=what):
        pipeline.Run(pipeline.read(write(tmp_path, text)), store)


def test_a_named_pipeline_names_its_artifacts(small: Path, warm_bnfctl: Callable[..., Done]) -> None:
    small.write_text("name: demo\n" + small.read_text())
    assert warm_bnfctl("run", small).code == 0
    assert "build/" in warm_bnfctl("show", "demo.masked").out
