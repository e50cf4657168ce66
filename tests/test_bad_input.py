"""Bad input by the command line: every error says what, where and what to do, and leaves nothing behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bnfctl import launch
from bnfctl.artifact import Artifact, Store
from bnfctl.config import BuildConfig, GenerateConfig
from bnfctl.errors import BnfctlError
from tests.conftest import Done
from tests.models import make_tokenizer
from tests.stages.chain import run, write_jsonl

Run = Callable[..., Done]
GOOD = [{"id": f"q{i}", "prompt": f"{i} + 1?", "answer": str(i + 1), "responses": [str(i + 1), "0"]} for i in range(3)]
PREFERENCES = [{"id": f"r{i}", "prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(3)]


@pytest.fixture
def bnfctl(warm_bnfctl: Run) -> Run:
    return warm_bnfctl


def refused(done: Done, store: Store, *, what: str, where: str, hint: str, code: int = 2, before: int = 0) -> None:
    """Exactly error, where and hint (each a pattern), the exit code, nothing on stdout, nothing new in the store."""
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    for name, pattern in (("error", what), ("where", where), ("hint", hint)):
        found = re.findall(rf"^{name}: (.+)$", done.err, re.M)
        assert len(found) == 1, f"{name}: {done.err}"
        assert re.search(pattern, found[0]), f"{name}: {found[0]}"
    assert len(list(store.home.glob("[a-z]*/*/manifest.json"))) == before
    assert not list(store.home.rglob("*.tmp"))


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "responses.jsonl", GOOD)


@pytest.fixture
def prefs(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prefs.jsonl", PREFERENCES)


@pytest.fixture
def candidates(store: Store, responses: Path) -> Artifact:
    return run(GenerateConfig(prompts=str(responses), sampler="file"), store)


@pytest.fixture
def bare_model(tmp_path: Path) -> Path:
    """A model folder as far as tokenizing prompts goes."""
    folder = tmp_path / "model"
    make_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 32}))
    return folder


@pytest.mark.parametrize(
    ("args", "where"),
    [
        (("generate", "--model", "lab", "--prompts", "missing.jsonl"), "--prompts"),
        pytest.param(
            ("score", "missing.jsonl"), "INPUT",
        ),
        (("build", "missing.jsonl"), "INPUT"),
        (("run", "missing.yaml"), r"missing\.yaml"),
        (("build", "--config", "missing.yaml"), r"missing\.yaml"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)  # fmt: skip
def test_missing_file(args: tuple[str, ...], where: str, bnfctl: Run, store: Store) -> None:
    refused(bnfctl(*args), store, what="no such file", where=f"^{where}$", hint="JSONL file|check the path")


@pytest.mark.parametrize("command", ["generate", "score", "build", "generate with a model"])
def test_broken_jsonl_line(command: str, bnfctl: Run, store: Store, tmp_path: Path) -> None:
    rows = PREFERENCES if command == "build" else GOOD
    path = write_jsonl(tmp_path / "broken.jsonl", [rows[0], "", '{"prompt": "half a li', rows[1]])
    args = {
        "generate": ("generate", "--sampler", "file", "--prompts", path),
        "score": ("score", path),
        "build": ("build", path),
        "generate with a model": ("generate", "--sampler", "hf", "--model", "lab", "--prompts", path),
    }[command]
    refused(bnfctl(*args), store, what="broken JSON", where=f"^{re.escape(str(path))}:3$", hint="one JSON object")


@pytest.mark.parametrize(
    ("args", "row", "hint"),
    [
        (("build",), {"prompt": "Q", "chosne": "yes", "rejected": "no"}, "columns here: prompt, chosne, rejected"),
        (("score",), {"question": "Q", "responses": ["yes"]}, "prompt"),
        (("score",), {"prompt": "Q", "answers": ["yes"]}, "responses"),
        (("generate", "--sampler", "hf", "--model", "lab", "--prompts"), {"question": "Q"}, "columns here: question"),
    ],
)
def test_wrong_columns(
    args: tuple[str, ...], row: dict[str, Any], hint: str, bnfctl: Run, store: Store, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "columns.jsonl", [row])
    what = "no column|the row has no"
    refused(bnfctl(*args, path), store, what=what, where=f"^{re.escape(str(path))}:1$", hint=hint)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        pytest.param("[1, 2]", "expected a JSON object"),
        pytest.param({"prompt": 5, "responses": ["yes"]}, "a prompt is a text or a list"),
        pytest.param({"id": "q0", "prompt": "Another", "responses": ["a"]}, "two prompts with the id"),
        ({"prompt": "Q", "responses": []}, "responses is not a list"),
        ({"prompt": "Q", "responses": [{"txt": "a"}]}, "the response has no text"),
    ],
    ids=str,
)
def test_a_line_that_is_no_row(line: Any, what: str, bnfctl: Run, store: Store, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD[0], line])
    refused(bnfctl("score", path), store, what=what, where=rf"{re.escape(str(path))}:2\b", hint=".")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        pytest.param({"prompt": "Q", "chosen": ["a"], "rejected": "b"}, "chosen and rejected are"),
        pytest.param({"id": "r0", "prompt": "Q", "chosen": "a", "rejected": "b"}, "two prompts with the id"),
    ],
    ids=str,
)
def test_a_row_that_is_no_preference(row: Any, what: str, bnfctl: Run, store: Store, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [PREFERENCES[0], row])
    refused(bnfctl("build", path), store, what=what, where=rf"{re.escape(str(path))}:2\b", hint=".")


@pytest.mark.parametrize("command", ["score", "build"])
def test_empty_prompt(command: str, bnfctl: Run, store: Store, tmp_path: Path) -> None:
    first = (PREFERENCES if command == "build" else GOOD)[0]
    path = write_jsonl(tmp_path / "empty.jsonl", [first, {**first, "id": "other", "prompt": " \n"}])
    done = bnfctl(command, path)
    refused(done, store, what="empty prompt", where=f"^{re.escape(str(path))}:2$", hint="remove the row")


def test_empty_file(bnfctl: Run, store: Store, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "empty.jsonl", [])
    done = bnfctl("score", path)
    refused(done, store, what="no responses", where=f"^{re.escape(str(path))}$", hint="the file is empty")


def test_unknown_loss(bnfctl: Run, store: Store) -> None:
    done = bnfctl("train", "--model", "lab", "--loss", "dpoo")
    refused(
        done, store, what=r"unknown loss 'dpoo' \(did you mean 'dpo'\?\)", where="^--loss$", hint="one of: bnf, sft"
    )


@pytest.mark.parametrize("command", [("generate", "--prompts", "lab:chat", "--model"), ("eval", "--tasks", "lab-chat")])
def test_model_folder_without_tokenizer(command: tuple[str, ...], bnfctl: Run, store: Store, bare_model: Path) -> None:
    for file in bare_model.iterdir():
        if file.name != "config.json":
            file.unlink()
    done = bnfctl(*command, bare_model)
    where = f"^{re.escape(str(bare_model))}$"
    refused(done, store, what="model folder without tokenizer", where=where, hint=r"save_pretrained\(folder\)")


def test_tokenizer_without_chat_template(bnfctl: Run, store: Store, bare_model: Path, responses: Path) -> None:
    make_tokenizer(bare_model, template=None)
    (bare_model / "chat_template.jinja").unlink(missing_ok=True)
    done = bnfctl("generate", "--sampler", "hf", "--model", bare_model, "--prompts", responses)
    where = f"^{re.escape(str(bare_model))}$"
    refused(done, store, what="no chat template", where=where, hint="instruct model.*chat_template.jinja")


@pytest.mark.parametrize(
    ("command", "takes"),
    [(("build",), "score"), (("eval", "lab", "--tasks", "lab-chat", "--base"), "eval"), (("train", "--model", "lab", "--data"), "build"),
     (("eval", "--tasks", "lab-chat"), "train")],
    ids=["build", "eval --base", "train --data", "eval"],
)  # fmt: skip
def test_artifact_of_the_wrong_stage(
    command: tuple[str, ...], takes: str, bnfctl: Run, store: Store, candidates: Artifact
) -> None:
    refused(
        bnfctl(*command, candidates.ref), store, before=1, hint=f"bnfctl ls {takes} lists what fits",
        what=f"{candidates.ref} is a generate artifact; this takes {takes}", where="^(INPUT|MODEL|--base|--data)$",
    )  # fmt: skip


def flip(path: Path, offset: int = 8) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def flip_in_a_column_name(path: Path) -> None:
    flip(path, path.read_bytes().rindex(b"answer"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        truncate,
        pytest.param(
            flip_in_a_column_name,
        ),
        pytest.param(
            Path.unlink,
        ),
    ],
    ids=["flipped byte", "truncated", "flipped byte of the footer", "missing file"],
)
def test_corrupted_artifact(damage: Callable[[Path], None], bnfctl: Run, store: Store, candidates: Artifact) -> None:
    damage(candidates.path / "rows" / "00000.parquet")
    refused(
        bnfctl("score", candidates.ref), store, code=1, before=1, what="corrupted artifact",
        where=f"^{re.escape(str(candidates.path))}", hint=f"bnfctl verify {candidates.ref}",
    )  # fmt: skip


def test_no_flipped_byte_gives_other_rows(candidates: Artifact) -> None:
    shard = candidates.path / "rows" / "00000.parquet"
    good, rows = shard.read_bytes(), list(candidates.rows())
    wrong = []
    for offset in range(0, len(good), 7):
        flip(shard, offset)
        try:
            if list(candidates.rows()) != rows:
                wrong.append(offset)
        except BnfctlError:
            pass
        shard.write_bytes(good)
    assert wrong == []


def test_corrupted_manifest(bnfctl: Run, store: Store, candidates: Artifact) -> None:
    (candidates.path / "manifest.json").write_text("{")
    where = f"^{re.escape(str(candidates.path))}$"
    refused(
        bnfctl("score", candidates.ref), store, before=1, what="not a readable artifact", where=where, hint="bnfctl rm"
    )


def test_the_hint_about_a_corrupted_manifest_works(bnfctl: Run, candidates: Artifact) -> None:
    (candidates.path / "manifest.json").write_text("{")
    (hint,) = re.findall(r"hint: bnfctl (rm \S+)", bnfctl("score", candidates.ref).err)
    done = bnfctl(*hint.split())
    assert done.code == 0, done.err
    assert not candidates.path.exists()


def test_one_corrupted_manifest_leaves_the_other_artifacts_usable(
    bnfctl: Run, store: Store, candidates: Artifact, prefs: Path
) -> None:
    other = run(BuildConfig(input=str(prefs)), store)
    (candidates.path / "manifest.json").write_text("{")
    done = bnfctl("ls")
    assert done.code == 0, done.err
    assert other.ref in done.out


def test_unknown_yaml_key(bnfctl: Run, store: Store, prefs: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"input: {prefs}\npairing_ratoi: 0.5\n")
    refused(
        bnfctl("build", "--config", config), store, where=re.escape(str(config)), hint="known keys: input, .*pairing_ratio",
        what=r"unknown key 'pairing_ratoi' \(did you mean 'pairing_ratio'\?\)",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("steps: {pairs: {stage: build, inptu: x}}\n", "unknown key 'inptu'.*'input'", r": steps\.pairs$"),
        ("steps: {pairs: {stage: build, input: x}}\nvras: {}\n", "unknown key 'vras'.*'vars'", "$"),
    ],
)
def test_unknown_yaml_key_in_a_pipeline(
    text: str, what: str, where: str, bnfctl: Run, store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    refused(bnfctl("run", path), store, what=what, where=re.escape(str(path)) + where, hint="known")


def test_yaml_that_is_none(bnfctl: Run, store: Store, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("steps:\n  a: [1\n")
    refused(bnfctl("run", path), store, what="not valid YAML", where=rf"{re.escape(str(path))}:\d+$", hint=".")


@pytest.mark.parametrize(
    ("args", "where"),
    [(("--pairing-ratio", "2"), "--pairing-ratio"), (("--limit", "few"), "--limit")],
)
def test_a_value_out_of_range(args: tuple[str, str], where: str, bnfctl: Run, store: Store, prefs: Path) -> None:
    refused(bnfctl("build", prefs, *args), store, what="it must be|is a whole number", where=f"^{where}$", hint=".")


@pytest.mark.parametrize(
    ("args", "what", "where", "hint"),
    [
        (("--beta1", "1"), "it must be", "--beta1", "."),
        (("--lora-alpha", "8"), "how adapters are, and there are none", "--lora-alpha", "^--lora 16$"),
        (("--lora-targets", "q_proj"), "how adapters are, and there are none", "--lora-targets", "^--lora 16$"),
        (("--attention", "flex_attention"), "trains on a GPU only", "--attention flex_attention", "^--attention sdpa$"),
    ],
    ids=["--beta1", "--lora-alpha", "--lora-targets", "--attention"],
)
def test_a_training_that_cannot_be(
    args: tuple[str, str], what: str, where: str, hint: str, bnfctl: Run, store: Store
) -> None:
    done = bnfctl("train", "--model", "lab", *args, env={"CUDA_VISIBLE_DEVICES": ""})
    refused(done, store, what=what, where=f"^{where}$", hint=hint)


def test_prompt_longer_than_the_context(bnfctl: Run, store: Store, bare_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "short"}, {"prompt": "long " * 20}])
    refused(
        bnfctl("generate", "--sampler", "hf", "--model", bare_model, "--prompts", path), store,
        what=r"has 104 tokens; the model's context is 32", where=f"^{re.escape(str(path))}:2$", hint="--long-prompts drop",
    )  # fmt: skip


def test_two_runs_at_once_on_one_draft(bnfctl: Run, store: Store, prefs: Path) -> None:
    plan = launch.plan("build", BuildConfig(input=str(prefs)), store, lambda first: None)
    with store.draft(plan):
        done = bnfctl("build", prefs)
    refused(
        done, store, what=rf"another process \(pid \d+\) is making build/{plan.key[:12]}",
        where=re.escape(str(store.draft_path("build", plan.key))), hint="wait for it",
    )  # fmt: skip
    after = bnfctl("build", prefs)
    assert after.code == 0, after.err
