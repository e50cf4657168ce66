"""Table 4: the paper's own numbers give the paper's own ranks; figures are those of the evals; what must not be ranked is not."""

from __future__ import annotations

import json
from statistics import stdev

import numpy as np
import pytest

from bnfctl.artifact import Artifact, Store
from bnfctl.report.collect import collect
from bnfctl.report.document import document_of
from bnfctl.report.measure import Measure
from bnfctl.report.sources import Method, Run
from bnfctl.report.standing import half_up, standing
from bnfctl.report.table import DASH, Cell, Table
from bnfctl.tasks.seeds import mean_over_seeds
from bnfctl.tasks.statistics import Estimate, wilson
from bnfctl.tasks.wildbench_pairs import REFERENCES
from tests.report.evals import BASE, arena, graded, judge, pairs, publish, wild
from tests.report.page_world import publish_build, publish_train

METRICS = ("Elo", "Score", "LC", "WR", "GSM8K", "MATH", "CRUX", "MMLU")
PAPER = {
    "Meta-Llama-3-8B-Instruct": """
        Base 1131 (8) 29.2 (8) 33.9 (8) 36.1 (8) 78.5 (3) 6.8 (7) 38.1 (3) 62.4 (3) 6.00
        SLiC-HF 1142 (6) 33.2 (7) 49.1 (6) 46.3 (6) 66.6 (7) 8.3 (6) 33.9 (6) 61.4 (4) 6.00
        DPO 1155 (1) 39.5 (1) 60.4 (1) 62.2 (1) 70.5 (6) 8.5 (5) 31.8 (8) 56.4 (7) 3.75
        IPO 1146 (5) 36.1 (5) 50.1 (4) 51.3 (4) 79.9 (1) 9.2 (4) 39.2 (1) 59.8 (6) 3.75
        KTO 1139 (7) 34.7 (6) 45.4 (7) 45.8 (7) 78.8 (2) 10.0 (1) 38.9 (2) 63.7 (1) 4.13
        ORPO 1149 (3) 36.2 (4) 49.6 (5) 49.2 (5) 74.8 (5) 9.3 (2) 34.5 (5) 63.5 (2) 3.88
        SimPO 1149 (3) 37.2 (3) 52.2 (3) 52.5 (2) 56.6 (8) 6.0 (8) 32.6 (7) 55.0 (8) 5.25
        BNF 1153 (2) 37.5 (2) 54.8 (2) 52.1 (3) 77.0 (4) 9.3 (2) 35.4 (4) 61.4 (4) 2.88""",
    "Mistral-7B-Instruct-v0.2": """
        Base 1098 (8) 25.6 (8) 19.2 (8) 18.9 (8) 42.7 (2) 3.9 (1) 25.1 (2) 53.0 (3) 5.00
        SLiC-HF 1130 (3) 31.2 (2) 28.9 (5) 31.0 (4) 43.6 (1) 2.6 (6) 24.3 (3) 52.1 (6) 3.75
        DPO 1127 (5) 29.7 (6) 29.8 (4) 30.4 (5) 42.2 (4) 3.1 (3) 22.3 (7) 53.2 (2) 4.50
        IPO 1121 (7) 26.9 (7) 25.4 (7) 26.1 (7) 35.8 (7) 3.6 (2) 28.3 (1) 50.7 (8) 5.75
        KTO 1126 (6) 30.2 (5) 27.8 (6) 27.7 (6) 42.6 (3) 2.9 (4) 23.3 (6) 52.8 (4) 5.00
        ORPO 1130 (3) 30.8 (4) 33.4 (3) 34.4 (3) 36.9 (6) 2.9 (4) 23.6 (5) 51.8 (7) 4.38
        SimPO 1133 (1) 32.0 (1) 36.0 (1) 36.6 (1) 33.7 (8) 2.2 (8) 21.4 (8) 52.2 (5) 4.13
        BNF 1131 (2) 31.1 (3) 35.2 (2) 34.5 (2) 39.7 (5) 2.6 (6) 24.3 (3) 54.8 (1) 3.00""",
    "Gemma-2-9b-It": """
        Base 1160 (4) 42.7 (4) 54.9 (4) 54.5 (4) 87.9 (3) 19.9 (3) 44.6 (2) 72.7 (2) 3.25
        DPO 1181 (2) 53.2 (2) 77.3 (2) 81.3 (1) 88.5 (1) 20.2 (2) 44.3 (3) 72.8 (1) 1.75
        SimPO 1181 (2) 53.3 (1) 72.6 (3) 75.4 (3) 87.7 (4) 18.2 (4) 41.4 (4) 72.6 (4) 3.13
        BNF 1186 (1) 53.2 (2) 77.5 (1) 80.8 (2) 88.0 (2) 21.8 (1) 45.3 (1) 72.7 (2) 1.50""",
}
"""Table 4 of arXiv 2410.04834v2."""


