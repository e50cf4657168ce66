"""Records from scored candidates, taken by row number: equal to a row-by-row twin, however the rows lie in shards."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest

from bnfctl import shards
from bnfctl.artifact import Artifact, Pinned, Plan, Store
from bnfctl.config import BuildConfig, GenerateConfig, ScoreConfig
from bnfctl.data import candidates, pairing, scored
from bnfctl.errors import BnfctlError

REWARDS = pa.schema(
    [("prompt_id", pa.string()), ("sample", pa.int32()), ("reward", pa.float64()), ("extra", pa.string())]
)


def candidate_rows(prompts: int, draw: random.Random) -> list[dict[str, Any]]:
    """One to seven responses per prompt; of every kind: cut, empty, equal texts, with and without ids."""
    rows = []
    for number in range(prompts):
        for sample in range(draw.randint(1, 7)):
            ids = [draw.randrange(1000) for _ in range(draw.randrange(30))]
            rows.append({
                "prompt_id": f"p{number}", "prompt": [{"role": "user", "content": f"Question {number}?"}], "sample": sample,
                "text": draw.choice(["", " ", "same", "yes", "no"]) + "x" * len(ids), "token_ids": ids,
                "finish_reason": draw.choice(["stop", "length", None]), "prompt_ids": [number, 1, 2],
            })  # fmt: skip
    return rows


def reward_rows(rows: list[dict[str, Any]], draw: random.Random) -> list[dict[str, Any]]:
    values = [None, float("nan"), *map(float, range(-2, 4))]
    return [{"prompt_id": row["prompt_id"], "sample": row["sample"], "reward": draw.choice(values)} for row in rows]


def publish(store: Store, stage: str, seed: int, rows: list[dict[str, Any]], inputs: dict[str, Pinned]) -> Artifact:
    config: Any = (
        GenerateConfig(prompts="x", seed=seed) if stage == "generate" else ScoreConfig(input="x", max_length=seed + 1)
    )
    with store.draft(Plan(stage, 1, config, inputs)) as draft:
        draft.open()
        shards.write_shards(draft.path / "rows", rows, candidates.SCHEMA if stage == "generate" else REWARDS)
        return draft.publish({"prompts": len({row["prompt_id"] for row in rows}), "tokenizer": None})


def build(config: BuildConfig, source: Artifact, scores: list[Artifact], gate: Artifact | None = None) -> tuple[
    list[dict[str, Any]], Counter[str]
]:  # fmt: skip
    counts: Counter[str] = Counter()
    tables = list(scored.records(config, source, scores, gate, counts))
    assert all(table.schema == pairing.SCHEMA for table in tables)
    return [row for table in tables for row in table.to_pylist()], counts


def twin(
    config: BuildConfig, rows: list[dict[str, Any]], rewards: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Best against worst, row by row."""
    counts: Counter[str] = Counter()
    found: list[dict[str, Any]] = []
    by_prompt: dict[str, list[tuple[float | None, dict[str, Any]]]] = {}
    for row, reward in zip(rows, rewards, strict=True):
        value = reward["reward"]
        by_prompt.setdefault(row["prompt_id"], []).append((None if value is None or value != value else value, row))
    for prompt_id, group in by_prompt.items():
        counts["prompts"] += 1
        counts["candidates"] += len(group)
        usable = []
        for value, row in group:
            if value is None:
                counts["left_out_no_reward"] += 1
            elif not row["text"].strip():
                counts["left_out_empty"] += 1
            elif config.drop_cut and row["finish_reason"] == "length":
                counts["left_out_cut"] += 1
            else:
                usable.append((value, row))
        if len(usable) < 2:
            known = sum(value is not None for value, _ in group)
            counts["dropped_too_few" if known > 1 else "dropped_no_reward"] += 1
            continue
        best = max(usable, key=lambda one: (one[0], -one[1]["sample"]))
        worst = min(usable, key=lambda one: (one[0], one[1]["sample"]))
        if best[0] - worst[0] <= config.min_margin:
            counts["dropped_no_margin"] += 1
        elif best[1]["text"] == worst[1]["text"]:
            counts["dropped_identical"] += 1
        else:
            record: dict[str, Any] = {"record_id": prompt_id, "prompt_id": prompt_id, "prompt": best[1]["prompt"],
                                      "split": pairing.split_of(config.seed, prompt_id, config.test_fraction),
                                      "prompt_ids": best[1]["prompt_ids"]}  # fmt: skip
            kept = pairing.kept_sides(config.seed, prompt_id, config.pairing_ratio)
            for side, (value, row) in (("chosen", best), ("rejected", worst)):
                cells = {"text": row["text"], "ids": row["token_ids"], "finish": row["finish_reason"], "reward": value}
                record |= {f"{side}_{name}": cell if side in kept else None for name, cell in cells.items()}
            found.append(record)
    return found, counts


