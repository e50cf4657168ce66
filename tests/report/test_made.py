"""Tables about trainings, builds, judges and shifts: the numbers of the artifacts, and how far judges can be trusted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bnfctl import shards
from bnfctl.artifact import Artifact, Plan, Store
from bnfctl.config import BuildConfig, TrainConfig
from bnfctl.data import pairing
from bnfctl.report.collect import collect
from bnfctl.report.evidence import Evidence
from bnfctl.report.judges import agreement, judges
from bnfctl.report.lengths import lengths
from bnfctl.report.made import builds, training
from bnfctl.report.shifted import shifts
from bnfctl.report.table import DASH, Cell, Table
from bnfctl.tasks.agreement import cohen_kappa
from bnfctl.tasks.battles import VERDICTS
from tests.report.evals import BASE, arena, graded, judge, publish, wild
from tests.report.page_world import publish_build, publish_train, shift_rows


def cells(table: Table | None, row: int = 0) -> dict[str, Cell]:
    """A row by "heading: column"."""
    assert table is not None
    over = [heading for heading, count in table.groups for _ in range(count)] or [""] * len(table.columns)
    names = [f"{heading}: {name}" if heading else name for heading, name in zip(over, table.columns, strict=True)]
    assert len(set(names)) == len(names) == len(table.rows[row])
    return dict(zip(names, table.rows[row], strict=True))


def test_training_shows_the_last_step_and_the_test_split(store: Store) -> None:
    build = publish_build(store)
    final = {"objective": -0.07, "objective_chosen": 0.05, "objective_rejected": -0.18, "shift_chosen": 0.013,
             "shift_rejected": -0.034, "coefficient": 0.84, "margin": 1.31, "accuracy": 0.92}  # fmt: skip
    for loss, last in (("bnf", final), ("dpo", {**final, "objective_chosen": None, "objective_rejected": None})):
        config = TrainConfig(model=BASE.ref, loss=loss, lr=1e-6, seed=2)
        with store.draft(Plan("train", 2, config, {"model": BASE, "data": build.pinned()})) as draft:
            draft.open()
            (draft.path / "metrics.jsonl").write_text(loss)
            draft.publish({"steps": 18, "records": 556, "tokens": 33473, "final": last})
    found = collect(list(store.artifacts("train")), store)
    table = training(found)
    rows = {cells(table, n)["Method"].text: cells(table, n) for n in (0, 1)}
    assert [rows["BNF"][name].value for name in ("Peak lr", "Batch", "Steps", "Records", "Tokens")] == [
        1e-6,
        128,
        18,
        556,
        33473,
    ]
    assert [rows["BNF"][f"Last step: {name}"].value for name in ("Objective", "of +1", "of -1", "Shift +1", "Shift -1", "Coefficient",
            "Margin", "Accuracy")] == list(final.values())  # fmt: skip
    assert rows["DPO"]["Last step: of +1"].text == DASH and rows["DPO"]["Last step: Margin"].text == "1.310"
    assert rows["BNF"]["Seed"].text == "2" and rows["BNF"]["Last step: Margin"].title == found.methods[1].runs[0].ref
    assert not any(name.startswith("Test split") for name in rows["BNF"])  # nobody asked for one


def test_builds_show_counts_reasons_and_the_bias_of_lengths(store: Store) -> None:
    rows = []
    for n in range(10):
        sides = {"chosen": 30 if n < 7 else 10, "rejected": 20}
        row: dict[str, Any] = {
            "record_id": f"r{n}",
            "prompt_id": f"p{n}",
            "split": "train",
            "prompt": [{"role": "user", "content": "?"}],
        }
        for side, length in sides.items():
            if side == "chosen" or n != 9:
                row |= {f"{side}_text": side[0] * length, f"{side}_ids": [1] * length, f"{side}_reward": 1.0}
        rows.append(row)
    with store.draft(Plan("build", 2, BuildConfig(input="score", pairing_ratio=0.9), {})) as draft:
        draft.open()
        shards.write_shards(draft.path / "rows", rows, pairing.SCHEMA)
        made = draft.publish({"prompts": 15, "records": 10, "pairs": 9, "chosen_only": 1, "train": 10,
                              "dropped_no_margin": 3, "left_out_too_few": 2})  # fmt: skip
    store.set_name("pairs", made.ref)
    row = cells(builds(collect([made], store)))
    assert row["Build"] == Cell("pairs", title=made.ref) and row["Choice"].text == "best-worst, 90% pairs"
    assert [row[f"Counts: {name}"].value for name in ("Prompts", "Records", "Pairs", "Only +1", "Train")] == [
        15,
        10,
        9,
        1,
        10,
    ]
    assert row["Counts: Left out"].text == "no margin 3, too few 2"
    assert row["Mean length of responses: +1"].value == 24 and row["Mean length of responses: -1"].value == 20
    assert row["Mean length of responses: Difference"].text == "+4.0"
    assert row["Mean length of responses: +1 longer"].value == pytest.approx(7 / 9)
    assert row["Mean length of responses: -1 longer"].value == pytest.approx(2 / 9)


def test_lengths_are_means_with_arrows_against_the_base(store: Store) -> None:
    base = publish(store, [*graded("gsm8k", [1.0] * 4, words=10), *wild([5.0] * 4, length=300)])
    tuned = publish_train(store, publish_build(store, records=20), "bnf", 0, 1).pinned()
    bnf = publish(store, [*graded("gsm8k", [1.0] * 4, words=12), *wild([5.0] * 4, length=200)], tuned, base=base)
    file = publish(store, {"file": [{**row, "tokens": None} for row in graded("gsm8k", [1.0] * 4, words=10)]}, None)
    found = collect([bnf, file], store)
    table = lengths("lengths", "t", found.methods, Evidence(found))
    rows = [cells(table, n) for n in range(3)]
    assert [row["GSM8K: tokens"].text for row in rows] == ["10.0", "12.0 ↑", DASH]
    assert [row["GSM8K: characters"].text for row in rows] == ["50.0", "60.0 ↑", "50.0 ="]
    assert [row["Wild-Bench: characters"].text for row in rows] == ["300", "200 ↓", DASH]


def test_lengths_are_of_the_items_that_all_have(store: Store) -> None:
    """Else an arrow would say how other items are, not other models."""
    base = publish(store, [*graded("gsm8k", [1.0] * 2, words=10), *graded("gsm8k", [1.0] * 2, first=2, words=50),
                           *wild([5.0] * 2, length=300), *graded("crux", [1.0], words=10)])  # fmt: skip
    tuned = publish_train(store, publish_build(store, records=20), "bnf", 0, 1).pinned()
    rows = [*graded("gsm8k", [1.0] * 2, words=10), *wild([5.0], length=300), *graded("crux", [1.0], first=9, words=12)]
    few = publish(store, graded("gsm8k", [1.0], words=99), tuned)
    found = collect([base, few, publish(store, rows, tuned)], store)
    table = lengths("lengths", "t", found.methods, Evidence(found))
    rows = [cells(table, n) for n in range(2)]
    assert [row["GSM8K: tokens"].text for row in rows] == ["10.0", "10.0 ="]
    assert rows[0]["GSM8K: tokens"].title.startswith("2 items; ")
    assert [row["Wild-Bench: characters"].text for row in rows] == ["300", "300 ="]
    assert [row["CRUX: tokens"].text for row in rows] == ["10.0", "12.0"], "no item in common, no arrow"


def judged_twice(store: Store) -> list[Artifact]:
    """One model, judged by two judges, of which the second turns some verdicts; and one response is another."""
    firsts = [("B>A", "A>B"), ("A>B", "A>B"), ("A=B", "A=B"), ("B>>A", None)]
    seconds = [("B>A", "A=B"), ("A>B", "A>B"), ("A=B", "A=B"), ("B>>A", "A>B")]
    other = [*arena(seconds), *wild([7.0, 5.0, 3.0])]
    other[2] = {**other[2], "response": "another one"}
    return [
        publish(store, [*arena(firsts), *wild([7.0, 5.0, None])], judged_by=judge("first")),
        publish(store, other, judged_by=judge("second")),
    ]


def test_judges_show_null_verdicts_and_position_bias(store: Store) -> None:
    table = judges(Evidence(collect(judged_twice(store), store)))
    assert table is not None and len(table.rows) == 4
    row = next(
        row
        for row in (cells(table, n) for n in range(4))
        if [row[n].text for n in ("Benchmark", "Judge")] == ["Arena-Hard", "first"]
    )
    assert row["Fingerprint"].text == judge("first").digest and row["Null (%)"].value == pytest.approx(100 / 8)
    assert row["Why"].text == "no label 1"
    # of the three prompts with both games, the second is won once by each side
    assert row["Flipped (%)"].value == pytest.approx(100 / 3) and row["Changed (%)"].value == pytest.approx(100 / 3)
    # of the four games that are no tie, where both games have a verdict, the first shown response won three
    assert row["First shown wins (%)"].value == pytest.approx(100 * 3 / 4)
    wild_row = cells(table, 0)
    assert wild_row["Benchmark"].text == "Wild-Bench" and wild_row["Flipped (%)"].text == DASH


def test_agreement_is_of_the_same_responses_only(store: Store) -> None:
    found = collect(judged_twice(store), store)
    table = agreement(Evidence(found))
    assert table is not None and [row[0].text for row in table.rows] == ["Wild-Bench", "Arena-Hard"]
    row = cells(table, 1)
    mine, theirs = ["B>A", "A>B", "A>B", "A>B", "B>>A"], ["B>A", "A=B", "A>B", "A>B", "B>>A"]
    assert row["Verdicts"].value == 5  # the third prompt has another response, the fourth one null
    assert row["Equal (%)"].value == 80 and row["Same winner (%)"].value == 80
    assert row["Kappa"].value == pytest.approx(cohen_kappa(mine, theirs, VERDICTS))
    assert row["Weighted kappa"].value == pytest.approx(cohen_kappa(mine, theirs, VERDICTS, "linear"))
    assert "first" in row["First judge"].text and "second" in row["Second judge"].text
    scores = cells(table, 0)
    assert (scores["Verdicts"].value, scores["Equal (%)"].value, scores["Kappa"].value) == (2, 100, 1)
    assert agreement(Evidence(collect(list(found.evals[:1]), store))) is None


def measured(store: Store, loss: str, seed: int, responses: str = "reference") -> Artifact:
    """An eval of shifts only, with the figures of the stage."""
    model = publish_train(store, publish_build(store, records=20), loss, seed, 1).pinned()
    return publish(store, [], model, shifts=shift_rows(loss, seed, 20), responses=responses)


def test_shifts_are_means_over_seeds_with_their_spread(store: Store) -> None:
    artifacts = [measured(store, "bnf", 0), measured(store, "bnf", 1), measured(store, "dpo", 0)]
    table = shifts(collect(artifacts, store))
    assert table is not None and [row[0].text for row in table.rows] == ["DPO", "BNF"] and not table.warnings
    figures = [next(iter(one.manifest.summary["tasks"]["shifts"]["models"].values())) for one in artifacts]
    dpo, bnf = cells(table, 0), cells(table, 1)
    assert (
        dpo["Z4 per token"].value == figures[2]["z4_mean"]["mean"]
        and dpo["Z4 per token"].low == figures[2]["z4_mean"]["low"]
    )
    means = [one["ll_sum"]["mean"] for one in figures[:2]]
    assert bnf["Log-likelihood, sum"].value == pytest.approx(np.mean(means))
    assert bnf["Log-likelihood, sum"].sd == pytest.approx(np.std(means, ddof=1))
    assert all(one.ref in bnf["Gini"].title for one in artifacts[:2])


def test_shifts_that_were_measured_in_two_ways_are_warned_of(store: Store) -> None:
    table = shifts(collect([measured(store, "bnf", 0), measured(store, "dpo", 0, "policy")], store))
    assert table is not None
    assert len(table.warnings) == 1 and "responses of the policy: DPO, seed 0" in table.warnings[0]


def test_where_nothing_was_made_there_is_no_table(store: Store) -> None:
    found = collect([publish(store, graded("gsm8k", [1.0]))], store)
    assert (training(found), builds(found), shifts(found), judges(Evidence(found))) == (None,) * 4
