"""Table 4 of the paper: methods against benchmarks, each figure with its rank and interval, and the average rank.

Ranks are of the figures as they are printed, and equal ones share the better rank: that is how the paper's table has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal

import numpy as np

from bnfctl.report.measure import Measure
from bnfctl.report.methods import settings
from bnfctl.report.sources import Method
from bnfctl.report.table import DASH, Cell, Table, finite, fixed
from bnfctl.tasks.average_rank import Metric, Ties, average_rank, ranks
from bnfctl.tasks.seeds import Spread, mean_over_seeds
from bnfctl.tasks.statistics import Array, Estimate, Statistic

TIES: Ties = "min"
CAPTION = "In parentheses the rank among the rows, of the figures as printed; in brackets the 95 % interval{kinds}."
KINDS = {
    "wilson": "Wilson's for right and wrong",
    "normal": "normal for mean grades",
    "bootstrap": "resampled prompts for judged figures",
}
AVERAGE = " Average rank: the mean over the ranked columns; its interval resamples the items of each benchmark and ranks all again."
SEEDS = (
    " Several training seeds: mean ± standard deviation over seeds; the interval (Student's t) is for new items and new seeds, and "
    "where two seeds differ by more than the items explain it is still somewhat narrow. The average rank's is for new items only."
)


@dataclass(frozen=True)
class Figure:
    """A method's figure: the mean over its seeds."""

    estimate: Estimate
    spread: Spread | None
    """None for one run."""


def figure_of(measure: Measure, method: Method) -> Figure | None:
    """What a method has in a measure; None where none of its runs has a figure."""
    each = [measure.estimates[run.ref] for run in method.runs if run.ref in measure.estimates]
    if not each:
        return None
    if len(each) == 1:
        return Figure(each[0], None)
    one, spread = mean_over_seeds(each)
    if measure.share:
        one = replace(one, low=max(0.0, one.low), high=min(100.0, one.high))
    return Figure(one, spread)


def statistic_of(measure: Measure, methods: Sequence[Method]) -> Statistic:
    """Counts [b, C] -> the methods' figures [b, M], each the mean over its runs; NaN for a method without one."""
    place = {ref: r for r, ref in enumerate(measure.estimates)}
    columns = [[place[run.ref] for run in method.runs if run.ref in place] for method in methods]
    statistic = measure.statistic
    assert statistic is not None

    def of(counts: Array) -> Array:
        found = statistic(counts)
        none = np.full(len(counts), np.nan)
        return np.stack([found[:, mine].mean(1) if mine else none for mine in columns], axis=1)

    return of


def standing(
    name: str, title: str, methods: Sequence[Method], measures: Sequence[Measure], warnings: Sequence[str] = (),
    first: str = "Method", labels: Sequence[str] = (), about: str = "",
) -> Table:  # fmt: skip
    """The table of these methods.  labels: of the rows, where they are not the methods'; first: what those are."""
    columns = [_column(measure, methods) for measure in measures]
    rows = [[Cell(label)] for label in labels or [method.label for method in methods]]
    for column in columns:
        for row, cell in zip(rows, column, strict=True):
            row.append(cell)
    groups, names = _groups(measures), [first, *(measure.name for measure in measures)]
    counted = _counted(methods, measures)
    if counted:
        groups, names = (*groups, ("Average", 1)), [*names, "Rank"]
        for row, cell in zip(rows, _average(methods, counted), strict=True):
            row.append(cell)
    notes = list(dict.fromkeys(note for measure in measures for note in measure.notes))
    left = [one.full_name for one in measures if one.counted and one not in counted]
    if left and counted:
        notes.append(f"Not in the average rank, since rows have no figure there: {', '.join(left)}.")
    several = any(len(method.runs) > 1 for method in methods)
    kinds = dict.fromkeys(KINDS[one.interval] for one in measures)
    said = CAPTION.format(kinds=f" ({', '.join(kinds)})" if kinds else "")
    caption = " ".join(filter(None, [about, said + (AVERAGE if counted else "") + (SEEDS if several else ""), *notes]))
    return Table(name, title, caption, tuple(names), tuple(map(tuple, rows)), tuple(warnings), (("", 1), *groups))


