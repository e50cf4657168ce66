"""Ready sets as records: the formats in the wild, what is refused and where, and TRL's own split as the yardstick."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bnfctl.artifact import Store
from bnfctl.config import BuildConfig
from bnfctl.data.imports import Found, read_records
from bnfctl.data.sources import pin_data, read_rows
from bnfctl.errors import UsageError
from tests.stages.chain import run, write_jsonl

USER = {"role": "user", "content": "Hi?"}
SYSTEM = {"role": "system", "content": "Be kind."}


def turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def said(text: str) -> list[dict[str, str]]:
    return [USER, turn(text)]


def records_of(*rows: dict[str, Any], **changes: Any) -> list[Found]:
    places = ((f"f:{number}", row) for number, row in enumerate(rows, 1))
    return list(read_records(places, BuildConfig(input="f", **changes)))


def sides_of(found: Found) -> dict[str, tuple[str, float | None]]:
    return {side: (found.group.candidates[index].text, reward) for side, (index, reward) in found.sides.items()}


def asked(found: Found) -> list[str]:
    return [f"{message['role']}: {message['content']}" for message in found.group.prompt.messages]


PAIR = {"chosen": ("Hello", None), "rejected": ("No", None)}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi?", "chosen": "Hello", "rejected": "No"}, ["user: Hi?"]),
        ({"prompt": [SYSTEM, USER], "chosen": [turn("Hello")], "rejected": [turn("No")]},
         ["system: Be kind.", "user: Hi?"]),
        ({"chosen": said("Hello"), "rejected": said("No")}, ["user: Hi?"]),
        ({"chosen": [SYSTEM, *said("Hello")], "rejected": [SYSTEM, *said("No")]}, ["system: Be kind.", "user: Hi?"]),
        ({"prompt": "Hi?", "chosen": said("Hello"), "rejected": said("No"), "messages": said("Hello")}, ["user: Hi?"]),
        ({"chosen": [*said("a"), *said("Hello")], "rejected": [*said("a"), *said("No")]},
         ["user: Hi?", "assistant: a", "user: Hi?"]),
        ({"prompt": [USER], "chosen": "Hello", "rejected": [turn("No")]}, ["user: Hi?"]),
    ],
    ids=["explicit", "explicit conversation", "implicit conversation", "system", "UltraFeedback", "turns", "mixed"],
)  # fmt: skip
def test_preference_rows(row: dict[str, Any], prompt: list[str]) -> None:
    (found,) = records_of(row)
    assert asked(found) == prompt
    assert sides_of(found) == PAIR
    assert found.record_id == found.group.prompt.id


def trl_extract_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """trl.data_utils.extract_prompt of TRL 1.16 for texts, as it stands there."""
    for idx in range(min(len(chosen), len(rejected))):
        if chosen[idx] != rejected[idx]:
            if chosen[idx - 1] == " ":
                idx -= 1
            break
    return chosen[:idx], chosen[idx:], rejected[idx:]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue.", "The sky is green."),
        ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: No"),
        ("Q: äöü? A:  one", "Q: äöü? A:  two"),
        ("I am sure", "I am sorry"),
    ],
)
def test_two_texts_are_split_as_trl_splits_them(chosen: str, rejected: str) -> None:
    (found,) = records_of({"chosen": chosen, "rejected": rejected})
    prompt, *texts = trl_extract_prompt(chosen, rejected)
    assert found.group.prompt.text == prompt
    assert [candidate.text for candidate in found.group.candidates] == texts


def test_a_text_that_begins_the_other_has_an_empty_response() -> None:
    (found,) = records_of({"chosen": "Q: x A: yes", "rejected": "Q: x A: yes, sir"})
    assert sides_of(found) == {"chosen": ("", None), "rejected": (", sir", None)}


def test_a_prompt_is_looked_for_in_the_texts_only_where_nobody_says_where_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    records_of(texts, texts)
    assert capsys.readouterr().err.count("no column 'prompt', so it is what chosen and rejected have in common") == 1
    with pytest.raises(UsageError, match=r"no column 'question' \(did you mean 'questions'\?\)"):
        records_of({**texts, "questions": "What colour?"}, prompt_column="question")
    with pytest.raises(UsageError, match="column 'prompt' is null"):
        records_of({**texts, "prompt": None})


UNPAIRED = [
    {"prompt": "Hi?", "completion": "Hello", "label": True},
    {"prompt": [USER], "completion": [turn("Hello")], "label": True},
    {"prompt": "Hi?", "response": "Hello", "label": 1},
    {"completion": said("Hello"), "label": "up"},
]


@pytest.mark.parametrize(
    ("more", "flag"),
    [
        ({"min_edit": 0.5}, "--min-edit"), ({"pairing_ratio": 0.5}, "--pairing-ratio"),
        ({"min_margin": 1.0}, "--min-margin"), ({"chosen_column": "best"}, "--chosen-column"),
    ],
)  # fmt: skip
def test_a_flag_that_means_nothing_to_single_responses_is_refused(more: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError) as caught:
        records_of(UNPAIRED[0], **more)
    assert caught.value.where == flag
    if flag != "--chosen-column":  # rows with ids may turn out to be pairs
        records_of({**UNPAIRED[0], "record_id": "r"}, **more)
    with pytest.raises(UsageError, match="--label-column is for another kind of set"):
        records_of({"prompt": "Hi?", "chosen": "a", "rejected": "b"}, label_column="thumb")


@pytest.mark.parametrize("row", UNPAIRED)
def test_unpaired_rows(row: dict[str, Any]) -> None:
    (found,) = records_of(row)
    assert asked(found) == ["user: Hi?"]
    assert sides_of(found) == {"chosen": ("Hello", None)}


GOOD = [True, 1, 1.0, "true", "True", "1", "+1", "up", "UP", "thumbs_up", "thumbs up", "Thumbs-Up", "good", "chosen",
        "desirable"]  # fmt: skip
BAD = [False, 0, -1, -1.0, "false", "0", "-1", "down", "thumbs_down", "bad", "rejected", "undesirable"]


def test_every_label() -> None:
    rows = [{"prompt": f"{i}?", "response": "x", "label": label} for i, label in enumerate([*GOOD, *BAD])]
    assert [next(iter(found.sides)) for found in records_of(*rows)] == ["chosen"] * len(GOOD) + ["rejected"] * len(BAD)


@pytest.mark.parametrize("label", [2, 0.5, "yes", "maybe", "👍", [], {}, "1.5", "thumbs", "1 0", "--1"])
def test_a_label_that_is_none(label: Any) -> None:
    with pytest.raises(UsageError, match="is not a label") as caught:
        records_of(UNPAIRED[0], {"prompt": "x", "response": "y", "label": label})
    assert caught.value.where == "f:2"
    assert str(label) in caught.value.what


@pytest.mark.parametrize("label", [None, "", float("nan")])
def test_a_null_label(label: Any) -> None:
    with pytest.raises(UsageError, match="no label in column 'label'") as caught:
        records_of({"prompt": "x", "response": "y", "label": label})
    assert caught.value.where == "f:1"


def test_columns_by_flags() -> None:
    row = {"q": "Hi?", "good": "Hello", "poor": "No", "prompt": "other", "chosen": "other"}
    (found,) = records_of(row, prompt_column="q", chosen_column="good", rejected_column="poor")
    assert (asked(found), sides_of(found)) == (["user: Hi?"], PAIR)
    log = {"q": "Hi?", "answer": "Hello", "thumb": "up", "response": "other"}
    (found,) = records_of(log, prompt_column="q", response_column="answer", label_column="thumb")
    assert (asked(found), sides_of(found)) == (["user: Hi?"], {"chosen": ("Hello", None)})


def test_the_format_can_be_said() -> None:
    both = {"prompt": "Hi?", "chosen": "Hello", "rejected": "No", "response": "Hm", "label": 0}
    assert sides_of(records_of(both)[0]) == sides_of(records_of(both, format="preference")[0]) == PAIR
    assert sides_of(records_of(both, format="unpaired")[0]) == {"rejected": ("Hm", None)}


@pytest.mark.parametrize(
    ("more", "rewards"),
    [
        ({}, (None, None)),
        ({"all_rm_scores": [0.1, 0.5, -2], "all_generated_responses": ["a", "Hello", "No"]}, (0.5, -2.0)),
        ({"score_chosen": 8.5, "score_rejected": 3}, (8.5, 3.0)),
        ({"chosen_reward": "1.5", "rejected_reward": ""}, (1.5, None)),
        ({"chosen_reward": 1, "rejected_reward": float("nan"), "all_rm_scores": [9, 8]}, (1.0, None)),
        ({"all_rm_scores": None}, (None, None)),
    ],
)
def test_rewards(more: dict[str, Any], rewards: tuple[float | None, float | None]) -> None:
    (found,) = records_of({"prompt": "Hi?", "chosen": said("Hello"), "rejected": said("No"), **more})
    assert tuple(reward for _, reward in found.sides.values()) == rewards


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "x", "chosen": "a"}, "no column 'rejected'"),
        ({"prompt": "x", "chosen": "a", "rejected": None}, "column 'rejected' is null"),
        ({"prompt": "x", "chosne": "a"}, r"no column 'chosen' \(did you mean 'chosne'"),
        ({}, "no column 'chosen'"),
        ({"chosen": "a", "rejected": "b"}, "no column 'prompt'"),
        ({"prompt": "x", "chosen": said("a"), "rejected": [USER]}, "end with the assistant's"),
        ({"prompt": "x", "chosen": [], "rejected": "a"}, "end with the assistant's"),
        ({"prompt": "x", "chosen": 5, "rejected": "a"}, "chosen and rejected are texts"),
        ({"prompt": "x", "chosen": said("a"), "rejected": [{"role": "user", "content": "?"}, turn("b")]},
         "different prompts"),
        ({"prompt": "x", "chosen": said("a"), "rejected": [5, turn("b")]}, "different prompts"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "score_chosen": "high"}, "score_chosen is 'high', not a number"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "all_rm_scores": 3}, "all_rm_scores is not a list"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "all_rm_scores": [1, float("inf")]}, "'inf', not a number"),
        ({"prompt": "x", "label": True}, "no column 'completion'"),
        ({"prompt": "x", "response": "y"}, "no column 'label'"),
        ({"prompt": " ", "response": "y", "label": 1}, "empty prompt"),
        ({"prompt": "x", "response": {"text": "y"}, "label": 1}, "response are texts"),
        ({"prompt": "x", "response": "y", "label": 1, "id": {}}, "id is not a text"),
    ],
)  # fmt: skip
def test_bad_rows(row: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        records_of(row)
    assert caught.value.where == "f:1"


def test_rows_with_one_id() -> None:
    row = {"id": 1, "prompt": "x", "chosen": "a", "rejected": "b"}
    again = [found.record_id for found in records_of(row, *({**row, "chosen": f"c{i}"} for i in range(7)))]
    assert again[:3] == ["1", "1+", "1++"], "published sets repeat prompts: each row is a record"
    assert again[5:] == ["1+5", "1+6", "1+7"], "but not with 10,000 plus signs"
    taken = records_of({**row, "id": "1+", "prompt": "y"}, row, row)
    assert [found.record_id for found in taken] == ["1+", "1", "1++"]
    with pytest.raises(UsageError, match="two prompts with the id 1") as caught:
        records_of(row, {**row, "prompt": "y"})
    assert caught.value.where == "f:1 and f:2"


def test_the_same_prompt_has_one_id_and_so_one_split() -> None:
    first, second, third = records_of(
        {"prompt": "Hi?", "chosen": "Hello", "rejected": "No"},
        {"prompt": "Hi?", "prompt_id": "s1", "chosen": said("Hello"), "rejected": said("No")},
        {"prompt": "Hi?", "chosen": "Hey", "rejected": "No"},
    )
    assert first.group.prompt.id == third.group.prompt.id != second.group.prompt.id == "s1"
    assert len({first.record_id, second.record_id, third.record_id}) == 3


def test_two_labelled_rows_of_one_exported_pair_are_a_pair_again() -> None:
    good = {"record_id": "r", "prompt_id": "p", "prompt": "Hi?", "completion": "Hello", "label": True, "reward": 2.0}
    bad = {**good, "completion": "No", "label": False, "reward": -1.0}
    for rows in ((good, bad), (bad, good)):
        (found,) = records_of(*rows)
        assert (found.record_id, found.group.prompt.id) == ("r", "p")
        assert sides_of(found) == {"chosen": ("Hello", 2.0), "rejected": ("No", -1.0)}
    assert [found.record_id for found in records_of(good, good)] == ["r", "r+"], "two of one label are no pair"
    assert [len(found.sides) for found in records_of(good, bad, good, {**bad, "record_id": "s"})] == [2, 1, 1]
    other = {**bad, "prompt_id": "q", "prompt": "Ho?"}
    assert [found.record_id for found in records_of(good, other)] == ["r", "r+"], "of two prompts"
    apart = records_of({**good, "record_id": None}, {**bad, "record_id": None})
    assert [found.record_id for found in apart] == ["p", "p+"], "a log does not say that two rows belong together"
    pairs = [{"record_id": "r", "prompt": "Hi?", "chosen": "a", "rejected": "b"}] * 2
    assert [found.record_id for found in records_of(*pairs)] == ["r", "r+"]


def test_memory_is_ids_and_hashes() -> None:
    rows, size = 2000, 5000

    def feedback() -> Iterator[tuple[str, dict[str, Any]]]:
        for i in range(rows):
            yield (
                f"/some/long/path/to/feedback.jsonl:{i}",
                {"prompt": f"{i} " + "x" * size, "response": "y", "label": i % 2},
            )

    tracemalloc.start()
    assert sum(1 for _ in read_records(feedback(), BuildConfig(input="f"))) == rows
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 < rows * size / 5, f"{peak / rows:.0f} bytes a row"


def test_a_file_is_read_row_by_row(tmp_path: Path, store: Store) -> None:
    path = write_jsonl(tmp_path / "log.jsonl", [UNPAIRED[2], {**UNPAIRED[2], "label": "so so"}])
    with pytest.raises(UsageError) as caught:
        list(read_records(read_rows(pin_data(str(path), store, "INPUT"), "train", None), BuildConfig(input=str(path))))
    assert caught.value.where == f"{path}:2"


def conversation(prompt: str, text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, turn(text)]


def published(name: str, i: int) -> dict[str, Any]:
    """A row in the columns of a published set."""
    prompt, texts = f"Question {i}?", [f"{i}a", f"{i}b", f"{i}c"]
    sides = {"chosen": conversation(prompt, texts[1]), "rejected": conversation(prompt, texts[2])}
    scores = {"all_generated_responses": texts, "all_rm_scores": [0.5, 0.75, 0.25]}
    return {
        "princeton-nlp, Snorkel": {"prompt_id": f"{i:064x}", "prompt": prompt, **scores, **sides},
        "UltraFeedback binarized": {
            "prompt": prompt, "prompt_id": f"{i:064x}", **sides, "messages": sides["chosen"], "score_chosen": 0.75,
            "score_rejected": 0.25,
        },
        "TRL preference": {"prompt": sides["chosen"][:1], "chosen": sides["chosen"][1:], "rejected": sides["rejected"][1:]},
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ["princeton-nlp, Snorkel", "UltraFeedback binarized", "TRL preference"])
def test_published_sets_skip_generate_and_score(name: str, store: Store, tmp_path: Path) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    table = pa.Table.from_pylist([published(name, i) for i in range(20)])
    pq.write_table(table, tmp_path / "set" / "data" / "train_prefs-00000-of-00001.parquet")
    made = run(BuildConfig(input=str(tmp_path / "set"), split="train_prefs"), store)
    rows = list(made.rows())
    assert made.manifest.summary["pairs"] == 20
    rewards = (None, None) if name == "TRL preference" else (0.75, 0.25)
    for i, row in enumerate(rows):
        assert row["prompt"] == [{"role": "user", "content": f"Question {i}?"}]
        assert (row["chosen_text"], row["rejected_text"]) == (f"{i}b", f"{i}c")
        assert (row["chosen_reward"], row["rejected_reward"]) == rewards
        assert row["record_id"] == row["prompt_id"]
        assert name == "TRL preference" or row["prompt_id"] == f"{i:064x}"


def test_a_feedback_log_in_csv(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text('question,reply,thumb\n"Hi,\nyou?","Hello, ""you""",up\n"Hi,\nyou?",Go away,thumbs_down\n')
    config = BuildConfig(
        input=str(path), prompt_column="question", response_column="reply", label_column="thumb", test_fraction=0
    )
    made = run(config, store)
    good, bad = made.rows()
    assert (good["chosen_text"], good["rejected_text"]) == ('Hello, "you"', None)
    assert (bad["chosen_text"], bad["rejected_text"]) == (None, "Go away")
    assert good["prompt"][0]["content"] == "Hi,\nyou?" and good["prompt_id"] == bad["prompt_id"]
    path.write_text(path.read_text() + "x,y,meh\n")
    with pytest.raises(UsageError, match="'meh' in column 'thumb' is not a label") as caught:
        run(config, store)
    assert caught.value.where == f"{path}:6"