@pytest.mark.parametrize("base", PAPER)
def test_the_papers_numbers_give_the_papers_ranks(base: str) -> None:
    rows = [line.split() for line in PAPER[base].strip().splitlines()]
    methods = [method(words[0]) for words in rows]
    measures = [
        constant(name, methods, [float(words[1 + 2 * m]) for words in rows], int(m > 0))
        for m, name in enumerate(METRICS)
    ]
    table = standing("main", base, methods, measures)
    for words, row in zip(rows, table.rows, strict=True):
        assert row[0].text == words[0]
        assert [cell.text for cell in row[1:9]] == words[1:17:2]
        assert [f"({cell.rank:.0f})" for cell in row[1:9]] == words[2:17:2], words[0]
        assert row[9].text == words[17], words[0]
    assert [row[0].text for row in table.rows if row[9].best] == ["BNF"]


def test_the_papers_pairing_ratios_have_the_papers_average_ranks() -> None:
    """Table 6: its last column."""
    figures = {
        "Base": (1131, 29.2, 33.9, 36.1, 78.5, 6.8, 38.1, 62.4), "0%": (1146, 36.0, 49.3, 48.4, 80.1, 9.4, 35.6, 62.2),
        "25%": (1148, 36.2, 51.5, 49.7, 77.9, 9.3, 36.7, 61.8), "50%": (1148, 36.7, 53.5, 51.4, 76.4, 10.0, 37.9, 61.2),
        "100%": (1153, 37.5, 54.8, 52.1, 77.0, 9.3, 35.4, 61.4),
    }  # fmt: skip
    methods = [method(label) for label in figures]
    columns = zip(*figures.values(), strict=True)
    measures = [
        constant(name, methods, list(one), int(m > 0))
        for m, (name, one) in enumerate(zip(METRICS, columns, strict=True))
    ]
    table = standing("pairing", "t", methods, measures)
    assert [row[9].text for row in table.rows] == ["3.63", "3.13", "2.88", "2.63", "2.50"]


def method(label: str, seeds: int = 1, base: str = "owner/base") -> Method:
    runs = [Run(f"{label}-{seed}", label, label, seed, base, None, (), None, None) for seed in range(seeds)]
    return Method(label, base, tuple(runs))


def constant(name: str, methods: list[Method], figures: list[float], decimals: int = 1) -> Measure:
    """A measure whose items all say the same, so that only its figures count."""
    refs = [run.ref for one in methods for run in one.runs]
    return Measure(
        name, name, name, {ref: Estimate(50, value, value, value) for ref, value in zip(refs, figures, strict=True)},
        lambda counts: np.tile(figures, (len(counts), 1)), 50, name, dict.fromkeys(refs, "eval/x"), decimals=decimals,
    )  # fmt: skip


def test_figures_that_print_alike_share_the_better_rank() -> None:
    methods = [method("a"), method("b"), method("c")]
    table = standing("main", "t", methods, [constant("m", methods, [50.04, 49.96, 40.0])])
    assert [row[1].rank for row in table.rows] == [1, 1, 3]
    assert [row[1].best for row in table.rows] == [True, True, False]


