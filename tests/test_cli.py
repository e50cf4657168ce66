"""The command-line contract: stdout, exit codes, errors, help, completion, the verbs of the store."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bnfctl import __version__, tables
from bnfctl.artifact import Artifact, Store
from bnfctl.config import CONFIGS
from bnfctl.options import fields, flag_name
from tests.conftest import REPOSITORY, Done

Run = Callable[..., Done]
VERBS = (
    "generate",
    "score",
    "build",
    "train",
    "eval",
    "run",
    "ls",
    "show",
    "export",
    "report",
    "verify",
    "rm",
    "gc",
    "doctor",
)


@pytest.fixture
def prefs(tmp_path: Path) -> Path:
    path = tmp_path / "prefs.jsonl"
    rows = [{"id": str(i), "prompt": f"Q{i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, warm_bnfctl: Run) -> None:
    done = warm_bnfctl(verb, "--help")
    assert done.code == 0
    if verb in CONFIGS:
        for field in fields(CONFIGS[verb]):
            assert field.metadata["positional"] or flag_name(field.name) in done.out


def test_stdout_is_one_line_or_one_document(prefs: Path, bnfctl: Run) -> None:
    first = bnfctl("build", prefs)
    assert first.code == 0, first.err
    assert first.out.count("\n") == 1
    assert Path(first.out.strip(), "manifest.json").exists()
    again = bnfctl("build", prefs, "--json", "--name", "mine")
    assert again.json["cached"] is True
    assert again.json["artifact"] == first.out.strip()
    assert again.json["summary"]["records"] == 30
    assert bnfctl("show", "mine").out.startswith(again.json["ref"])


def test_version_and_module(bnfctl: Run) -> None:
    assert bnfctl("--version").out.strip() == __version__


@pytest.mark.parametrize(
    ("args", "code", "error", "hint"),
    [
        (["train", "--modle", "x"], 2, "error: No such option: --modle", "hint: "),
        (["trian"], 2, "error: No such command 'trian'", "hint: "),
        (["train", "--model", "lab", "--loss", "bfn"], 2, "error: unknown loss 'bfn' (did you mean 'bnf'?)", "hint: one of: bnf"),
        (["train", "--model", "nowhere"], 2, "error: no model 'nowhere'", "hint: a hub id"),
        (["train", "--model", "lab"], 2, "error: no preference data made from lab", "hint: bnfctl generate --model lab"),
        (["score", "generate/abcdef"], 2, "error: no artifact 'generate/abcdef'", "hint: bnfctl ls"),
        (["build", "missing.jsonl"], 2, "error: no such file 'missing.jsonl'", "hint: a JSONL file"),
        (["generate", "--prompts", "lab:chat"], 2, "error: model is missing", "hint: "),
        (["generate", "--prompts", "lab:chta", "--model", "lab"], 2, "error: unknown lab family 'chta'", "hint: "),
        (["eval", "lab", "--tasks", "lab-caht"], 2, "error: unknown tasks 'lab-caht' (did you mean 'lab-chat'?)", "hint: one of"),
        (["eval", "lab", "--tasks", "lab-chat", "--require", "chta>1"], 2, "error: no task 'chta' here", "hint: tasks: "),
        (["eval", "lab", "--tasks", "lab-chat", "--require", "lab-chat.gain>0"], 2, "error: a gain needs --base", "hint: --base"),
        (["ls", "trains"], 2, "error: unknown stage 'trains'", "hint: "),
        (["run", "missing.yaml"], 2, "error: no such file", "hint: "),
    ],
)  # fmt: skip
def test_errors_have_what_where_hint_and_no_traceback(
    warm_bnfctl: Run, args: list[str], code: int, error: str, hint: str | None
) -> None:
    done = warm_bnfctl(*args)
    assert done.code == code, done.err
    assert error in done.err
    assert hint is None or hint in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_an_error_is_a_document_under_json(bnfctl: Run) -> None:
    done = bnfctl("train", "--model", "nowhere", "--json")
    assert done.code == 2
    assert done.json["exit_code"] == 2 and "no model" in done.json["error"]


def test_dry_run_says_why_it_would_be_made(prefs: Path, warm_bnfctl: Run) -> None:
    warm_bnfctl("build", prefs)
    assert "verdict" in warm_bnfctl("build", prefs, "--dry-run", "--json").json
    assert warm_bnfctl("build", prefs, "--dry-run").out.startswith("build: cached build/")
    done = warm_bnfctl("build", prefs, "--pairing-ratio", "0.5", "--dry-run", "--json")
    assert done.json["verdict"] == "to be made"
    assert done.json["why"] == ["pairing_ratio: 1.0 -> 0.5"]
    assert done.json["from"] == {"input": "--input", "pairing_ratio": "--pairing-ratio"}


def test_config_file_and_config_json_of_an_artifact(prefs: Path, tmp_path: Path, warm_bnfctl: Run) -> None:
    yaml = tmp_path / "c.yaml"
    yaml.write_text(f"input: {prefs}\npairing_ratio: 5e-1\n")
    made = warm_bnfctl("build", "--config", yaml)
    assert made.code == 0, made.err
    again = warm_bnfctl("build", "--config", Path(made.out.strip()) / "config.json", "--json")
    assert again.json["cached"] is True


def test_as_typed_names_the_published_set(warm_bnfctl: Run) -> None:
    args = ("train", "--model", "meta-llama/Meta-Llama-3-8B-Instruct", "--loss", "bnf")
    dry = warm_bnfctl(*args, "--dry-run")
    assert dry.code == 0, dry.err
    assert (
        "princeton-nlp/llama3-ultrafeedback-armorm, the published set of meta-llama/Meta-Llama-3-8B-Instruct" in dry.out
    )
    assert "lr: 6e-07  (recipe of meta-llama/Meta-Llama-3-8B-Instruct)" in dry.out
    real = warm_bnfctl(*args)
    assert real.code == 2
    assert "local cache has no copy" in real.err
    assert "hint: bnfctl doctor" in real.err


def test_ls_show_verify_rm(prefs: Path, warm_bnfctl: Run) -> None:
    path = Path(warm_bnfctl("build", prefs, "--name", "mine").out.strip())
    rows = warm_bnfctl("ls", "--json").json
    assert [(row["names"], row["path"]) for row in rows] == [(["mine"], str(path))]
    assert "mine" in warm_bnfctl("ls").out
    assert re.search(r"^  created: 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d$", warm_bnfctl("show", "mine").out, re.M)
    shown = [json.loads(line) for line in warm_bnfctl("show", "mine", "--rows", "3").out.splitlines()]
    assert [row["chosen_text"] for row in shown] == ["yes 0", "yes 1", "yes 2"]
    assert "prefs.jsonl" in warm_bnfctl("show", "mine", "--lineage").out
    assert warm_bnfctl("verify").code == 0
    shard = path / "rows" / "00000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    bad = warm_bnfctl("verify", "mine")
    assert bad.code == 1
    assert "changed file rows/00000.parquet" in bad.out
    assert "hint: bnfctl rm" in bad.err
    assert warm_bnfctl("rm", "mine").code == 0
    assert warm_bnfctl("ls", "--json").json == []


def test_a_flipped_byte_stops_the_next_stage(prefs: Path, warm_bnfctl: Run) -> None:
    path = Path(warm_bnfctl("build", prefs).out.strip())
    shard = path / "rows" / "00000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 4] ^= 1
    shard.write_bytes(data)
    done = warm_bnfctl("train", "--model", "lab", "--data", path)
    assert done.code == 1
    assert "corrupted artifact" in done.err
    assert "bnfctl verify" in done.err


def test_gc_says_what_it_would_free_first(store: Store, make_build: Callable[..., Artifact], warm_bnfctl: Run) -> None:
    make_build()
    draft = store.home / ".drafts" / "train-0123456789ab"
    (draft / "scratch").mkdir(parents=True)
    (draft / "scratch" / "big").write_bytes(b"0" * 5000)
    asked = warm_bnfctl("gc")
    assert asked.code == 0
    assert "would free 5.0 kB; nothing was freed" in asked.err
    assert draft.exists()
    assert warm_bnfctl("gc", "--yes").out.strip() == "freed 5.0 kB"
    assert not draft.exists()
    assert warm_bnfctl("verify").code == 0


def test_doctor_names_missing_extras_and_how_to_install_them(bnfctl: Run) -> None:
    found = {row["what"]: row for row in bnfctl("doctor", "--json").json}
    assert found["torch"]["state"] == "ok"
    assert {"cpu", "disk", "hub"} <= set(found)
    assert found["extra vllm"]["state"] == "ok" or "pip install 'bnfctl[vllm]'" in found["extra vllm"]["detail"]


def completions(words: str, home: Path) -> list[str]:
    """What bash would offer after `words`."""
    env = {**os.environ, "_BNFCTL_COMPLETE": "complete_bash", "COMP_WORDS": f"bnfctl {words}",
           "COMP_CWORD": str(len(words.split(" "))), "BNFCTL_HOME": str(home)}  # fmt: skip
    code = "import sys; sys.argv = ['bnfctl']; from bnfctl.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False, cwd=REPOSITORY
    )
    return done.stdout.split()


def test_completion_knows_losses_scorers_tasks_and_artifacts(store: Store, make_build: Callable[..., Artifact]) -> None:
    artifact = make_build()
    store.set_name("mine", artifact.ref)
    assert set(completions("train --loss ", store.home)) == set(tables.LOSSES)
    assert "reward-model" in completions("score --scorer ", store.home)
    assert "lab-chat,lab-math" in completions("eval --tasks lab-chat,lab-m", store.home)
    assert {"mine", artifact.ref} <= set(completions("train --data ", store.home))
    assert "train" in completions("tr", store.home)


def test_libraries_cannot_print_to_stdout() -> None:
    code = "from bnfctl import console; console.claim_stdout(); print('noise'); console.emit('result')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout == "result\n"
    assert "noise" in done.stderr


def test_a_closed_pipe_is_no_error(prefs: Path, tmp_path: Path, bnfctl: Run) -> None:
    path = bnfctl("build", prefs).out.strip()
    command = f"{sys.executable} -m bnfctl show {path} --rows 30 | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_chunk_and_the_same_command_resumes(
    signum: int, code: int, store: Store, warm_bnfctl: Run
) -> None:
    args = ["generate", "--model", "lab", "--prompts", "lab:chat", "--limit", "40", "--sampler", "hf", "--chunk", "2",
            "--n", "2", "--max-tokens", "40", "--home", str(store.home)]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "bnfctl", *args],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(store.home.rglob("parts/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signum)
    if signum == signal.SIGTERM:  # a scheduler and a parent pass on one and the same stop
        time.sleep(0.01)
        process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "error: interrupted" in err and "hint: the same command resumes" in err
    done = warm_bnfctl(*args)
    assert done.code == 0, done.err
    assert re.search(r"resuming: \d+ of 20 chunks", done.err)


def test_a_home_that_cannot_be_written_is_a_clear_error(prefs: Path, tmp_path: Path, warm_bnfctl: Run) -> None:
    (tmp_path / "file").write_text("")
    done = warm_bnfctl("build", prefs, "--home", tmp_path / "file")
    assert done.code == 1
    assert "error: Not a directory" in done.err and "hint: check the path" in done.err
    assert "Traceback" not in done.err


def test_json_is_one_document_even_when_something_is_wrong(prefs: Path, warm_bnfctl: Run) -> None:
    path = Path(warm_bnfctl("build", prefs).out.strip())
    assert len(warm_bnfctl("show", path, "--rows", "2", "--json").json) == 2
    (path / "rows" / "00000.parquet").unlink()
    done = warm_bnfctl("verify", "--json")
    assert done.code == 1
    assert list(done.json.values()) == [["missing file rows/00000.parquet"]]


def test_no_arguments_is_help(bnfctl: Run) -> None:
    done = bnfctl()
    assert "Usage" in done.out + done.err
    assert "hint:" not in done.err


@pytest.mark.parametrize("blocks", [0, 1, 4])
def test_a_full_disk_is_a_clear_error_and_the_same_command_then_works(
    blocks: int, prefs: Path, tmp_path: Path, warm_bnfctl: Run
) -> None:
    """ulimit -f counts in blocks of 1,024 bytes."""
    command = f"ulimit -f {blocks}; exec {sys.executable} -m bnfctl build {prefs} --home {tmp_path / 'artifacts'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 1, done.stderr
    assert re.search(r"^error: .*File too large", done.stderr, re.M)
    assert re.search(r"^hint: .*the same command resumes", done.stderr, re.M)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    again = warm_bnfctl("build", prefs)
    assert again.code == 0, again.err
    assert warm_bnfctl("verify").code == 0
