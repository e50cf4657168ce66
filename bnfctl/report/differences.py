"""Differences between methods on the same items: never read off two separate intervals.

Grades: the mean paired difference of the items.  Judged figures: both refitted on the same resamples of prompts.  Several
seeds: the figures are averaged over them first, and their spread widens the interval.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bnfctl.evaluation.figures import MOST
from bnfctl.evaluation.shown import p_text
from bnfctl.report.measure import Measure
from bnfctl.report.sources import Method
from bnfctl.report.standing import figure_of
from bnfctl.report.table import DASH, Cell, Table, finite, fixed, number
from bnfctl.tasks.paired import Difference, McNemar, bootstrapped, difference, holm, mcnemar, p_of
from bnfctl.tasks.seeds import error_of
from bnfctl.tasks.statistics import Array, Bootstrap, detectable_difference

COLUMNS = ("Benchmark", "Methods", "Difference", "p", "p (Holm)", "Detectable")
MCNEMAR = ("Right alone", "p (McNemar)")
"""More columns, where a test of the table has them."""
CAPTION = (
    "First minus second on the same items, in the units of the main table, with its 95 % interval. p is two-sided; Holm's p "
    "accounts for {tests} in this table: below 0.05 (bold) it holds for all of them together. Detectable: the smallest true "
    "difference that would be found with 80 % power here."
)
ALONE = " Right alone: items that one method alone got right, the first's : the second's, and McNemar's exact p (one seed each only)."
SEEDS = (
    " Several training seeds: means over them, and their spread is in the interval and in p (Student's t); where two seeds differ "
    "by more than the items explain, both still say somewhat too much. Of a method with one seed the spread is not known, and not "
    "in them."
)


@dataclass(frozen=True)
class Compared:
    """One test."""

    measure: Measure
    first: Method
    second: Method
    found: Difference
    counts: McNemar | None


def against_base(name: str, title: str, methods: Sequence[Method], measures: Sequence[Measure]) -> Table | None:
    """Every method minus the base; None where there is nothing to compare."""
    bases = [method for method in methods if method.is_base]
    pairs = [(method, base) for base in bases for method in methods if method is not base]
    return _table(name, title, pairs, measures)


def between(name: str, title: str, methods: Sequence[Method], measures: Sequence[Measure]) -> Table | None:
    """Every pair of methods; None where there is nothing to compare, and for more than MOST methods."""
    others = [one for one in methods if not one.is_base]
    return _table(name, title, list(itertools.combinations(others, 2)), measures) if len(others) <= MOST else None


def _table(name: str, title: str, pairs: Sequence[tuple[Method, Method]], measures: Sequence[Measure]) -> Table | None:
    tests = [test for measure in measures for pair in pairs if (test := compared(measure, *pair)) is not None]
    if not tests:
        return None
    adjusted = holm({str(place): test.found.p for place, test in enumerate(tests)})
    counted = any(test.counts for test in tests)
    columns = (*COLUMNS, *(MCNEMAR if counted else ()))
    rows = [_row(test, adjusted[str(place)])[: len(columns)] for place, test in enumerate(tests)]
    said = CAPTION.format(tests="the one test" if len(tests) == 1 else f"all {len(tests)} tests")
    said += ALONE if counted else ""
    said += SEEDS if any(len(method.runs) > 1 for pair in pairs for method in pair) else ""
    return Table(name, title, said, columns, tuple(rows))


def compared(measure: Measure, first: Method, second: Method) -> Compared | None:
    """The test of one figure; None where one of the two has none, or they have no items in common."""
    if measure.statistic is None or figure_of(measure, first) is None or figure_of(measure, second) is None:
        return None
    counts = None
    if measure.grades is not None:
        mine, theirs = (_mean_grades(measure, method) for method in (first, second))
        known = ~(np.isnan(mine) | np.isnan(theirs))
        if not known.any():
            return None
        found = difference(mine[known].tolist(), theirs[known].tolist())
        if measure.binary and len(first.runs) == len(second.runs) == 1:
            counts = mcnemar(mine[known].tolist(), theirs[known].tolist())
    else:
        assert measure.resampled is not None
        found = bootstrapped(_minus(measure, measure.resampled, first, second))
    return Compared(measure, first, second, _with_seeds(found, measure, first, second), counts)


def _minus(measure: Measure, found: Bootstrap, first: Method, second: Method) -> Bootstrap:
    """first - second in the data and in every resample, each the mean over the method's runs."""
    mine, theirs = (_columns(measure, method) for method in (first, second))
    point, values = (part[..., mine].mean(-1) - part[..., theirs].mean(-1) for part in (found.point, found.values))
    return Bootstrap(found.n, point, values)


def _columns(measure: Measure, method: Method) -> list[int]:
    """The places of the method's runs among the measure's."""
    place = {ref: r for r, ref in enumerate(measure.estimates)}
    return [place[run.ref] for run in method.runs if run.ref in place]


def _mean_grades(measure: Measure, method: Method) -> Array:
    """[K] over the method's runs; NaN for an item that some run has no grade for."""
    assert measure.grades is not None
    return measure.grades[_columns(measure, method)].mean(0)


def _with_seeds(found: Difference, measure: Measure, first: Method, second: Method) -> Difference:
    """The difference for new seeds too: their variance is added to that of the items."""
    figures = [figure_of(measure, method) for method in (first, second)]
    spreads = [figure.spread for figure in figures if figure is not None and figure.spread is not None]
    if not spreads:
        return found
    error = error_of(0.0 if math.isnan(found.standard_error) else found.standard_error, spreads)
    half, power = error.t95 * error.size, detectable_difference(error.size, t95=error.t95)
    p = p_of(found.mean, error.size, found.n, error.degrees)
    return Difference(found.n, found.mean, found.mean - half, found.mean + half, p, error.size, power)


def _row(test: Compared, adjusted: float) -> tuple[Cell, ...]:
    found, decimals = test.found, test.measure.decimals + 1
    refs = [run.ref for method in (test.first, test.second) for run in method.runs]
    title = f"{found.n} items; " + "; ".join(test.measure.sources[ref] for ref in refs if ref in test.measure.sources)
    alone = exact = Cell(DASH, title="for right and wrong, and one seed each")
    if test.counts is not None:
        alone = Cell(f"{test.counts.first_only} : {test.counts.second_only}", title=title)
        exact = Cell(p_text(test.counts.p), test.counts.p, title=title)
    low, high = finite(found.low, found.high)
    if test.measure.share and low is not None and high is not None:
        low, high = max(-100.0, low), min(100.0, high)
    return (
        Cell(test.measure.full_name), Cell(f"{test.first.label} - {test.second.label}"),
        Cell(fixed(found.mean, decimals, "+"), found.mean, low, high, title=title), Cell(p_text(found.p), found.p, title=title),
        Cell(p_text(adjusted), adjusted, title=title, best=adjusted < 0.05),
        number(found.detectable or None, decimals, title), alone, exact,
    )  # fmt: skip