def test_half_goes_up() -> None:
    assert [half_up(x) for x in (4.125, 3.125, 2.875, 1.5)] == ["4.13", "3.13", "2.88", "1.50"]


def test_seeds_become_mean_deviation_and_a_wider_interval() -> None:
    three, one = method("three", 3), method("one")
    refs = [run.ref for run in (*three.runs, *one.runs)]
    scores = [40.0, 44.0, 48.0, 50.0]
    measure = Measure(
        "m", "m", "m", {ref: Estimate(100, score, score - 2, score + 2) for ref, score in zip(refs, scores, strict=True)},
        lambda counts: np.tile(scores, (len(counts), 1)), 100, "m", dict.fromkeys(refs, "eval/x"),
    )  # fmt: skip
    cells = [row[1] for row in standing("main", "t", [three, one], [measure]).rows]
    expected, _ = mean_over_seeds([measure.estimates[ref] for ref in refs[:3]])
    assert cells[0].value == 44 and cells[0].sd == stdev(scores[:3]) == 4
    assert (cells[0].low, cells[0].high) == (expected.low, expected.high) and expected.low < 42
    assert (cells[1].low, cells[1].high, cells[1].sd) == (48, 52, None)
    assert [cell.rank for cell in cells] == [2, 1]


def test_seeds_that_agree_have_the_interval_of_one_of_them(store: Store) -> None:
    """Wilson's is not even about the mean, and what it lacks on one side must not narrow the other."""
    build, one = publish_build(store), wilson([1.0] * 19 + [0.0])
    graded_alike = graded("gsm8k", [1.0] * 19 + [0.0]) + graded("lab-chat", [1.0] * 19 + [0.4])
    seeds = [publish(store, graded_alike, publish_train(store, build, "bnf", seed, 2).pinned()) for seed in (0, 1)]
    (row,) = main_table(seeds, store).rows
    assert (row[1].low, row[1].high, row[1].sd) == (pytest.approx(100 * one.low), pytest.approx(100 * one.high), 0)
    (alone,) = main_table(seeds[:1], store).rows
    assert alone[2].high == 100, "clipped"
    assert (row[2].low, row[2].high) == (pytest.approx(alone[2].low), 100)


def test_a_caption_says_which_intervals_they_are(store: Store) -> None:
    made = [*graded("gsm8k", [1.0, 0.0]), *graded("lab-chat", [0.4, 0.2])]
    assert (
        "interval (Wilson's for right and wrong, normal for mean grades)."
        in main_table([publish(store, made)], store).caption
    )


def world(store: Store, **judges: str) -> list[Artifact]:
    """A base, BNF with two seeds and DPO, on two graded and two judged tasks."""
    build = publish_build(store)
    base = publish(store, rows(3), judged_by=judge(judges.get("base", "stub")))
    found = [base]
    for loss, seed, shift in (("bnf", 0, 5), ("bnf", 1, 6), ("dpo", 0, 4)):
        trained = publish_train(store, build, loss, seed, steps=2).pinned()
        found.append(publish(store, rows(shift), trained, judge(judges.get(loss, "stub")), base))
    return found


def rows(shift: int) -> list[dict[str, object]]:
    """The larger the shift, the better."""
    grades = [float((7 * n) % 10 < shift) for n in range(40)]
    games = ["B>A", "A>>B", "A=B", "B>>A", "A>B"]
    verdicts = [(games[(n * shift) % 5], games[(n + shift) % 4]) for n in range(20)]
    scores = [float(1 + (n * shift) % 9) for n in range(20)]
    return [
        *graded("gsm8k", grades), *graded("lab-chat", [grade / 2 + shift / 20 for grade in grades]),
        *arena(verdicts, [60 + 10 * shift, 150, 90]), *wild(scores),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Artifact], Table]:
    """A world with one judge, and its main table."""
    store = Store(tmp_path_factory.mktemp("standing"))
    artifacts = world(store)
    return artifacts, main_table(artifacts, store)


def main_table(artifacts: list[Artifact], store: Store) -> Table:
    return next(
        table for table in document_of(collect(artifacts, store), draws=100).tables if table.id.startswith("main")
    )