@pytest.mark.parametrize("shard", [3, 8, 64, 10_000])
@pytest.mark.parametrize("flags", [{}, {"drop_cut": True, "min_margin": 1.0, "pairing_ratio": 0.4, "seed": 5}])
def test_equal_to_the_row_by_row_twin(
    shard: int, flags: dict[str, Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(shard)
    rows = candidate_rows(60, draw)
    rewards = reward_rows(rows, draw)
    monkeypatch.setattr(shards, "SHARD_ROWS", shard)
    monkeypatch.setattr(scored, "_RECORDS", 11)
    source = publish(store, "generate", shard, rows, {})
    monkeypatch.setattr(shards, "SHARD_ROWS", 17)  # scores need not lie as the candidates do
    scores = publish(store, "score", shard, rewards, {"input": source.pinned()})
    config = BuildConfig(input="x", test_fraction=0.3, **flags)
    assert build(config, source, [scores]) == twin(config, rows, rewards)


@pytest.fixture
def made(store: Store, monkeypatch: pytest.MonkeyPatch) -> tuple[Artifact, list[dict[str, Any]], list[dict[str, Any]]]:
    monkeypatch.setattr(shards, "SHARD_ROWS", 16)
    draw = random.Random(0)
    rows = candidate_rows(40, draw)
    rewards = reward_rows(rows, draw)
    return publish(store, "generate", 0, rows, {}), rows, rewards


Made = tuple[Artifact, list[dict[str, Any]], list[dict[str, Any]]]


@pytest.mark.parametrize("choose", ["best-random", "all-pairs", "top-bottom", "threshold"])
def test_every_rule_gives_unique_ids_margins_and_what_was_sampled(choose: str, made: Made, store: Store) -> None:
    source, rows, rewards = made
    scores = publish(store, "score", 0, rewards, {"input": source.pinned()})
    more: dict[str, Any] = (
        {"good": 0.5, "bad": -0.5} if choose == "threshold" else {"top_k": 2} if choose == "top-bottom" else {}
    )
    found, counts = build(BuildConfig(input="x", choose=choose, **more), source, [scores])
    assert len({row["record_id"] for row in found}) == len(found) > 10
    known = {(row["prompt_id"], row["text"], tuple(row["token_ids"]), reward["reward"])
             for row, reward in zip(rows, rewards, strict=True)}  # fmt: skip
    for row in found:
        there = [side for side in pairing.SIDES if row[f"{side}_text"] is not None]
        assert len(there) == (1 if choose == "threshold" else 2)
        for side in there:
            cells = row["prompt_id"], row[f"{side}_text"], tuple(row[f"{side}_ids"]), row[f"{side}_reward"]
            assert cells in known
        if len(there) == 2:
            assert row["chosen_reward"] > row["rejected_reward"]
    assert counts["candidates"] == len(rows)


def test_all_pairs_are_all_and_no_others(made: Made, store: Store) -> None:
    source, rows, rewards = made
    scores = publish(store, "score", 0, rewards, {"input": source.pinned()})
    found, counts = build(BuildConfig(input="x", choose="all-pairs", drop_empty=False), source, [scores])
    both = [
        (row["prompt_id"], row["sample"], row["text"], value["reward"])
        for row, value in zip(rows, rewards, strict=True)
    ]
    expected = {
        f"{a[0]}#{a[1]}>{b[1]}" for a in both for b in both
        if a[0] == b[0] and a[3] is not None and b[3] is not None and a[3] > b[3] and a[2] != b[2]
    }  # fmt: skip
    assert {row["record_id"] for row in found} == expected
    assert counts["dropped_identical"] > 0 and counts["dropped_no_margin"] > 0


def test_a_limit_stops_after_whole_prompts(made: Made, store: Store) -> None:
    source, rows, rewards = made
    scores = publish(store, "score", 0, rewards, {"input": source.pinned()})
    for limit in (1, 7, 39, 40, 99):
        few = [row for row in rows if int(row["prompt_id"][1:]) < limit]
        config = BuildConfig(input="x", limit=limit)
        assert build(config, source, [scores]) == twin(config, few, rewards[: len(few)])
    (source.path / source.manifest.files[-1]["path"]).unlink()
    assert build(BuildConfig(input="x", limit=1), source, [scores])[1]["prompts"] == 1  # reads no further


@pytest.mark.parametrize("wrong", ["order", "missing", "extra", "sample"])
def test_scores_of_other_candidates_are_refused(wrong: str, made: Made, store: Store) -> None:
    source, _, rewards = made
    if wrong == "order":
        rewards[20], rewards[-1] = rewards[-1], rewards[20]
    elif wrong == "sample":
        rewards[3]["sample"] += 1
    elif wrong == "missing":
        rewards.pop()
    else:
        rewards.append({"prompt_id": "more", "sample": 0, "reward": 1.0})
    scores = publish(store, "score", 0, rewards, {"input": source.pinned()})
    with pytest.raises(BnfctlError, match="scores and candidates do not match") as caught:
        build(BuildConfig(input="x"), source, [scores])
    assert scores.ref in str(caught.value.where)


def test_prompts_that_lie_across_tables_come_whole() -> None:
    ids = ["a", "a", "b", "b", "b", "b", "b", "c", "d", "d"]
    table = pa.table({"prompt_id": ids, "n": list(range(10))})
    for size in range(1, 11):
        pieces = [table.slice(start, size) for start in range(0, 10, size)]
        whole = list(candidates.whole_prompts(pieces))
        assert [n for part in whole for n in part["n"].to_pylist()] == list(range(10))
        assert sum(len(set(part["prompt_id"].to_pylist())) for part in whole) == 4
        assert all(column.num_chunks == 1 for part in whole for column in part.columns)
    assert list(candidates.whole_prompts([])) == list(candidates.whole_prompts([table.slice(0, 0)])) == []


def test_lengths_are_tokens_where_a_prompts_ids_are_known_else_characters(store: Store) -> None:
    """The best has 10 characters, the two worst 1 and 9; in tokens the one with 1 character is as long as the best."""
    cells = [("aaaaaaaaaa", [1], 2.0), ("b", [1], 0.0), ("ccccccccc", [1, 2, 3], 0.0)]
    first = candidate_rows(1, random.Random(0))[0]
    rows = [
        {**first, "prompt_id": prompt, "sample": i, "text": text, "token_ids": None if prompt == "unknown" and i == 2 else ids}
        for prompt in ("known", "unknown") for i, (text, ids, _) in enumerate(cells)
    ]  # fmt: skip
    rewards = [
        {"prompt_id": row["prompt_id"], "sample": row["sample"], "reward": cells[row["sample"]][2]} for row in rows
    ]
    source = publish(store, "generate", 0, rows, {})
    scores = publish(store, "score", 0, rewards, {"input": source.pinned()})
    found, _ = build(BuildConfig(input="x", length_balance=1.0), source, [scores])
    assert {row["record_id"]: row["rejected_text"] for row in found} == {"known": "b", "unknown": "ccccccccc"}
