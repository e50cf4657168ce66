"""Reference rows: one pass for all trainings on the same responses, and none of another model or code path."""

from __future__ import annotations

import fcntl
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import logsigmoid

from bnfctl import console
from bnfctl.artifact import Artifact, Store
from bnfctl.config import ReferenceConfig, TrainConfig
from bnfctl.data.records import Record
from bnfctl.errors import BnfctlError, Interrupted
from bnfctl.training import loop, reference, setup
from bnfctl.training.batches import Work
from bnfctl.training.world import World
from tests.model.tiny import write_model
from tests.ranks import run_ranks
from tests.training.data import ALONE, at_reference, make_records, moved_run, source_of, train

CONFIG = TrainConfig(model="m", lr=2e-3, batch_size=4, eval_every=3, micro_tokens=64)
SMALL = replace(CONFIG, micro_tokens=20)
RECORDS, TEST_SET = make_records(9), make_records(3, seed=4)


class Passes:
    """How many responses each reference pass has computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        original = reference.Maker._pass

        def counting(maker: Any, policy: Any, work: Work, units: Any, parts: Path) -> None:
            self.sizes.append(sum(len(record.sides) for record in work.records))
            original(maker, policy, work, units, parts)

        monkeypatch.setattr(reference.Maker, "_pass", counting)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


@pytest.fixture
def again(model_dir: Path, tmp_path: Path, passes: Passes) -> Any:
    """Train once; then `again(..)` trains with another question on the same store, and says what it had to compute."""
    train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path / "first", tmp_path / "home")
    assert passes.sizes == [2 * (len(RECORDS) + len(TEST_SET))]

    def run(
        records: Sequence[Record] = RECORDS, test_set: Sequence[Record] = TEST_SET, model: Path = model_dir,
        **fields: Any,
    ) -> list[int]:  # fmt: skip
        passes.sizes.clear()
        train(replace(CONFIG, **fields), model, records, test_set, tmp_path / "second", tmp_path / "home")
        return list(passes.sizes)

    return run


def masked(records: Sequence[Record]) -> list[Record]:
    """As another pairing ratio leaves them: one side of some."""
    return [replace_sides(record, i % 3) for i, record in enumerate(records)]


def replace_sides(record: Record, kind: int) -> Record:
    return Record(record.id, record.prompt_ids, (record.sides, record.sides[:1], record.sides[1:])[kind])


@pytest.mark.parametrize(
    "fields",
    [{"loss": "dpo"}, {"loss": "sft"}, {"loss": "simpo"}, {"seed": 5}, {"epochs": 2}, {"batch_size": 2}, {"lr": 1e-4},
     {"micro_tokens": 16}, {"share_prompt": False}, {"activation_checkpointing": "on"}, {"lora": 2}],
    ids=str,
)  # fmt: skip
def test_another_training_makes_no_pass(fields: dict[str, Any], again: Any) -> None:
    assert again(**fields) == []


def test_other_masks_and_splits_make_no_pass(again: Any) -> None:
    assert again(masked(RECORDS)) == []
    assert again([*RECORDS[3:], *TEST_SET], RECORDS[:3], seed=1) == []


@pytest.mark.parametrize("fields", [{"dtype": "bfloat16"}, {"layout": "padded"}, {"attention": "eager"}], ids=str)
def test_another_code_path_makes_one(fields: dict[str, Any], again: Any) -> None:
    assert again(**fields) == [24]


def test_parameters_cast_before_the_products_are_another_path(again: Any) -> None:
    """As LoRA's frozen base is in bfloat16; autocast over float32 masters keeps the residual stream in float32."""
    assert again(dtype="bfloat16") == again(dtype="bfloat16", lora=2, epochs=2) == [24]
    assert again(dtype="bfloat16", lora=4, epochs=3) == []


def test_another_model_makes_one(again: Any, model_dir: Path, tmp_path: Path) -> None:
    assert again(model=write_model(tmp_path / "other", seed=1)) == [24]


def test_a_copy_of_the_model_makes_none(again: Any, model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "copy")
    assert again(model=tmp_path / "copy") == []


def test_only_what_is_missing_is_computed(again: Any, tmp_path: Path) -> None:
    more = make_records(2, seed=7)
    assert again([*RECORDS, *more]) == [4]
    artifacts = list(Store(tmp_path / "home").artifacts("reference"))
    assert sorted(artifact.manifest.summary["responses"] for artifact in artifacts) == [4, 24]
    assert again([*masked(more), *RECORDS[:2]], seed=3) == [], "rows of both are put together"


def test_kto_computes_its_mismatched_pairs_besides(again: Any) -> None:
    assert again(loss="kto") == [24]
    assert again(loss="kto", seed=2, batch_size=3) == [], "the partner does not depend on the batch"


def test_equal_responses_are_computed_once(model_dir: Path, tmp_path: Path, passes: Passes) -> None:
    twice = [Record(f"{record.id}-{i}", record.prompt_ids, record.sides) for record in RECORDS for i in range(2)]
    train(CONFIG, model_dir, twice, [], tmp_path)
    assert passes.sizes == [18]


