"""Differences between methods: the numbers of tasks/paired.py, corrected over the whole table, with the seeds' spread."""

from __future__ import annotations

import math

import pytest

from bnfctl.artifact import Store
from bnfctl.evaluation.shown import p_text
from bnfctl.report.collect import collect
from bnfctl.report.differences import COLUMNS, MCNEMAR, MOST, SEEDS, against_base, between
from bnfctl.report.document import document_of
from bnfctl.report.evidence import Evidence
from bnfctl.report.measures import measures_of
from bnfctl.report.sources import Sources
from bnfctl.report.table import DASH, Table
from bnfctl.tasks import paired
from bnfctl.tasks.seeds import error_of, over_seeds
from bnfctl.tasks.statistics import Z95
from tests.report.evals import arena, graded, publish
from tests.report.page_world import publish_build, publish_train

BASE = [float(n % 3 == 0) for n in range(60)]
BNF = [[float(n % 2 == 0) for n in range(60)], [float(n % 2 == 0 or n % 9 == 0) for n in range(60)]]
DPO = [float(n % 5 < 3) for n in range(60)]
GAMES = {"base": "A>B", "bnf": "A=B", "dpo": "B>>A"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, Table]:
    """Against the base, and between methods."""
    return tables(sources(Store(tmp_path_factory.mktemp("differences"))))


def sources(store: Store) -> Sources:
    build = publish_build(store, records=30)
    base = publish(store, [*graded("gsm8k", BASE), *judged("base"), *graded("lab-chat", BASE)])
    found = [base]
    for loss, seed, grades in (("bnf", 0, BNF[0]), ("bnf", 1, BNF[1]), ("dpo", 0, DPO)):
        trained = publish_train(store, build, loss, seed, steps=1).pinned()
        rows = [*graded("gsm8k", grades), *judged(loss), *graded("lab-chat", grades)]
        found.append(publish(store, rows, trained, base=base))
    return collect(found, store)


def judged(loss: str) -> list[dict[str, object]]:
    return arena([(GAMES[loss], "A=B" if n % 4 else "B>A") for n in range(24)], [80, 130, 100])


def tables(found: Sources) -> tuple[Table, Table]:
    methods = found.methods
    measures, _ = measures_of(Evidence(found, draws=200), [run for method in methods for run in method.runs])
    first, second = against_base("a", "a", methods, measures), between("b", "b", methods, measures)
    assert first is not None and second is not None
    return first, second


def test_a_difference_is_the_paired_one_and_mcnemars_counts_are_right(made: tuple[Table, Table]) -> None:
    first, _ = made
    row = next(row for row in first.rows if [cell.text for cell in row[:2]] == ["GSM8K Acc (%)", "DPO - Base"])
    expected = paired.difference([100 * x for x in DPO], [100 * x for x in BASE])
    assert [row[2].value, row[2].low, row[2].high] == pytest.approx([expected.mean, expected.low, expected.high])
    assert row[3].value == pytest.approx(expected.p) and row[5].value == pytest.approx(expected.detectable)
    exact = paired.mcnemar(DPO, BASE)
    assert row[6].text == f"{exact.first_only} : {exact.second_only}" and row[7].value == exact.p
    graded_only = next(row for row in first.rows if row[0].text == "lab-chat Grade (%)")
    assert graded_only[6].text == graded_only[7].text == DASH


def test_holm_counts_every_test_of_the_table(made: tuple[Table, Table]) -> None:
    for table in made:
        p_values = {str(n): row[3].value or 0.0 for n, row in enumerate(table.rows)}
        assert [row[4].value for row in table.rows] == pytest.approx(list(paired.holm(p_values).values()))
        assert f"all {len(table.rows)} tests" in table.caption
        assert [row[4].best for row in table.rows] == [(row[4].value or 0) < 0.05 for row in table.rows]
    first, second = made
    assert first.columns == (*COLUMNS, *MCNEMAR) and second.columns == COLUMNS, (
        "no test of the second has one seed each"
    )
    assert len(first.rows) == 2 * len(second.rows)  # two methods against the base, one pair between them