def column(table: Table, group: str, name: str) -> dict[str, Cell]:
    """The cells of a column by the labels of their rows."""
    groups = [heading for heading, count in table.groups for _ in range(count)]
    place = next(n for n, pair in enumerate(zip(groups, table.columns, strict=True)) if pair == (group, name))
    return {row[0].text: row[place] for row in table.rows}


def test_the_tables_figures_are_those_of_the_evals(whole: tuple[list[Artifact], Table]) -> None:
    artifacts, table = whole
    assert [row[0].text for row in table.rows] == ["Base", "DPO", "BNF"]
    assert [heading for heading, _ in table.groups] == ["", "Wild-Bench", "Arena-Hard", "GSM8K", "lab-chat", "Average"]
    dpo = artifacts[3].manifest.summary["tasks"]
    assert not table.warnings
    for group, name, figures in (
        ("GSM8K", "Acc (%)", next(iter(dpo["gsm8k"]["models"].values()))),
        ("lab-chat", "Grade (%)", next(iter(dpo["lab-chat"]["models"].values()))),
    ):
        cell = column(table, group, name)["DPO"]
        bounds = [figures[part] * 100 for part in ("mean", "low", "high")]
        assert [cell.value, cell.low, cell.high] == pytest.approx(bounds, abs=1e-9)
        assert artifacts[3].ref in cell.title
    wr = next(iter(dpo["arena-hard"]["models"].values()))
    assert column(table, "Arena-Hard", "WR (%)")["DPO"].value == pytest.approx(100 * wr["win_rate"]["mean"])
    equal = column(table, "Arena-Hard", "LC equal (%)")["DPO"].value
    assert equal == pytest.approx(100 * wr["lc_equal_length"]["estimate"]["mean"])
    score = next(iter(dpo["wildbench"]["models"].values()))
    assert column(table, "Wild-Bench", "Score")["DPO"].value == pytest.approx(score["macro"]["mean"])
    bnf = column(table, "GSM8K", "Acc (%)")["BNF"]
    assert bnf.value == pytest.approx(55.0) and bnf.sd == pytest.approx(stdev([50, 60]))


def test_pool_relative_figures_are_of_all_models_given(whole: tuple[list[Artifact], Table]) -> None:
    _, table = whole
    elo = column(table, "Wild-Bench", "Elo")
    mean = (elo["Base"].value + elo["DPO"].value + 2 * elo["BNF"].value) / 4
    assert mean == pytest.approx(1000, abs=1e-3)
    assert "pool of the 4 models" in table.caption
    assert column(table, "Arena-Hard", "LC (%)")["BNF"].rank is not None


def test_one_model_has_no_official_length_control_and_no_ranks(store: Store) -> None:
    table = main_table(world(store)[:1], store)
    cell = column(table, "Arena-Hard", "LC (%)")["owner/base"]
    assert cell.text == DASH and "two models or more" in cell.title
    assert column(table, "Arena-Hard", "LC equal (%)")["owner/base"].value is not None
    assert column(table, "Wild-Bench", "Elo")["owner/base"].text == DASH
    assert all(cell.rank is None for row in table.rows for cell in row)


def test_different_judges_are_warned_of_and_never_ranked_together(store: Store) -> None:
    table = main_table(world(store, dpo="other"), store)
    assert any("different judges" in line for line in table.warnings)
    assert any("served_model" in line and "other" in line for line in table.warnings)
    mine = column(table, "Arena-Hard (judge stub)", "WR (%)")
    other = column(table, "Arena-Hard (judge other)", "WR (%)")
    assert mine["DPO"].text == other["Base"].text == other["BNF"].text == DASH
    assert other["DPO"].rank is None
    assert {mine["Base"].rank, mine["BNF"].rank} == {1, 2}
    assert column(table, "GSM8K", "Acc (%)")["DPO"].rank == 2
    assert column(table, "Arena-Hard (judge other)", "LC (%)")["DPO"].text == DASH