def test_a_loss_without_reference_makes_no_pass(model_dir: Path, tmp_path: Path, passes: Passes) -> None:
    train(replace(CONFIG, loss="sft"), model_dir, RECORDS, [], tmp_path)
    assert passes.sizes == []


def test_the_rows_are_log_odds_of_the_model(model_dir: Path, tmp_path: Path) -> None:
    """Against plain transformers, response by response."""
    run = at_reference(model_dir, tmp_path, RECORDS)
    rows = {row["response"]: row["log_odds"] for row in stored(tmp_path / "home").rows()}
    assert list(rows) == sorted(rows) and len(rows) == 18
    policy = setup.load(run.config, model_dir, ALONE, sharded=False)
    for record in RECORDS:
        for side in record.sides:
            logits = policy.model(input_ids=torch.tensor([record.prompt_ids + side.ids])).logits[0].double()
            start = len(record.prompt_ids) - 1
            p = logits[start : start + len(side.ids)].softmax(-1).gather(-1, torch.tensor(side.ids)[:, None])
            exact = torch.logit(p.squeeze(-1).detach())
            found = torch.tensor(rows[reference.response_hash(record, side)])
            torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("loss", ["bnf", "kto"])
def test_live_equals_cached(loss: str, layout: str, model_dir: Path, tmp_path: Path, passes: Passes) -> None:
    runs = {}
    for kind, budget in (("cached", 30), ("live", 64)):
        fields = {"loss": loss, "layout": layout, "reference": kind, "micro_tokens": budget}
        runs[kind], _ = moved_run(model_dir, tmp_path / kind, RECORDS, **fields)
    assert len(passes.sizes) == 1 and runs["live"].reference_refs == [] != runs["cached"].reference_refs
    for split in runs["live"].splits:
        if runs["live"].splits[split].records:
            batch = runs["live"].splits[split].collate([3, 0, 8])
            (live, cached) = (runs[kind].reference.log_odds(split, batch) for kind in ("live", "cached"))
            assert live.dtype == cached.dtype == torch.float32
            torch.testing.assert_close(live, cached, rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(logsigmoid(live), logsigmoid(cached), rtol=1e-6, atol=1e-5)


def test_live_trains_like_cached(model_dir: Path, tmp_path: Path) -> None:
    finals = []
    for kind in ("cached", "live"):
        summary = train(replace(CONFIG, reference=kind), model_dir, RECORDS, TEST_SET, tmp_path / kind)
        assert (summary["provenance"]["reference"] == []) == (kind == "live")
        finals.append(summary["final"])
    assert finals[0].pop("split") == finals[1].pop("split") == "train"
    assert finals[1] == pytest.approx(finals[0], rel=1e-4, abs=1e-6)


def stored(home: Path) -> Artifact:
    (artifact,) = Store(home).artifacts("reference")
    return artifact


@pytest.mark.parametrize(
    ("shift", "found"),
    [(1e-3, r"0\.001, in both directions 0\.001"), (-1e-3, r"(0|\S+e-\d+), in both directions 0\.001")],
    ids=["above", "below: c is 1 where the reference is too low"],
)
def test_a_reference_that_drifts_stops_before_the_first_update(
    shift: float,
    found: str,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path / "first", tmp_path / "home")
    assert "reference drift at step 0: mean of 1 - c is" in capsys.readouterr().err
    read = reference._read

    def tampered(artifact: Artifact, wanted: Any, found: Any) -> None:
        read(artifact, wanted, found)
        for hash_ in found:
            found[hash_] = found[hash_] + shift

    monkeypatch.setattr(reference, "_read", tampered)
    with pytest.raises(
        BnfctlError, match=rf"differs from its reference at step 0: the mean of 1 - c is {found}, above 1e-05"
    ) as caught:
        train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path / "second", tmp_path / "home")
    assert caught.value.where == stored(tmp_path / "home").ref
    assert "--allow-drift" in str(caught.value.hint) and "bnfctl rm" in str(caught.value.hint)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "second" / "model").exists() and not (tmp_path / "second" / "metrics.jsonl").read_text()
    summary = train(
        replace(CONFIG, allow_drift=True), model_dir, RECORDS, TEST_SET, tmp_path / "second", tmp_path / "home"
    )
    assert summary["final"]["step"] == 3


def test_the_limit_of_bfloat16_is_wider(model_dir: Path, tmp_path: Path) -> None:
    for dtype, passing, failing in (("float32", 9e-6, 1.1e-5), ("bfloat16", 9e-3, 1.1e-2)):
        run = at_reference(model_dir, tmp_path, RECORDS, dtype=dtype)
        loop.check_drift(run, passing, 2 * passing)
        for drift, gap in ((failing, failing), (0.0, 2 * failing), (float("nan"), 0.0), (0.0, float("nan"))):
            with pytest.raises(BnfctlError, match="differs from its reference"):
                loop.check_drift(run, drift, gap)