def test_seeds_widen_the_interval(made: tuple[Table, Table]) -> None:
    first, _ = made
    row = next(row for row in first.rows if [cell.text for cell in row[:2]] == ["GSM8K Acc (%)", "BNF - Base"])
    mean = [100 * (a + b) / 2 for a, b in zip(*BNF, strict=True)]
    items = paired.difference(mean, [100 * x for x in BASE])
    error = error_of((items.high - items.mean) / Z95, [over_seeds([100 * sum(one) / 60 for one in BNF])])
    assert row[2].value == pytest.approx(items.mean)
    assert row[2].high == pytest.approx(items.mean + error.t95 * error.size, rel=1e-5)
    assert error.t95 > Z95 and row[7].value is None


def test_judged_figures_are_refitted_on_the_same_resamples(made: tuple[Table, Table]) -> None:
    _, second = made
    row = next(row for row in second.rows if row[0].text == "Arena-Hard WR (%)")
    assert row[1].text == "DPO - BNF"
    # dpo: 3 of 4 games at "B>>A" (three votes) and ties; bnf: ties and some slight losses, by hand
    dpo = (18 * (3 + 0.5) + 6 * (3 + 0)) / (24 * 4)
    bnf = (18 * (0.5 + 0.5) + 6 * (0.5 + 0)) / (24 * 2)
    assert row[2].value == pytest.approx(100 * (dpo - bnf))
    assert row[3].value is not None and row[3].value < 0.02 and (row[2].low or 0) > 0


def test_one_item_says_nothing_however_many_seeds_agree(store: Store) -> None:
    build = publish_build(store, records=10)
    base = publish(store, [*graded("gsm8k", [0.0]), *arena([("A>B", "A>B")])])
    runs = [publish_train(store, build, "bnf", seed, steps=1).pinned() for seed in (0, 1)]
    evals = [publish(store, [*graded("gsm8k", [1.0]), *arena([("B>A", "B>A")])], run, base=base) for run in runs]
    methods = collect(evals, store).methods
    measures, _ = measures_of(Evidence(collect(evals, store), draws=50), [run for one in methods for run in one.runs])
    table = against_base("a", "a", methods, measures)
    assert table is not None and [row[3].value for row in table.rows] == [1.0] * len(table.rows)
    assert SEEDS in table.caption


def test_what_has_no_interval_is_shown_without_one(store: Store) -> None:
    found = sources(store)
    measures, _ = measures_of(Evidence(found, draws=20), [run for method in found.methods for run in method.runs])
    rate = next(one for one in measures if one.name == "WR (%)")
    assert rate.resampled is not None
    rate.resampled.values[:] = math.nan
    table = against_base("a", "a", [method for method in found.methods if len(method.runs) == 1], [rate])
    assert table is not None
    (row,) = table.rows
    assert (row[2].low, row[2].high, row[5].text) == (None, None, DASH)


def test_too_many_methods_are_not_compared_two_by_two(store: Store) -> None:
    grades = {f"m{n}": graded("gsm8k", [1.0, 0.0]) for n in range(MOST + 1)}
    found = document_of(collect([publish(store, grades, None)], store), draws=20)
    assert [table.id for table in found.tables] == ["main", "lengths"]
    assert between("b", "b", found.sources.methods, []) is None
    assert found.notes == (
        f"More than {MOST} methods are not compared two by two: too many tests to read and to correct for.",
    )
    del grades["m0"]
    assert "between" in [
        table.id for table in document_of(collect([publish(store, grades, None)], store), draws=20).tables
    ]


def test_without_a_base_or_a_second_method_there_is_no_table(store: Store) -> None:
    alone = collect([publish(store, graded("gsm8k", BASE))], store)
    measures, _ = measures_of(Evidence(alone), [run for method in alone.methods for run in method.runs])
    assert against_base("a", "a", alone.methods, measures) is None
    assert between("b", "b", alone.methods, measures) is None


def test_p_values_have_an_end() -> None:
    assert [p_text(p) for p in (0.0, 0.00012, 0.034, 0.5, 1.0)] == ["< 0.0001", "0.00012", "0.034", "0.50", "1.00"]