def test_different_versions_of_a_protocol_are_warned_of(store: Store) -> None:
    grades = [1.0, 0.0] * 10
    first = publish(store, {"one": graded("gsm8k", grades)}, None)
    second = publish(store, {"two": graded("gsm8k", grades[1:])}, None, version="2")
    table = main_table([first, second], store)
    assert any("different versions" in line for line in table.warnings)
    assert {heading for heading, _ in table.groups} >= {"GSM8K (1)", "GSM8K (2)"}
    assert all(cell.rank is None for row in table.rows for cell in row)


def test_different_items_are_compared_on_those_in_common(store: Store) -> None:
    first = publish(store, {"one": graded("gsm8k", [1.0] * 10 + [0.0] * 30)}, None)
    second = publish(store, {"two": graded("gsm8k", [1.0, 0.0] * 10, first=0)}, None)
    table = main_table([first, second], store)
    assert any("20 that all have" in line for line in table.warnings)
    cells = column(table, "GSM8K", "Acc (%)")
    expected = wilson([1.0] * 10 + [0.0] * 10)
    assert (cells["one"].value, cells["two"].value) == (50, 50)
    assert cells["one"].low == pytest.approx(100 * expected.low)
    third = publish(store, {"three": graded("gsm8k", [1.0] * 5, first=900)}, None)
    table = main_table([first, third], store)
    assert any("no item in common" in line for line in table.warnings)
    assert column(table, "GSM8K", "Acc (%)")["three"].value == 100
    assert column(table, "GSM8K", "Acc (%)")["three"].rank is None


def test_a_model_of_a_file_stands_in_the_table_of_the_only_base(store: Store) -> None:
    build = publish_build(store)
    base = publish(store, [*graded("gsm8k", [1.0, 0.0] * 20), *graded("crux", [0.0] * 8)])
    tuned = publish_train(store, build, "bnf", 0, steps=2).pinned()
    bnf = publish(store, [*graded("gsm8k", [0.0, 1.0, 1.0, 1.0] * 10), *graded("crux", [1.0] * 8)], tuned, base=base)
    table = main_table([bnf, publish(store, {"gpt": graded("gsm8k", [1.0] * 40)}, None)], store)
    assert [row[0].text for row in table.rows] == ["Base", "BNF", "gpt"]
    assert column(table, "GSM8K", "Acc (%)")["gpt"].rank == 1
    average = column(table, "Average", "Rank")
    assert (average["gpt"].text, average["BNF"].value, average["Base"].value) == (DASH, 1.5, 2.5)


def test_ungraded_items_are_left_out_of_their_model_only(store: Store) -> None:
    one = publish(store, {"one": graded("gsm8k", [1.0, None, 0.0, 1.0])}, None)
    two = publish(store, {"two": graded("gsm8k", [1.0, 1.0, 0.0, 0.0])}, None)
    cells = column(main_table([one, two], store), "GSM8K", "Acc (%)")
    assert cells["one"].value == pytest.approx(200 / 3) and cells["two"].value == 50


def test_a_judge_that_gives_no_verdict_leaves_a_dash(store: Store) -> None:
    bad = arena([(None, None)] * 19 + [("A=B", None)])
    fine = arena([("B>A", "A>B")] * 20, [90, 120])
    table = main_table([publish(store, {"bad": bad}, None), publish(store, {"fine": fine}, None)], store)
    cells = column(table, "Arena-Hard", "WR (%)")
    assert cells["bad"].value == 50 and cells["fine"].value == 100


def test_a_model_that_nobody_voted_on_has_no_elo(store: Store) -> None:
    files = {"one": wild([7.0, 3.0]), "two": wild([3.0, 7.0]), "three": wild([None, 5.0])}
    files["three"][1] = wild([None, 5.0], length=0)[1]
    extra = json.loads(files["three"][1]["extra"]) | {"whole": False}
    files["three"][1] = {**files["three"][1], "extra": json.dumps(extra)}
    table = main_table([publish(store, files, None)], store)
    elo = column(table, "Wild-Bench", "Elo")
    assert (elo["one"].value, elo["two"].value) == (pytest.approx(1000), pytest.approx(1000))
    assert elo["three"].text == DASH and "no other model" in elo["three"].title
    assert column(table, "Wild-Bench", "Score")["one"].value == 0


