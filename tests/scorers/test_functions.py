"""Rules of the user's own: `--rule python:MODULE:FUNCTION`."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bnfctl.artifact import Store
from bnfctl.config import ScoreConfig
from bnfctl.data.records import Candidate, Group, Prompt, Reward
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.scorers import make, rules
from tests.stages.chain import run, write_jsonl

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes my_rules.py into the working directory; what was imported is forgotten."""
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)

    def made(source: str) -> Path:
        file = tmp_path / "my_rules.py"
        file.write_text(source, encoding="utf-8")
        return file

    yield made
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def reward(response: str = "four", answer: str | None = "4", rule: str = "python:my_rules:score") -> Reward:
    group = Group(Prompt("p7", ({"role": "user", "content": "2 + 2"},), answer), (Candidate("p7", 0, response),))
    ((found,),) = make(ScoreConfig(input="x", rule=rule)).score([group])
    return found


def test_it_gets_the_prompt_the_response_and_the_answer(write: Write) -> None:
    write("def score(prompt, response, answer):\n    return len(prompt) * 100 + len(response) * 10 + len(answer)\n")
    assert reward() == Reward(541.0)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("True", Reward(1.0)),
        ("False", Reward(0.0)),
        ("None", Reward(None)),
        ("3", Reward(3.0)),
        ("__import__('numpy').float32(0.5)", Reward(0.5)),
        ("float('nan')", Reward(None, {"not_finite": "nan"})),
        ("float('-inf')", Reward(None, {"not_finite": "-inf"})),
        ("Reward(0.25, {'why': 'short'})", Reward(0.25, {"why": "short"})),
        ("Reward(None, {'why': 'odd'})", Reward(None, {"why": "odd"})),
        ("Reward(float('nan'))", Reward(None, {"not_finite": "nan"})),
    ],
)
def test_what_it_may_return(returned: str, expected: Reward, write: Write) -> None:
    write(f"from bnfctl.data.records import Reward\n\ndef score(prompt, response, answer):\n    return {returned}\n")
    found = reward()
    assert found == expected
    assert found.value is None or type(found.value) is float


@pytest.mark.parametrize(
    "returned",
    ["'1.0'", "[1.0]", "Reward(1.0, {'a': object()})", "Reward('1')", "Reward(1.0, 3)", "10**400",
     "Reward(1.0, {'a': '\\ud83d'})"],
)  # fmt: skip
def test_anything_else_is_an_error_that_names_the_prompt(returned: str, write: Write) -> None:
    write(f"from bnfctl.data.records import Reward\n\ndef score(prompt, response, answer):\n    return {returned}\n")
    with pytest.raises(BnfctlError, match="python:my_rules:score returned") as caught:
        reward()
    assert caught.value.where == "prompt p7"


def test_an_exception_in_it_names_prompt_exception_and_line(write: Write) -> None:
    file = write("def score(prompt, response, answer):\n    return 1 / (len(answer) - 1)\n")
    with pytest.raises(BnfctlError) as caught:
        reward()
    assert caught.value.what == "python:my_rules:score raised ZeroDivisionError: division by zero"
    assert caught.value.where == "prompt p7"
    assert caught.value.hint == f"see {file}:2"
    assert caught.value.exit_code == 1


def test_one_that_leaves_python_is_an_error_too(write: Write) -> None:
    write("import sys\n\ndef score(prompt, response, answer):\n    sys.exit(3)\n")
    with pytest.raises(BnfctlError, match="my_rules:score raised SystemExit: 3") as caught:
        reward()
    assert caught.value.exit_code == 1


def test_the_file_that_it_is_written_in_is_in_the_key_too(write: Write, tmp_path: Path) -> None:
    write("from my_inner import score\n")
    (tmp_path / "my_inner.py").write_text("def score(prompt, response, answer):\n    return 1\n")
    first = rules.version_of("python:my_rules:score")
    (tmp_path / "my_inner.py").write_text("def score(prompt, response, answer):\n    return 2\n")
    assert rules.version_of("python:my_rules:score") != first


def test_its_file_is_in_the_key(write: Write) -> None:
    file = write("def score(prompt, response, answer):\n    return 1\n")
    first = rules.version_of("python:my_rules:score")
    assert first == f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
    write("def score(prompt, response, answer):\n    return 2\n")
    assert rules.version_of("python:my_rules:score") != first
    assert rules.version_of("numeric") == rules.VERSION


def test_the_stage_scores_with_it_and_again_when_its_file_changes(write: Write, store: Store, tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": f"{i} + 0", "answer": str(i), "responses": [str(i)]} for i in range(300)]
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    write("def score(prompt, response, answer):\n    return response == answer\n")
    config = ScoreConfig(input=str(path), rule="python:my_rules:score")
    made = run(config, store)
    assert made.manifest.summary == {"candidates": 300, "null_rewards": 0, "mean_reward": 1.0}
    assert run(config, store).ref == made.ref
    write("def score(prompt, response, answer):\n    return 2 * (response == answer)\n")
    del sys.modules["my_rules"]
    two = run(dataclasses.replace(config, devices=2), store)  # in processes of their own
    assert two.ref != made.ref and two.manifest.summary["mean_reward"] == 2.0


def test_an_installed_module_is_found_and_a_local_one_comes_first(write: Write, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "my_installed.py").write_text("def score(prompt, response, answer):\n    return 2\n")
    (other / "my_rules.py").write_text("def score(prompt, response, answer):\n    return 2\n")
    sys.path.insert(0, str(other))
    write("def score(prompt, response, answer):\n    return 1\n")
    assert reward(rule="python:my_installed:score").value == 2.0
    assert reward(rule="python:my_rules:score").value == 1.0
    assert sys.path[0] == str(other), "a file of the user's hides nothing from what is imported later"


def test_a_package_of_the_users(write: Write, tmp_path: Path) -> None:
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("def score(prompt, response, answer):\n    return 5\n")
    assert reward(rule="python:my_package.inner:score").value == 5.0


@pytest.mark.parametrize(
    ("source", "rule", "what", "hint"),
    [
        ("", "python:my_rules", "is not python:MODULE:FUNCTION", "--rule python:rewards:score"),
        ("", "python::score", "is not python:MODULE:FUNCTION", "--rule python:rewards:score"),
        ("", "python:my_missing:score", "no module 'my_missing'", "write my_missing.py with `def score("),
        ("", "python:my_rules:score", "my_rules has no function 'score'", "def score(prompt, response, answer)"),
        ("def scores(a, b, c): ...", "python:my_rules:score", "did you mean 'scores'", "def score("),
        ("score = 3", "python:my_rules:score", "my_rules has no function 'score'", "def score("),
        ("def score(prompt): ...", "python:my_rules:score", "my_rules:score too many positional", "def score("),
        ("def score(a, b, c, d): ...", "python:my_rules:score", "missing a required argument: 'd'", "def score("),
        ("import my_nothing", "python:my_rules:score", "imports my_nothing, which is missing", "pip install"),
        ("1 / 0", "python:my_rules:score", "ZeroDivisionError: division by zero", "import my_rules"),
        ("def score(", "python:my_rules:score", "SyntaxError", "import my_rules"),
    ],
)
def test_what_cannot_be_called_is_a_usage_error_before_anything_is_scored(
    source: str, rule: str, what: str, hint: str, write: Write
) -> None:
    write(source)
    for ask in (lambda: make(ScoreConfig(input="x", rule=rule)), lambda: rules.version_of(rule)):
        with pytest.raises(UsageError) as caught:
            ask()
        assert what in caught.value.what
        assert hint in (caught.value.hint or "")
