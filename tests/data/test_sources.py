"""Prompt sources: what is read, in which order, under which id, and how bad rows are refused."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from bnfctl.artifact import Artifact, Pinned, Store
from bnfctl.config import GenerateConfig
from bnfctl.data.records import Prompt
from bnfctl.data.rows import Seen, as_messages, prompt_id
from bnfctl.data.sources import pin_data, read_prompts, read_rows
from bnfctl.errors import UsageError


def file_of(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def prompts_of(path: Path | str, store: Store, **changes: Any) -> tuple[list[Prompt], int]:
    """(prompts, how many rows repeated one)."""
    counts: Counter[str] = Counter()
    config = GenerateConfig(prompts=str(path), **changes)
    prompts = list(read_prompts(pin_data(str(path), store, "--prompts", config.split), config, counts))
    return prompts, counts["repeated"]


def test_texts_and_messages_with_and_without_ids(tmp_path: Path, store: Store) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = file_of(
        tmp_path / "p.jsonl", {"prompt": "One?", "answer": 1}, {"id": 7, "messages": turns}, "", {"prompt": "One?"}
    )
    prompts, repeated = prompts_of(path, store)
    assert [p.id for p in prompts] == [prompt_id(as_messages("One?", "")), "7"]
    assert prompts[0].answer == "1"
    assert prompts[1].messages == tuple(turns)
    assert prompts[1].where == f"{path}:2"
    assert repeated == 1


def test_ids_do_not_depend_on_order_or_limit(tmp_path: Path, store: Store) -> None:
    rows = [{"prompt": f"Question {i}"} for i in range(5)]
    first, _ = prompts_of(file_of(tmp_path / "a.jsonl", *rows), store)
    second, _ = prompts_of(file_of(tmp_path / "b.jsonl", *reversed(rows)), store)
    assert {p.id: p.text for p in first} == {p.id: p.text for p in second}
    limited, _ = prompts_of(tmp_path / "a.jsonl", store, limit=2)
    assert limited == first[:2]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ('{"prompt": "x"', "broken JSON"),
        ("[1]", "expected a JSON object"),
        ({"question": "x"}, "no column 'prompt'"),
        ({"prompt": "   "}, "empty prompt"),
        ({"prompt": []}, "a prompt is a text or a list"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "ends with the turn of assistant"),
        ({"id": "a", "prompt": "another"}, "two prompts with the id a"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, store: Store, row: Any, what: str) -> None:
    path = file_of(tmp_path / "p.jsonl", {"id": "a", "prompt": "fine"}, row)
    with pytest.raises(UsageError, match=what) as caught:
        prompts_of(path, store)
    assert f"{path}:2" in str(caught.value.where)


def test_missing_empty_and_not_utf8_files(tmp_path: Path, store: Store) -> None:
    with pytest.raises(UsageError, match="no such file"):
        prompts_of(tmp_path / "none.jsonl", store)
    with pytest.raises(UsageError, match="no prompts"):
        prompts_of(file_of(tmp_path / "e.jsonl"), store)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(UsageError, match="not UTF-8"):
        prompts_of(tmp_path / "latin.jsonl", store)


def test_a_column_is_suggested(tmp_path: Path, store: Store) -> None:
    path = file_of(tmp_path / "p.jsonl", {"promt": "x"})
    with pytest.raises(UsageError, match="did you mean 'promt'"):
        prompts_of(path, store)


def test_the_lab_by_name(store: Store) -> None:
    pinned = pin_data("lab:chat", store, "--prompts", "train")
    assert pinned.digest and pinned.digest != pin_data("lab:chat", store, "--prompts", "test").digest
    prompts, _ = prompts_of("lab:chat", store, limit=3)
    assert [p.id for p in prompts] == [f"lab-chat-train-00000{i}" for i in range(3)]


def test_a_hub_set_that_cannot_be_reached_is_pinned_as_unresolved(store: Store) -> None:
    pinned = pin_data("princeton-nlp/llama3-ultrafeedback-armorm", store, "INPUT")
    assert (pinned.kind, pinned.digest) == ("hub-data", None)
    assert "local cache has no copy" in str(pinned.why)


def test_pinned_files_are_by_content(tmp_path: Path, store: Store) -> None:
    a, b = file_of(tmp_path / "a.jsonl", {"prompt": "x"}), file_of(tmp_path / "b.jsonl", {"prompt": "x"})
    assert pin_data(str(a), store, "").digest == pin_data(str(b), store, "").digest
    before = pin_data(str(a), store, "").digest
    file_of(a, {"prompt": "y"})
    assert pin_data(str(a), store, "").digest != before
    assert isinstance(pin_data(str(a), store, ""), Pinned)


def test_folders_are_pinned_by_content_too(tmp_path: Path, store: Store) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        file_of(tmp_path / name / "train.jsonl", {"prompt": "x"})
    pinned = pin_data(str(tmp_path / "a"), store, "")
    assert (pinned.kind, pinned.path) == ("folder", str(tmp_path / "a"))
    assert pinned.digest == pin_data(str(tmp_path / "b"), store, "").digest
    file_of(tmp_path / "a" / "train.jsonl", {"prompt": "y"})
    assert pin_data(str(tmp_path / "a"), store, "").digest != pinned.digest


@pytest.mark.parametrize("ref", ["none.parquet", "some/none.csv", "none"])
def test_a_missing_file_is_never_taken_for_a_hub_set(ref: str, store: Store) -> None:
    with pytest.raises(UsageError, match="no such file"):
        pin_data(ref, store, "--prompts")


def test_a_name_that_is_nearly_an_artifact(make_build: Callable[..., Artifact], store: Store) -> None:
    store.set_name("num", make_build().ref)
    with pytest.raises(UsageError, match=r"no such file or artifact 'nume' \(did you mean 'num'\?\)") as caught:
        pin_data("nume", store, "INPUT")
    assert "bnfctl ls score" in (caught.value.hint or "") and "lab" not in (caught.value.hint or "")
    with pytest.raises(UsageError, match=r"no such file 'nume'$") as caught:
        pin_data("nume", store, "--prompts")
    assert "lab:chat" in (caught.value.hint or "")


def test_columns_by_flags(tmp_path: Path, store: Store) -> None:
    path = file_of(tmp_path / "p.jsonl", {"question": "One?", "solution": "1", "key": 5, "id": "no", "answer": "no"})
    (prompt,), _ = prompts_of(path, store, prompt_column="question", answer_column="solution", id_column="key")
    assert (prompt.text, prompt.answer, prompt.id) == ("One?", "1", "5")
    with pytest.raises(UsageError, match="no id in column 'uid'"):
        prompts_of(path, store, prompt_column="question", id_column="uid")


def test_a_system_prompt_is_for_those_that_have_none(tmp_path: Path, store: Store) -> None:
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "a"}]
    path = file_of(tmp_path / "p.jsonl", {"prompt": "a"}, {"messages": own}, {"id": "x", "prompt": "a"})
    prompts, _ = prompts_of(path, store, system="Be brief.")
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["Be brief.", "Mine.", "Be brief."]
    assert [prompt.messages[-1]["content"] for prompt in prompts] == ["a", "a", "a"]
    assert prompts[0].id != prompts_of(path, store)[0][0].id, "another question, so another id"
    assert prompts[2].id == "x"


def test_the_answer_at_the_end_of_messages_is_not_part_of_the_prompt(
    tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "weight": 0}]
    more = [*turns, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    path = file_of(
        tmp_path / "p.jsonl", {"messages": turns, "prompt": None}, {"messages": more}, {"messages": more[:3]}
    )
    prompts, repeated = prompts_of(path, store)
    assert [[turn["content"] for turn in prompt.messages] for prompt in prompts] == [["a"], ["a", "b", "c"]]
    assert set(prompts[1].messages[0]) == {"role", "content"}
    assert repeated == 1
    assert "which is not part of the prompt: 2\n" in capsys.readouterr().err
    with pytest.raises(UsageError, match="ends with the turn of assistant"):
        prompts_of(file_of(tmp_path / "q.jsonl", {"prompt": turns}), store)


TEXTS = ["b", "B", "a\nz", "", "ä", "a", "a b", "Z"]


def test_sorted_as_simpo_sorts(tmp_path: Path, store: Store) -> None:
    rows = [{"prompt_id": str(i), "prompt": text} for i, text in enumerate([*TEXTS, "a", "b"]) if text]
    random.Random(0).shuffle(rows)
    path = file_of(tmp_path / "p.jsonl", *rows)
    prompts, repeated = prompts_of(path, store, sort=True, system="S")
    assert [prompt.text for prompt in prompts] == sorted({row["prompt"] for row in rows})
    assert [prompt.id for prompt in prompts if prompt.text in "ab"] == ["5", "0"], "the first of two ids"
    assert repeated == 2
    assert [p.text for p in prompts_of(path, store, sort=True, limit=3)[0]] == sorted(set(TEXTS))[1:4]


def test_a_shuffle_depends_on_seed_and_ids_alone(tmp_path: Path, store: Store) -> None:
    rows = [{"id": i, "prompt": f"Q{i}"} for i in range(50)]
    orders = []
    for name, listed in (
        ("a", rows),
        ("b", rows[::-1]),
        ("c", [{**row, "prompt": "other " + row["prompt"]} for row in rows]),
    ):
        path = file_of(tmp_path / f"{name}.jsonl", *listed)
        orders.append([prompt.id for prompt in prompts_of(path, store, shuffle_seed=1)[0]])
        assert [p.id for p in prompts_of(path, store, shuffle_seed=1, limit=7)[0]] == orders[0][:7]
    assert orders[0] == orders[1] == orders[2] != [str(i) for i in range(50)]
    assert sorted(orders[0], key=int) == [str(i) for i in range(50)]
    assert [p.id for p in prompts_of(path, store, shuffle_seed=2)[0]] != orders[0]
    with pytest.raises(UsageError, match="sorted and shuffled"):
        prompts_of(path, store, shuffle_seed=2, sort=True)


def test_ids_of_every_kind(tmp_path: Path, store: Store) -> None:
    path = file_of(
        tmp_path / "p.jsonl", {"id": 1.0, "prompt": "a"}, {"id": "", "prompt": "b"}, {"prompt_id": "x", "id": 3, "prompt": "c"},
        '{"id": NaN, "prompt": "d"}',
    )  # fmt: skip
    ids = [prompt.id for prompt in prompts_of(path, store)[0]]
    assert ids == ["1", prompt_id(as_messages("b", "")), "x", prompt_id(as_messages("d", ""))]
    with pytest.raises(UsageError, match="id is not a text or a number"):
        prompts_of(file_of(tmp_path / "q.jsonl", {"id": [1], "prompt": "a"}), store)


def test_a_conflict_names_both_places() -> None:
    seen = Seen()
    places = ["a/p 1.parquet row 12", "b.jsonl:7", "owner/name@12ab train[0]", "lab-chat", "b.jsonl:1000"]
    for number, where in enumerate(places):
        assert seen.add(Prompt(str(number), as_messages("x", ""), None, where))
        assert not seen.add(Prompt(str(number), as_messages("x", ""), None, "later"))
    for number, where in enumerate(places):
        with pytest.raises(UsageError, match=f"two prompts with the id {number}") as caught:
            seen.add(Prompt(str(number), as_messages("y", ""), None, "here:3"))
        assert caught.value.where == f"{where} and here:3"


def test_memory_is_ids_and_hashes(tmp_path: Path, store: Store) -> None:
    rows, size = 2000, 5000
    path = file_of(tmp_path / "p.jsonl", *({"prompt": f"{i} " + "x" * size} for i in range(rows)))
    config = GenerateConfig(prompts=str(path))
    pinned = pin_data(str(path), store, "--prompts")
    tracemalloc.start()
    count = sum(1 for _ in read_prompts(pinned, config, Counter()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == rows
    assert peak < 1_000_000 < rows * size / 5, f"{peak / rows:.0f} bytes a row"


def test_a_hub_set_is_loaded_at_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "c0ffee" * 6 + "c0de"
    asked = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        asked.append((args, options))
        return datasets.Dataset.from_list(
            [{"prompt": "b", "messages": [{"role": "user", "content": "b"}]}, {"prompt": "a"}]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pinned = Pinned("hub-data", f"owner/name@{commit}", commit)
    config = GenerateConfig(prompts="owner/name", split="train_prefs", subset="small", sort=True)
    prompts = list(read_prompts(pinned, config, Counter()))
    assert [(prompt.text, prompt.where) for prompt in prompts] == [
        ("a", f"owner/name@{commit} train_prefs[1]"), ("b", f"owner/name@{commit} train_prefs[0]"),
    ]  # fmt: skip
    assert asked == [(("owner/name", "small"), {"split": "train_prefs", "revision": commit})]


def test_a_hub_set_that_is_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    pinned = Pinned("hub-data", "owner/name@main", "main")
    with pytest.raises(UsageError, match=r"could not load owner/name@main \(train\)") as caught:
        next(read_rows(pinned, "train", None))
    assert caught.value.hint is not None and "--split" in caught.value.hint


@pytest.mark.parametrize(("ref", "split"), [("lab:chat", "train_prefs"), ("lab:chatter", "train")])
def test_what_the_lab_lacks_is_refused_with_its_place(ref: str, split: str, store: Store) -> None:
    with pytest.raises(UsageError, match="unknown lab") as caught:
        pin_data(ref, store, "--prompts", split)
    assert caught.value.where == f"--prompts {ref}, --split {split}"


def test_a_hub_repository_as_datasets_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "repository"
    rows = {
        split: datasets.Dataset.from_list([{"prompt": f"{split} {i}"} for i in range(3)])
        for split in ("train_prefs", "test_prefs")
    }
    for split, made in rows.items():
        (repository / "data").mkdir(parents=True, exist_ok=True)
        made.to_parquet(str(repository / "data" / f"{split}-00000-of-00001.parquet"))
    pinned = Pinned("hub-data", f"{repository}@c0ffee", "c0ffee")
    prompts = list(read_prompts(pinned, GenerateConfig(prompts="x", split="test_prefs"), Counter()))
    assert [prompt.text for prompt in prompts] == ["test_prefs 0", "test_prefs 1", "test_prefs 2"]
    with pytest.raises(UsageError, match="could not load") as caught:
        list(read_rows(pinned, "train", None))
    assert caught.value.where == pinned.ref and caught.value.hint == "check --split and --subset"