def test_a_fit_that_was_stopped_short_is_said_by_the_models_names(store: Store) -> None:
    build = publish_build(store)
    games = arena([("A>B", "B>A"), ("B>A", "A>B")] * 10, [50, 200])  # the longer response always wins
    runs = [publish_train(store, build, "bnf", seed, 2).pinned() for seed in (0, 1)]
    caption = main_table([publish(store, games, run) for run in runs], store).caption
    assert (
        "LC equal of BNF, seed 0, BNF, seed 1: lengths tell wins from losses without a miss; the fit is stopped short."
        in caption
    )


def test_rewards_of_pairs_are_those_of_the_task(store: Store) -> None:
    given = [("A+", "B++", "A=B"), ("A++", "A=B", "A=B"), ("B+", None, "A=B")] * 4
    choices = [dict(zip(REFERENCES, one, strict=True)) for one in given]
    made = publish(store, {"one": pairs(choices, [1200, 100, 400] * 4)}, None)
    figures = made.manifest.summary["tasks"]["wildbench-pairs"]["models"]["one"]
    table = main_table([made], store)
    # by hand: against the first 0.5, 1, -0.5; against the second -1 and 0, the third 0; the slight win is 700 characters longer
    assert column(table, "Wild-Bench pairs", "Reward")["one"].value == pytest.approx(100 * (1 / 3 - 1 / 2 + 0) / 3)
    assert column(table, "Wild-Bench pairs", "Reward K=500")["one"].value == pytest.approx(
        100 * (0.5 / 3 - 1 / 2 + 0) / 3
    )
    assert figures["mean"] == pytest.approx(column(table, "Wild-Bench pairs", "Reward")["one"].value)


def test_a_model_that_was_evaluated_twice_is_said(store: Store) -> None:
    few = publish(store, graded("gsm8k", [1.0] * 4))
    many = publish(store, graded("gsm8k", [1.0, 0.0] * 4))
    table = main_table([many, few], store)
    assert table.warnings == (f"GSM8K: owner/base is shown from {many.ref}; also in {few.ref}",)
    assert column(table, "GSM8K", "Acc (%)")["owner/base"].value == 50
    again = publish(store, graded("gsm8k", [1.0, 0.0] * 4), seed=1)
    assert again.ref != many.ref and not main_table([many, again], store).warnings


def test_pairing_ratios_make_a_table_of_their_own(store: Store) -> None:
    base = publish(store, rows(3))
    artifacts = [base]
    for ratio, shift in ((1.0, 6), (0.5, 5), (0.0, 4)):
        trained = publish_train(store, publish_build(store, ratio=ratio, records=50 + shift), "bnf", 0, steps=2)
        artifacts.append(publish(store, rows(shift), trained.pinned(), base=base))
    tables = {table.id: table for table in document_of(collect(artifacts, store), draws=100).tables}
    assert [row[0].text for row in tables["pairing"].rows] == ["Base", "0%", "50%", "100%"]
    assert [row[0].text for row in tables["main"].rows[1:]] == ["BNF (100% pairs)", "BNF (50% pairs)", "BNF (0% pairs)"]
    acc = column(tables["pairing"], "GSM8K", "Acc (%)")
    assert [acc[label].value for label in ("Base", "0%", "50%", "100%")] == [30, 40, 50, 60]
    assert [acc[label].rank for label in ("Base", "0%", "50%", "100%")] == [4, 3, 2, 1]
    assert tables["pairing"].groups[-1] == ("Average", 1)


def test_the_pinned_base_is_named_without_its_commit(store: Store) -> None:
    assert BASE.ref == "owner/base@5f0b02c75b57"
    assert collect([publish(store, graded("gsm8k", [1.0]))], store).methods[0].label == "owner/base"
