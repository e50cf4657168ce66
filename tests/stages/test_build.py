"""build: pairs, drops and their counts, masks, splits, and ready preference sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bnfctl.artifact import Artifact, Store
from bnfctl.config import BuildConfig, ScoreConfig
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
    counts = {name: summary[name] for name in ("prompts", "records", "pairs", "dropped_no_margin", "dropped_no_reward")}
    assert counts == {"prompts": 6, "records": 2, "pairs": 2, "dropped_no_margin": 2, "dropped_no_reward": 2}


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
    with pytest.raises(BnfctlError, match=r"no records.*no_margin.*3") as caught:
        run(BuildConfig(input=scores.ref), store)
    assert caught.value.exit_code == 1
    assert caught.value.where == scores.ref
    assert caught.value.hint is not None and "bnfctl show" in caught.value.hint
    assert not any(ref.startswith("build") for ref in published(store))


def test_an_artifact_of_another_stage_is_refused(chain: Chain) -> None:
    with pytest.raises(UsageError, match="is a generate artifact; this takes score") as caught:
        run(BuildConfig(input=chain.candidates.ref), chain.store)
    assert caught.value.exit_code == 2


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