def test_a_corrupted_shard_is_named(model_dir: Path, tmp_path: Path) -> None:
    train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path / "first", tmp_path / "home")
    artifact = stored(tmp_path / "home")
    (shard,) = (artifact.path / "rows").iterdir()
    table = pq.read_table(shard)
    values = [[value + 1e-7 for value in row] for row in table.column("log_odds").to_pylist()]
    pq.write_table(
        table.set_column(1, reference.SCHEMA.field(1), pa.array(values, reference.SCHEMA.field(1).type)), shard
    )
    with pytest.raises(BnfctlError, match=r"corrupted artifact: rows/00000\.parquet is changed") as caught:
        train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path / "second", tmp_path / "home")
    assert caught.value.where == str(artifact.path) and artifact.ref in str(caught.value.hint)


def test_log_odds_that_are_not_finite_are_not_published(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every later run would take them."""
    original = reference.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        done = original(*args, **kwargs)
        done.tokens.log_odds[-1] = float("nan")
        return done

    monkeypatch.setattr(reference, "forward", broken)
    with pytest.raises(BnfctlError, match="log-odds of a response are not finite") as caught:
        train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
    assert caught.value.where is not None and caught.value.where.startswith("record r")
    assert not list((tmp_path / "home" / "reference").glob("*"))


def test_two_runs_at_once_make_one_pass(
    model_dir: Path, tmp_path: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has found no rows either; it waits for the first one's lock, and then takes what is there."""
    seen = threading.Barrier(2)
    original = reference.Maker._make

    def together(*args: Any) -> Any:
        seen.wait(60)
        return original(*args)

    run = at_reference(model_dir, tmp_path / "elsewhere", RECORDS, **vars(CONFIG))
    passes.sizes.clear()
    monkeypatch.setattr(reference.Maker, "_make", together)
    path = ReferenceConfig("float32", "cpu", run.policy.attention, True, False, "none")
    found: dict[int, list[str]] = {}

    def make(number: int) -> None:
        source = source_of(model_dir, tmp_path / "home")
        layout, budget = run.splits["train"].layout, run.splits["train"].budget
        maker = reference.Maker(source.store, source.pinned, path, layout, budget, ALONE)
        rows, found[number] = maker.cached(run.policy, run.splits)
        assert rows.log_odds("train", run.splits["train"].collate([2])).isfinite().all()

    threads = [threading.Thread(target=make, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert passes.sizes == [18]
    assert found == {0: [stored(tmp_path / "home").ref], 1: [stored(tmp_path / "home").ref]}


def interrupted(monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path) -> None:
    """A run that is killed when two parts of its reference pass are there."""
    monkeypatch.setattr(reference, "UNITS_PER_PART", 1)
    original, begun = reference.Maker._unit, []

    def unit(*args: Any) -> None:
        begun.append(1)
        if len(begun) > 2:
            raise KeyboardInterrupt
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(reference.Maker, "_unit", unit)
        with pytest.raises(KeyboardInterrupt):
            train(SMALL, model_dir, RECORDS, [], tmp_path / "killed", tmp_path / "home")
    assert len(list((tmp_path / "home" / ".drafts").rglob("*.parquet"))) == 2


def test_parts_of_the_same_responses_in_other_records_are_not_taken(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unpaired build of the same responses has the same draft; its parts hold other ones."""
    interrupted(monkeypatch, model_dir, tmp_path)
    singles = [Record(f"{r.id}-{i}", r.prompt_ids, (side,)) for r in RECORDS for i, side in enumerate(r.sides)]
    train(SMALL, model_dir, singles[::-1], [], tmp_path / "second", tmp_path / "home")
    rows = {row["response"] for row in stored(tmp_path / "home").rows()}
    assert rows == {reference.response_hash(record, side) for record in RECORDS for side in record.sides}


def test_parts_with_other_rows_are_not_published(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, model_dir, tmp_path)
    first, second = sorted((tmp_path / "home" / ".drafts").rglob("*.parquet"))
    shutil.copy(first, second)
    with pytest.raises(BnfctlError, match=r"hold 1\d responses that are not the 18 asked for") as caught:
        train(SMALL, model_dir, RECORDS, [], tmp_path / "killed", tmp_path / "home")
    assert caught.value.where == str(first.parent) and str(first.parent) in str(caught.value.hint)
    assert not list((tmp_path / "home" / "reference").glob("*"))
    shutil.rmtree(first.parent)
    assert train(SMALL, model_dir, RECORDS, [], tmp_path / "killed", tmp_path / "home")["steps"] == 3


def stopped_while_waiting(world: World, model: str, home: str) -> None:
    """Another process makes the reference; a second later, the rank that is not the first gets a signal."""
    if not world.main:
        threading.Timer(1, lambda: setattr(console, "_signal", signal.SIGTERM)).start()
    begun = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        moved_run(Path(model), Path(home), RECORDS, home=Path(home), world=world)
    assert caught.value.exit_code == 143 and time.monotonic() - begun < 60


def test_waiting_ranks_agree_on_a_stop(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, model_dir, tmp_path)
    (lock,) = (tmp_path / "home" / ".drafts").glob("*.lock")
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run_ranks(stopped_while_waiting, 2, str(model_dir), str(tmp_path / "home"), timeout=90)