def _counted(methods: Sequence[Method], measures: Sequence[Measure]) -> list[Measure]:
    """The measures of the average rank: those that all rows have, of the rows with the most of them; rows with fewer
    get no average.  None for fewer than two rows to rank."""
    has = [
        [bool(one.counted and one.statistic is not None and figure_of(one, method)) for one in measures]
        for method in methods
    ]
    most = max((sum(mine) for mine in has), default=0)
    full = [mine for mine in has if sum(mine) == most and most]
    if len(full) < 2:
        return []
    return [measure for measure, *rows in zip(measures, *full, strict=True) if all(rows)]


def _groups(measures: Sequence[Measure]) -> tuple[tuple[str, int], ...]:
    groups: list[tuple[str, int]] = []
    for measure in measures:
        if groups and groups[-1][0] == measure.group:
            groups[-1] = (measure.group, groups[-1][1] + 1)
        else:
            groups.append((measure.group, 1))
    return tuple(groups)


def _column(measure: Measure, methods: Sequence[Method]) -> list[Cell]:
    figures = [figure_of(measure, method) for method in methods]
    points = np.array([np.nan if one is None else np.round(one.estimate.mean, measure.decimals) for one in figures])
    comparable = measure.statistic is not None and np.isfinite(points).sum() > 1
    places = ranks(points, ties=TIES) if comparable else np.full(len(points), np.nan)
    cells = []
    for method, figure, place in zip(methods, figures, places.tolist(), strict=True):
        if figure is None:
            reasons = [measure.why[run.ref] for run in method.runs if run.ref in measure.why]
            cells.append(Cell(DASH, title=reasons[0] if reasons else "not evaluated"))
        else:
            cells.append(_cell(measure, method, figure, None if np.isnan(place) else place))
    return cells


def _cell(measure: Measure, method: Method, figure: Figure, rank: float | None) -> Cell:
    one = figure.estimate
    sources = [measure.sources[run.ref] for run in method.runs if run.ref in measure.estimates]
    lacking = [run.title for run in method.runs if run.ref not in measure.estimates]
    title = f"{one.n} items; {'; '.join(sources)}" + (f"; without {', '.join(lacking)}" if lacking else "")
    low, high = finite(one.low, one.high)
    sd = figure.spread.sd if figure.spread else None
    text = fixed(float(np.round(one.mean, measure.decimals)), measure.decimals)  # rounded as `average_rank` does it
    return Cell(text, one.mean, low, high, rank, title, sd, best=rank == 1)


def _average(methods: Sequence[Method], measures: Sequence[Measure]) -> list[Cell]:
    names = [str(number) for number in range(len(methods))]
    metrics = [
        Metric(one.full_name, statistic_of(one, methods), one.clusters, one.items, decimals=one.decimals)
        for one in measures
    ]
    found = average_rank(names, metrics, TIES, min(one.draws for one in measures))
    means = [found[name].average for name in names]
    best = min(round(one.mean, 2) for one in means if np.isfinite(one.mean))
    title = f"mean of the ranks in {', '.join(one.full_name for one in measures)}"
    return [
        Cell(half_up(one.mean), one.mean, one.low, one.high, title=title, best=round(one.mean, 2) == best)
        if np.isfinite(one.mean)
        else Cell(DASH, title=f"not evaluated on all of {', '.join(one.full_name for one in measures)}")
        for one in means
    ]


def half_up(value: float) -> str:
    """To two digits; eighths end in a five, which goes up, as in the paper."""
    return str(Decimal(value).quantize(Decimal("0.01"), ROUND_HALF_UP))


def by_ratio(methods: Sequence[Method]) -> list[list[Method]]:
    """Methods that differ in the pairing ratio of their data and in nothing else: families of two ratios or more.

    Of one ratio, where that is not 100 %, too.
    """
    families: dict[str, list[Method]] = {}
    for method in methods:
        run = method.runs[0]
        if run.pairing_ratio is not None and run.build is not None:
            built = {name: value for name, value in settings(run.build).items() if name != "pairing_ratio"}
            inputs = sorted((name, raw["digest"]) for name, raw in run.build.manifest.inputs.items())
            families.setdefault(repr((settings(run.train), built, inputs)), []).append(method)
    ordered = [sorted(family, key=lambda one: one.runs[0].pairing_ratio or 0.0) for family in families.values()]
    return [one for one in ordered if len(one) > 1 or one[0].runs[0].pairing_ratio != 1]


def relabelled(method: Method, label: str) -> Method:
    """The same runs under another label."""
    return replace(method, label=label)
