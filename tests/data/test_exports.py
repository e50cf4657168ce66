"""Exports: what TRL expects, what `datasets` opens, and a round trip that changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from bnfctl import durable, shards
from bnfctl.artifact import Artifact, Store
from bnfctl.config import BuildConfig, ScoreConfig
from bnfctl.data.exports import export
from bnfctl.errors import BnfctlError, Interrupted, UsageError
from tests.conftest import Done
from tests.stages.chain import run, write_jsonl

TEST = {"test_fraction": 0.3, "seed": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def built(store: Store, tmp_path: Path) -> Artifact:
    """40 pairs with rewards, from scores; odd texts among them."""
    rows: list[dict[str, Any]] = [
        {"id": f"q{i}", "prompt": f'{i}?\r\n"ä" 🙂,', "answer": str(i), "responses": [str(i), f"no\n{i}\t\\", " 0 "]}
        for i in range(1, 40)
    ]
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": "c"}]  # fmt: skip
    rows.append({"id": "turns", "messages": turns, "answer": "1", "responses": ["x", "1"]})
    scores = run(ScoreConfig(input=str(write_jsonl(tmp_path / "r.jsonl", rows)), rule="exact"), store)
    return run(BuildConfig(input=scores.ref, **TEST), store)


@pytest.fixture
def feedback(store: Store, tmp_path: Path) -> Artifact:
    """Single responses with labels, some prompts twice, and no rewards."""
    rows = [{"prompt": f"{i % 17}?", "response": f"said {i}", "label": i % 3 > 0} for i in range(30)]
    return run(BuildConfig(input=str(write_jsonl(tmp_path / "f.jsonl", rows)), **TEST), store)


@pytest.fixture
def masked(store: Store, tmp_path: Path) -> Artifact:
    """Pairs of which about half have lost a side."""
    rows = [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": f"no {i}", "score_chosen": 2} for i in range(40)]
    return run(BuildConfig(input=str(write_jsonl(tmp_path / "m.jsonl", rows)), pairing_ratio=0.5, **TEST), store)


def content(artifact: Artifact, layout: str = "unpaired") -> list[dict[str, Any]]:
    """What an export carries: everything but token ids and finish reasons."""
    kept = ["record_id", "prompt_id", "split", "prompt"]
    kept += [f"{side}_{name}" for side in ("chosen", "rejected") for name in ("text", "reward")]
    rows = list(artifact.rows(kept))
    return [row for row in rows if layout == "unpaired" or None not in (row["chosen_text"], row["rejected_text"])]


@pytest.mark.parametrize("name", ["built", "feedback", "masked"])
@pytest.mark.parametrize("layout", ["preference", "unpaired"])
@pytest.mark.parametrize("target", ["out.parquet", "out.jsonl", "out"])
def test_a_round_trip_changes_nothing(
    name: str, layout: str, target: str, request: pytest.FixtureRequest, store: Store, tmp_path: Path
) -> None:
    artifact = request.getfixturevalue(name)
    if (name, layout) == ("feedback", "preference"):
        with pytest.raises(BnfctlError, match="no record has both responses"):
            export(artifact, tmp_path / target, layout, False)
        assert not list(tmp_path.glob("*out*"))
        return
    done = export(artifact, tmp_path / target, layout, False)
    wanted = content(artifact, layout)
    assert done.skipped == artifact.manifest.summary["records"] - len(wanted)
    split = "train+test" if target == "out" else "train"
    again = content(run(BuildConfig(input=done.path, split=split, **TEST), store))
    if target == "out":  # a file per split: in their order within each
        wanted.sort(key=lambda row: row["split"] != "train")
    assert again == wanted


def test_a_round_trip_of_a_preference_set_has_the_same_digest(store: Store, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": f"no {i}", "score_chosen": i} for i in range(40)]
    first = run(BuildConfig(input=str(write_jsonl(tmp_path / "p.jsonl", rows)), **TEST), store)
    done = export(first, tmp_path / "p.parquet", "preference", False)
    assert run(BuildConfig(input=done.path, **TEST), store).manifest.digest == first.manifest.digest


TURNS = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
IDS = {"record_id": datasets.Value("string"), "prompt_id": datasets.Value("string")}
REWARD = datasets.Value("float64")


def test_datasets_opens_a_preference_folder(built: Artifact, tmp_path: Path) -> None:
    done = export(built, tmp_path / "out", "preference", False)
    opened = datasets.load_dataset(str(tmp_path / "out"))
    summary = built.manifest.summary
    assert {split: rows.num_rows for split, rows in opened.items()} == {
        "train": summary["train"],
        "test": summary["test"],
    }
    assert done.splits == {"train": summary["train"], "test": summary["test"]}
    sides = {"prompt": TURNS, "chosen": TURNS, "rejected": TURNS}
    assert dict(opened["train"].features) == {**sides, **IDS, "chosen_reward": REWARD, "rejected_reward": REWARD}
    wanted = [row for row in content(built) if row["split"] == "train"]
    for row, record in zip(opened["train"], wanted, strict=True):
        assert row["prompt"] == record["prompt"]
        assert row["chosen"] == [{"role": "assistant", "content": record["chosen_text"]}]
        assert row["rejected"] == [{"role": "assistant", "content": record["rejected_text"]}]
        assert (row["chosen_reward"], row["rejected_reward"]) == (1.0, 0.0)


def test_datasets_opens_an_unpaired_folder(masked: Artifact, tmp_path: Path) -> None:
    done = export(masked, tmp_path / "out", "unpaired", False)
    opened = datasets.load_dataset(str(tmp_path / "out"))
    features = {"prompt": TURNS, "completion": TURNS, "label": datasets.Value("bool"), **IDS, "reward": REWARD}
    assert dict(opened["test"].features) == features
    summary = masked.manifest.summary
    assert done.rows == sum(rows.num_rows for rows in opened.values()) == 40 + summary["pairs"]
    good = sum(sum(rows["label"]) for rows in opened.values())
    assert good == summary["pairs"] + summary["chosen_only"]
    assert done.skipped == 0


def test_files_of_a_large_folder_are_numbered(built: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 3)
    export(built, tmp_path / "out", "preference", False)
    names = sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    trains = -(-built.manifest.summary["train"] // 12)
    assert names[-1] == f"train-{trains - 1:05d}-of-{trains:05d}.parquet" and trains > 1
    opened = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert list(opened["record_id"]) == [row["record_id"] for row in content(built) if row["split"] == "train"]


def test_one_file_says_which_split_a_row_is_of(built: Artifact, tmp_path: Path) -> None:
    wanted = [row["split"] for row in content(built)]
    assert {*wanted} == {"train", "test"}
    export(built, tmp_path / "o.parquet", "preference", False)
    assert pq.read_table(tmp_path / "o.parquet")["split"].to_pylist() == wanted
    export(built, tmp_path / "o.jsonl", "preference", False)
    assert [json.loads(line)["split"] for line in (tmp_path / "o.jsonl").read_text().splitlines()] == wanted


def test_nothing_is_overwritten_without_force(built: Artifact, tmp_path: Path) -> None:
    for name in ("o.parquet", "o"):
        export(built, tmp_path / name, "preference", False)
        with pytest.raises(UsageError, match="something is there already"):
            export(built, tmp_path / name, "unpaired", False)
        export(built, tmp_path / name, "unpaired", True)
    assert "completion" in pq.read_schema(tmp_path / "o.parquet").names
    assert "completion" in datasets.load_dataset(str(tmp_path / "o"), split="train").features
    for mine in ("notes.txt", "data/1-of-2.txt", "data/mine.parquet"):
        (tmp_path / "o" / mine).write_text("mine")
        with pytest.raises(UsageError, match="holds more than an export"):
            export(built, tmp_path / "o", "preference", True)
        (tmp_path / "o" / mine).unlink()
    (tmp_path / "d.parquet").mkdir()
    with pytest.raises(UsageError, match="holds more than an export"):
        export(built, tmp_path / "d.parquet", "preference", True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_empty_folder_is_free(built: Artifact, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    export(built, tmp_path / "o", "preference", False)
    assert list(tmp_path.glob("o/data/*.parquet"))
    (tmp_path / "link").symlink_to(tmp_path / "e")
    (tmp_path / "e").mkdir()
    export(built, tmp_path / "link", "preference", False)
    assert list(tmp_path.glob("e/data/*.parquet")) and (tmp_path / "link").is_symlink()


def dead() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


@pytest.mark.parametrize("target", ["o+.parquet", "o+"])
def test_what_a_killed_export_left_is_cleared(built: Artifact, tmp_path: Path, target: str) -> None:
    gone, alive = dead(), os.getppid()
    left = [f".{target}.{gone}.tmp", f".{target}.{gone}.old.tmp"]
    kept = [f".{target}.{alive}.tmp", f".other.{gone}.tmp", f".{target}.{gone}.txt", f".oo.{gone}.tmp"]
    for name in (*left, *kept):
        (tmp_path / name / "data").mkdir(parents=True)
    (tmp_path / left[0] / "data").rmdir()
    (tmp_path / left[0]).rmdir()
    (tmp_path / left[0]).touch()
    with pytest.raises(UsageError):
        export(built, tmp_path / target, "pairs", False)
    assert {path.name for path in tmp_path.iterdir()} >= {*left, *kept}
    export(built, tmp_path / target, "preference", False)
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == {*kept}


def test_where_an_export_cannot_go(built: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="inside the artifact store"):
        export(built, built.path / "rows", "preference", True)
    (tmp_path / "link").symlink_to(built.path.parent.parent)
    for inside in (tmp_path / "no" / ".." / built.path.parent.parent.name / "x.parquet", tmp_path / "link" / "x.jsonl"):
        with pytest.raises(UsageError, match="inside the artifact store"):
            export(built, inside, "preference", True)
    for ending in (".csv", ".json", ".jsonl.gz", ".parquet.zst"):
        with pytest.raises(UsageError, match=rf"cannot write {Path(ending).suffix or ending}") as caught:
            export(built, tmp_path / f"o{ending}", "preference", False)
        assert caught.value.hint == "FILE.parquet, FILE.jsonl or a folder"
    with pytest.raises(UsageError, match=r"unknown format 'pairs'") as caught:
        export(built, tmp_path / "o", "pairs", False)
    assert caught.value.hint == "one of: preference, unpaired"


@pytest.mark.parametrize("target", ["o.parquet", "o.jsonl", "o"])
def test_a_failure_leaves_nothing(built: Artifact, tmp_path: Path, target: str) -> None:
    (shard,) = built.path.glob("rows/*.parquet")
    shard.write_bytes(shard.read_bytes()[:-1])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BnfctlError, match="corrupted artifact"):
        export(built, tmp_path / target, "preference", False)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("target", ["o.parquet", "o.jsonl", "o"])
def test_a_place_that_cannot_be_written_is_named(built: Artifact, tmp_path: Path, target: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BnfctlError, match="cannot write") as caught:
        export(built, tmp_path / "file" / target, "preference", False)
    assert caught.value.where == str(tmp_path / "file" / target)


def test_what_cannot_be_replaced_stays(built: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(built, tmp_path / "o", "preference", False)
    rename = durable.rename

    def failing(source: Path, target: Path) -> None:
        if target == tmp_path / "o":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(durable, "rename", failing)
    with pytest.raises(BnfctlError, match="No space left"):
        export(built, tmp_path / "o", "unpaired", True)
    assert "chosen" in datasets.load_dataset(str(tmp_path / "o"), split="train").features
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("target", ["o.parquet", "o.jsonl", "o"])
def test_a_stop_leaves_nothing(
    built: Artifact, tmp_path: Path, target: str, stop_signal: Callable[[int], None]
) -> None:
    before = sorted(tmp_path.iterdir())
    stop_signal(signal.SIGINT)
    with pytest.raises(Interrupted):
        export(built, tmp_path / target, "preference", False)
    assert sorted(tmp_path.iterdir()) == before


def test_the_verb(masked: Artifact, bnfctl: Callable[..., Done], tmp_path: Path) -> None:
    done = bnfctl("export", masked.ref, tmp_path / "o")
    assert done.code == 0, done.err
    assert done.out == f"{tmp_path / 'o'}\n"
    summary = masked.manifest.summary
    lost = 40 - summary["pairs"]
    assert f"{summary['pairs']} rows: " in done.err and f"{lost} records with one response left out" in done.err
    document = bnfctl("export", masked.ref, tmp_path / "o", "--format", "unpaired", "--force", "--json").json
    assert document["path"] == str(tmp_path / "o")
    assert (document["rows"], document["skipped"]) == (40 + summary["pairs"], 0)
    refused = bnfctl("export", masked.ref, tmp_path / "o")
    assert (refused.code, refused.out) == (2, "")
    assert "hint: --force replaces it" in refused.err
