"""build: pairs, drops and their counts, masks, splits, and ready preference sets."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bnfctl import launch
from bnfctl.artifact import Artifact, Store
from bnfctl.config import BuildConfig, GenerateConfig, ScoreConfig
from bnfctl.data import ready
from bnfctl.data.pairing import SIDES
from bnfctl.errors import BnfctlError, UsageError
from tests.stages.chain import Chain, published, run, write_jsonl


@pytest.fixture
def scores(store: Store, tmp_path: Path) -> Artifact:
    """Rewards of 1 where the response is the answer."""
    rows: list[dict[str, Any]] = [
        {"id": "both", "prompt": "1?", "answer": "1", "responses": ["no", "1", "never", "1."]},
        {"id": "all right", "prompt": "2?", "answer": "2", "responses": ["2", "2."]},
        {"id": "all wrong", "prompt": "3?", "answer": "3", "responses": ["x", "y"]},
        {"id": "unknown", "prompt": "4?", "responses": ["x", "y"]},
        {"id": "single", "prompt": "5?", "answer": "5", "responses": ["5"]},
        {"id": "again", "prompt": "6?", "answer": "6", "responses": ["6", "no"]},
    ]
    return run(ScoreConfig(input=str(write_jsonl(tmp_path / "r.jsonl", rows)), rule="exact"), store)


def preference_rows(count: int) -> list[dict[str, Any]]:
    return [{"id": str(i), "prompt": f"Q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(count)]


@pytest.fixture
def prefs(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prefs.jsonl", preference_rows(200))


def sides(artifact: Artifact) -> set[tuple[str, str]]:
    """(record id, side) of every response that was kept."""
    return {(row["record_id"], side) for row in artifact.rows() for side in SIDES if row[f"{side}_text"] is not None}


def test_best_against_worst_with_rewards_and_drops_counted(scores: Artifact, store: Store) -> None:
    made = run(BuildConfig(input=scores.ref, test_fraction=0), store)
    found = [
        (row["record_id"], row["chosen_text"], row["chosen_reward"], row["rejected_text"], row["rejected_reward"])
        for row in made.rows()
    ]
    assert found == [("both", "1", 1.0, "no", 0.0), ("again", "6", 1.0, "no", 0.0)]
    summary = made.manifest.summary
    assert {name: number for name, number in summary.items() if number is not None} == {
        "prompts": 6, "candidates": 13, "records": 2, "pairs": 2, "train": 2, "left_out_no_reward": 2,
        "dropped_no_margin": 2, "dropped_no_reward": 2,
    }  # fmt: skip


def test_the_margin_must_be_above_the_minimum(scores: Artifact, store: Store) -> None:
    with pytest.raises(BnfctlError, match="no records"):
        run(BuildConfig(input=scores.ref, min_margin=1.0), store)
    assert run(BuildConfig(input=scores.ref, min_margin=0.99), store).manifest.summary["records"] == 2


def test_sampled_ids_and_finish_reasons_are_carried_along(chain: Chain) -> None:
    candidates = {
        (row["prompt_id"], row["token_ids"] and tuple(row["token_ids"])): row for row in chain.candidates.rows()
    }
    rows = list(chain.build.rows())
    assert rows
    for row in rows:
        for side in SIDES:
            candidate = candidates[row["prompt_id"], tuple(row[f"{side}_ids"])]
            assert row[f"{side}_text"] == candidate["text"]
            assert row[f"{side}_finish"] == candidate["finish_reason"]
            assert row["prompt_ids"] == candidate["prompt_ids"]
    summary = chain.build.manifest.summary
    assert summary["tokenizer"] == chain.candidates.manifest.summary["tokenizer"] is not None
    assert summary["model"]["digest"] == chain.candidates.manifest.inputs["model"]["digest"]


def test_what_is_kept_at_a_lower_ratio_is_kept_at_a_higher_one(prefs: Path, store: Store) -> None:
    kept = {ratio: sides(run(BuildConfig(input=str(prefs), pairing_ratio=ratio), store)) for ratio in (0, 0.25, 0.5, 1)}
    assert kept[0] < kept[0.25] < kept[0.5] < kept[1]
    assert len(kept[1]) == 400
    for ratio in (0.25, 0.5):
        pairs = len(kept[ratio]) - 200
        assert 200 * ratio - 40 < pairs < 200 * ratio + 40


def test_without_pairs_every_prompt_has_one_response_about_half_of_them_chosen(prefs: Path, store: Store) -> None:
    made = run(BuildConfig(input=str(prefs), pairing_ratio=0), store)
    summary = made.manifest.summary
    assert (summary["records"], summary.get("pairs", 0)) == (200, 0)
    assert summary["chosen_only"] + summary["rejected_only"] == 200
    assert 70 < summary["chosen_only"] < 130
    for row in made.rows():
        masked = "rejected" if row["chosen_text"] is not None else "chosen"
        assert {row[f"{masked}_{name}"] for name in ("text", "ids", "finish", "reward")} == {None}


def test_another_seed_masks_other_sides(prefs: Path, store: Store) -> None:
    one, other = (run(BuildConfig(input=str(prefs), pairing_ratio=0, seed=seed), store) for seed in (0, 1))
    assert sides(one) != sides(other)


def test_the_split_depends_on_the_prompt_alone(prefs: Path, store: Store, tmp_path: Path) -> None:
    def splits(artifact: Artifact) -> dict[str, str]:
        return {row["prompt_id"]: row["split"] for row in artifact.rows()}

    whole = run(BuildConfig(input=str(prefs), test_fraction=0.3), store)
    backwards = write_jsonl(tmp_path / "backwards.jsonl", reversed(preference_rows(200)))
    turned = run(BuildConfig(input=str(backwards), test_fraction=0.3, pairing_ratio=0.5), store)
    assert splits(whole) == splits(turned)
    summary = whole.manifest.summary
    assert summary["train"] + summary["test"] == 200 and 35 < summary["test"] < 85
    smaller = splits(run(BuildConfig(input=str(prefs), test_fraction=0.1), store))
    assert {i for i, split in smaller.items() if split == "test"} < {i for i, s in splits(whole).items() if s == "test"}


def test_two_rows_with_one_prompt_are_in_one_split(store: Store, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{i}", "chosen": f"yes {j}", "rejected": "no"} for i in range(40) for j in range(2)]
    made = run(BuildConfig(input=str(write_jsonl(tmp_path / "twice.jsonl", rows)), test_fraction=0.5), store)
    found: dict[str, set[str]] = {}
    for row in made.rows():
        found.setdefault(row["prompt"][0]["content"], set()).add(row["split"])
    assert made.manifest.summary["records"] == 80
    assert {len(splits) for splits in found.values()} == {1}


def test_texts_and_message_lists_are_the_same_preferences(store: Store, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]

    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    text_form = {"prompt": turns, "chosen": "Hello.", "rejected": "What?"}
    list_form = {"prompt": "Hi", "chosen": turns + said("Hello."), "rejected": turns + said("What?")}
    both = []
    for name, row in (("text", text_form), ("list", list_form)):
        made = run(BuildConfig(input=str(write_jsonl(tmp_path / f"{name}.jsonl", [row])), test_fraction=0), store)
        both.append(list(made.rows()))
        assert made.manifest.summary["tokenizer"] is None and made.manifest.summary["model"] is None
    assert both[0] == both[1]
    (row,) = both[0]
    assert (row["prompt"], row["chosen_text"], row["rejected_text"]) == (turns, "Hello.", "What?")
    assert row["chosen_ids"] is row["prompt_ids"] is row["chosen_reward"] is None


def test_identical_sides_are_dropped_and_counted(store: Store, tmp_path: Path) -> None:
    rows = [*preference_rows(3), {"id": "same", "prompt": "Q", "chosen": "so", "rejected": "so"}]
    summary = run(BuildConfig(input=str(write_jsonl(tmp_path / "p.jsonl", rows))), store).manifest.summary
    assert (summary["records"], summary["dropped_identical"]) == (3, 1)


def test_limit_takes_the_first_prompts(prefs: Path, scores: Artifact, store: Store) -> None:
    assert [row["record_id"] for row in run(BuildConfig(input=str(prefs), limit=3), store).rows()] == ["0", "1", "2"]
    assert run(BuildConfig(input=scores.ref, limit=5), store).manifest.summary["records"] == 1


def test_scores_that_are_all_equal_publish_nothing(store: Store, tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": f"{i}?", "answer": "1", "responses": ["no", "never"]} for i in range(3)]
    scores = run(ScoreConfig(input=str(write_jsonl(tmp_path / "r.jsonl", rows)), rule="exact"), store)
    with pytest.raises(BnfctlError, match=r"no records:.*dropped_no_margin 3") as caught:
        run(BuildConfig(input=scores.ref), store)
    assert caught.value.exit_code == 1
    assert caught.value.where == scores.ref
    assert caught.value.hint is not None and "bnfctl show" in caught.value.hint
    assert not any(ref.startswith("build") for ref in published(store))


def test_an_artifact_of_another_stage_is_refused(chain: Chain) -> None:
    with pytest.raises(UsageError, match="is a generate artifact; this takes score") as caught:
        run(BuildConfig(input=chain.candidates.ref), chain.store)
    assert caught.value.exit_code == 2


def test_the_lab_is_no_preference_set(store: Store) -> None:
    with pytest.raises(UsageError, match="the lab has prompts, no preference set") as caught:
        run(BuildConfig(input="lab:chat"), store)
    assert (caught.value.where, published(store)) == ("INPUT", [])


def test_a_store_that_was_moved_still_builds(chain: Chain, tmp_path: Path) -> None:
    store = chain.copy(tmp_path / "moved")
    hidden = chain.candidates.path.rename(chain.candidates.path.with_name("hidden"))
    try:
        made = run(BuildConfig(input=chain.scores.ref, test_fraction=0.25, seed=3), store)
    finally:
        hidden.rename(chain.candidates.path)
    assert made.manifest.summary["records"] == chain.build.manifest.summary["records"]


def test_rewards_of_other_texts_are_refused(store: Store, scores: Artifact) -> None:
    manifest = scores.input_path("input") / "manifest.json"
    digest = scores.manifest.inputs["input"]["digest"]
    manifest.write_text(manifest.read_text().replace(digest, "0" * 64))
    with pytest.raises(UsageError, match="the candidates were made again since they were scored"):
        run(BuildConfig(input=scores.ref), store)


def rules(store: Store, candidates: Artifact, pattern: str) -> Artifact:
    """Rewards of 1 where the pattern is found."""
    return run(ScoreConfig(input=candidates.ref, rule="regex", pattern=pattern), store)


@pytest.fixture
def letters(store: Store, tmp_path: Path) -> Artifact:
    """Two prompts with responses that a regular expression tells apart."""
    rows = [{"id": name, "prompt": f"{name}?", "responses": ["a", "ab", "abc", "abcd"]} for name in ("p", "q")]
    return run(GenerateConfig(prompts=str(write_jsonl(tmp_path / "r.jsonl", rows)), sampler="file"), store)


def pairs_of(artifact: Artifact) -> dict[str, tuple[Any, Any]]:
    return {row["record_id"]: (row["chosen_text"], row["rejected_text"]) for row in artifact.rows()}


def test_rewards_of_several_scorers_are_added_up(store: Store, letters: Artifact) -> None:
    b, c, d = (rules(store, letters, pattern).ref for pattern in "bcd")
    raw = run(BuildConfig(input=b, also=(c, d), combine="raw", test_fraction=0), store)
    assert pairs_of(raw) == {"p": ("abcd", "a"), "q": ("abcd", "a")}
    assert {(row["chosen_reward"], row["rejected_reward"]) for row in raw.rows()} == {(3.0, 0.0)}
    assert list(raw.manifest.inputs) == ["also0", "also1", "candidates", "input"]
    against = run(BuildConfig(input=b, also=(d,), weights=(1, -2), combine="raw", test_fraction=0), store)
    assert pairs_of(against)["p"] == ("ab", "abcd")
    assert [row["rejected_reward"] for row in against.rows()] == [-1.0, -1.0]
    # One of four has a d: sqrt(3) above the mean; three of four have a b: 1 / sqrt(3) above it.
    scaled = next(run(BuildConfig(input=b, also=(d,)), store).rows())
    assert scaled["chosen_reward"] == pytest.approx(3**0.5 + 3**-0.5)
    assert scaled["rejected_reward"] == pytest.approx(-(3**0.5) - 3**-0.5)


def test_the_same_scores_twice_are_refused(store: Store, letters: Artifact) -> None:
    b, c = (rules(store, letters, pattern).ref for pattern in "bc")
    for also in ((b,), (c, c)):
        with pytest.raises(UsageError, match="is there twice") as caught:
            run(BuildConfig(input=b, also=also), store)
        assert "--weights" in str(caught.value.hint)


def test_a_null_reward_of_any_scorer_takes_the_response_out(store: Store, scores: Artifact) -> None:
    other = rules(store, Artifact(scores.input_path("input")), ".")
    made = run(BuildConfig(input=other.ref, also=(scores.ref,), combine="raw", test_fraction=0), store)
    assert made.manifest.summary["left_out_no_reward"] == 2
    assert set(pairs_of(made)) == {"both", "again"}


def test_a_filter_decides_who_takes_part_and_no_more(store: Store, letters: Artifact, scores: Artifact) -> None:
    b, d = rules(store, letters, "b").ref, rules(store, letters, "d").ref
    made = run(BuildConfig(input=b, filter=d, filter_max=0.5, choose="all-pairs", test_fraction=0), store)
    assert set(pairs_of(made)) == {"p#1>0", "p#2>0", "q#1>0", "q#2>0"}
    assert made.manifest.summary["left_out_filter"] == 2
    assert list(made.manifest.inputs) == ["candidates", "filter", "input"]
    unknown = rules(store, Artifact(scores.input_path("input")), "^(?:x|1|no|6)$").ref
    made = run(BuildConfig(input=unknown, filter=scores.ref, filter_min=0, test_fraction=0), store)
    assert made.manifest.summary["left_out_filter_no_reward"] == 2  # "4?" has no answer
    assert "unknown" not in pairs_of(made)


@pytest.mark.parametrize("flag", ["also", "filter"])
def test_scores_of_other_candidates_are_refused(flag: str, store: Store, letters: Artifact, scores: Artifact) -> None:
    mine = rules(store, letters, "b")
    config = {"also": BuildConfig(input=mine.ref, also=(scores.ref,)),
              "filter": BuildConfig(input=mine.ref, filter=scores.ref, filter_min=0)}[flag]  # fmt: skip
    theirs = scores.manifest.inputs["input"]["ref"]
    with pytest.raises(
        UsageError, match=f"{scores.ref} scores other candidates: {theirs}, not {letters.ref}"
    ) as caught:
        run(config, store)
    assert caught.value.where == f"--{flag} {scores.ref}"
    assert caught.value.hint is not None and f"bnfctl score {letters.ref}" in caught.value.hint


def test_thresholds_make_single_labelled_responses(store: Store, letters: Artifact) -> None:
    ref = rules(store, letters, "d").ref
    made = run(BuildConfig(input=ref, choose="threshold", good=0.75, bad=-0.25, test_fraction=0), store)
    assert pairs_of(made) == {
        f"{prompt}#{sample}": ("abcd", None) if sample == 3 else (None, "abc"[: sample + 1])
        for prompt in "pq" for sample in range(4)
    }  # fmt: skip
    summary = made.manifest.summary
    assert (summary["chosen_only"], summary["rejected_only"], summary.get("pairs")) == (2, 6, None)
    # The mean, 0.25, counts the response that is left out too: without it the others would be 1/3 below.
    few = run(BuildConfig(input=ref, choose="threshold", good=0.5, bad=-0.3, min_chars=2), store)
    assert set(pairs_of(few)) == {"p#3", "q#3"}
    good = run(BuildConfig(input=ref, choose="threshold", good=1, scope="global"), store)
    assert set(pairs_of(good)) == {"p#3", "q#3"}
    assert good.manifest.summary["left_out_between"] == 6
    with pytest.raises(BnfctlError, match="no records") as caught:
        run(BuildConfig(input=ref, choose="threshold", good=5), store)
    assert "--good" in str(caught.value.hint)


@pytest.mark.parametrize("changes", [{"scorer": "pairrm"}, {"scorer": "judge", "judge_mode": "pairwise"}])
@pytest.mark.parametrize("first", [True, False])
def test_relative_rewards_have_no_global_threshold(
    changes: dict[str, str], first: bool, store: Store, letters: Artifact
) -> None:
    absolute, relative = rules(store, letters, "b"), rules(store, letters, "c")
    manifest = relative.path / "manifest.json"
    manifest.write_text(
        json.dumps({**json.loads(manifest.read_text()), "config": {**relative.manifest.config, **changes}})
    )
    one, other = (relative.ref, absolute.ref) if first else (absolute.ref, relative.ref)
    config = BuildConfig(input=one, also=(other,), combine="raw", choose="threshold", good=1, scope="global")
    with pytest.raises(UsageError, match="relative to the prompt's other responses") as caught:
        run(config, store)
    assert caught.value.exit_code == 2
    assert relative.ref in str(caught.value.where)
    assert run(dataclasses.replace(config, scope="prompt", good=0.1), store).manifest.summary["records"] == 4


def test_zscores_have_no_global_threshold(store: Store, letters: Artifact) -> None:
    refs = [rules(store, letters, pattern).ref for pattern in "bc"]
    with pytest.raises(UsageError, match="--combine zscore makes rewards relative"):
        run(BuildConfig(input=refs[0], also=(refs[1],), choose="threshold", good=1, scope="global"), store)


def test_filters_of_a_ready_set(store: Store, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "fine", "prompt": "Q", "chosen": "a good one", "rejected": "something else"},
        {"id": "same", "prompt": "R", "chosen": "so", "rejected": "so"},
        {"id": "empty", "prompt": "S", "chosen": "yes", "rejected": " \n"},
        {"id": "long", "prompt": "T", "chosen": "yes" * 20, "rejected": "no"},
        {"id": "near", "prompt": "U", "chosen": "the sum is 12", "rejected": "the sum is 13"},
        {
            "id": "narrow",
            "prompt": "V",
            "chosen": "aaaa",
            "rejected": "bbbb",
            "chosen_reward": 1,
            "rejected_reward": 0.9,
        },
        {"id": "wide", "prompt": "W", "chosen": "aaaa", "rejected": "bbbb", "chosen_reward": 9, "rejected_reward": 0},
        {"id": "equal", "prompt": "X", "chosen": "aaaa", "rejected": "bbbb", "chosen_reward": 1, "rejected_reward": 1},
    ]
    path = str(write_jsonl(tmp_path / "p.jsonl", rows))
    made = run(BuildConfig(input=path, max_chars=40, min_edit=0.2, min_margin=0.5, max_margin=5), store)
    assert set(pairs_of(made)) == {"fine"}
    summary = made.manifest.summary
    assert {name: number for name, number in summary.items() if name.startswith(("dropped_", "left_out_", "rows"))} == {
        "rows": 8, "left_out_empty": 1, "left_out_length": 1, "dropped_incomplete": 2, "dropped_identical": 1,
        "dropped_edit": 1, "dropped_no_margin": 2, "dropped_max_margin": 1,
    }  # fmt: skip
    kept = run(BuildConfig(input=path, drop_empty=False), store)
    assert set(pairs_of(kept)) == {row["id"] for row in rows} - {"same"}  # the set's labels are taken at their word


def test_drop_cut_without_finish_reasons_is_told(
    store: Store, tmp_path: Path, scores: Artifact, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "no response says how it ended: --drop-cut leaves nothing out"
    path = str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Q", "chosen": "a", "rejected": "b"}]))
    for source in (path, scores.ref):
        run(BuildConfig(input=source), store)
        assert told not in capsys.readouterr().err
        run(BuildConfig(input=source, drop_cut=True, seed=1), store)
        assert capsys.readouterr().err.count(told) == 1
        run(BuildConfig(input=source, drop_cut=True, limit=1), store)
        assert capsys.readouterr().err.count(told) == 1
    with contextlib.suppress(BnfctlError):  # all responses may be cut
        run(BuildConfig(input=chain.scores.ref, drop_cut=True), chain.copy(tmp_path / "copy"))
    assert told not in capsys.readouterr().err


def test_batches_of_a_set_leave_no_trace(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = preference_rows(50)
    for number in (3, 4, 5, 17, 49):
        rows[number]["rejected"] = rows[number]["chosen"] if number % 2 else ""
    path = str(write_jsonl(tmp_path / "p.jsonl", rows))
    whole = run(BuildConfig(input=path, pairing_ratio=0.5, limit=45), store)
    assert whole.manifest.summary["rows"] == 45 and whole.manifest.summary["dropped_identical"] == 3
    monkeypatch.setattr(ready, "_BATCH", 4)
    again = launch.execute("build", BuildConfig(input=path, pairing_ratio=0.5, limit=45), store, force=True).artifact
    assert (again.manifest.digest, again.manifest.summary) == (whole.manifest.digest, whole.manifest.summary)


def test_feedback_becomes_single_labelled_responses(store: Store, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Q{i}", "response": f"R{i}" if i else " ", "thumb": "up" if i % 3 else "down"} for i in range(9)
    ]
    path = str(write_jsonl(tmp_path / "log.jsonl", rows))
    made = run(BuildConfig(input=path, label_column="thumb", test_fraction=0), store)
    assert sorted(text for row in made.rows() for text in (row["chosen_text"],) if text) == [
        f"R{i}" for i in (1, 2, 4, 5, 7, 8)
    ]
    summary = made.manifest.summary
    assert (summary["rows"], summary["chosen_only"], summary["rejected_only"], summary["left_out_empty"]) == (
        9,
        6,
        2,
        1,
    )


def test_masks_are_drawn_per_record(store: Store, letters: Artifact) -> None:
    ref = rules(store, letters, "d").ref
    flags: dict[str, Any] = {"input": ref, "choose": "all-pairs", "test_fraction": 0}
    found = [pairs_of(run(BuildConfig(pairing_ratio=0, seed=seed, **flags), store)) for seed in range(4)]
    for records in found:
        assert len(records) == 6 and all(
            (chosen is None) != (rejected is None) for chosen, rejected in records.values()
        )
    assert any(len({chosen is None for chosen, _ in list(records.values())[:3]}) == 2 for records in found)
