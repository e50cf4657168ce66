"""Figures 3a to 3f and 4 of the paper: how far each method moved its model from the reference, and on which tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bnfctl import shards
from bnfctl.analysis.distributions import BINS, Numbers, mean_over_prompts, pearson, spearman
from bnfctl.artifact import Artifact
from bnfctl.evaluation import shifting
from bnfctl.report.figures_svg import (
    DASHES,
    INK,
    MARKERS,
    Draw,
    Figure,
    Line,
    by_base,
    legend,
    panel,
    panels,
    series,
    short,
)
from bnfctl.report.sources import Run, Sources

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 300
"""Of a method in the scatter: drawn evenly from its responses; correlations are of all of them."""
_WIDTH = 312
"""Of a panel whose labels are long: it stands in a third of a wide page."""
_SPREAD = (5, 25, 50, 75, 95)
_COLUMNS = ["prompt_id", "sequence", "cut", "ll_sum", "ll_mean", "z2_sum", "z2_mean", "gini", "token_ll"]
_LL = "log π − log π_ref of the response's tokens under the policy and under its reference"
_Z2 = "|z − z_ref|, how far the logit of each of the response's tokens moved either way"


@dataclass(frozen=True, eq=False)
class Measured:
    """A method's responses, one table of `analysis.shifts.SCHEMA` per seed."""

    line: Line
    seeds: tuple[pa.Table, ...]
    references: frozenset[str]

    def column(self, name: str) -> Numbers:
        """[n] of all seeds."""
        return np.concatenate([seed[name].to_numpy() for seed in self.seeds])

    @property
    def prompts(self) -> list[str]:
        return [prompt for seed in self.seeds for prompt in seed["prompt_id"].to_pylist()]


def figures(sources: Sources) -> list[Figure]:
    """A set per base model whose methods were measured."""
    found: list[Figure] = []
    for place, of, lines in by_base(sources):
        measured = [one for one in map(_measured, lines) if one.seeds]
        found += _figures(measured, place, of) if measured else []
    return found


def _measured(line: Line) -> Measured:
    found = [made for made in (_shifts(run) for run in line.method.runs) if made is not None]
    references = frozenset(str(made.manifest.summary["tasks"]["shifts"].get("reference")) for made in found)
    return Measured(line, tuple(_table(made) for made in found), references)


def _shifts(run: Run) -> Artifact | None:
    """The first eval of a run that measured shifts; it measured one model."""
    for made in run.evals:
        if any(entry["path"].startswith(f"{shifting.FOLDER}/") for entry in made.manifest.files):
            return made
    return None


def _table(made: Artifact) -> pa.Table:
    return pa.concat_tables(shards.read_table(path, _COLUMNS) for path in made.shards(shifting.FOLDER))


def _figures(measured: Sequence[Measured], place: str, of: str) -> list[Figure]:
    note = _note(measured)
    found = []
    for id_, title, column, caption, axis in _SPREADS:
        if id_ == "figure-3d":
            found.append(_scatter(measured, place, of, note))
        rows = [_spread(one, column) for one in measured]
        numbers = (_HEADER, *(tuple(row.texts()) for row in rows))
        picture = panel(
            f"{id_}{place}", _boxes(rows, axis), f"{title}, by method.", width=_WIDTH, height=68 + 27 * len(rows)
        )
        text = f"{caption}  {_BOXES}{_SEEDS if any(len(one.seeds) > 1 for one in measured) else ''}{note}"
        found.append(Figure(f"{id_}{place}", title + of, text, _alt(rows), picture, "shifts", numbers))
    return [*found, *_bins(measured, place, of, note)]


_SPREADS = (
    ("figure-3a", "3a. Log-likelihood shifts", "ll_sum", f"Sum of {_LL}.", "nats per response"),
    ("figure-3b", "3b. Absolute logit shifts", "z2_sum", f"Sum of {_Z2} (reading Z2).", "logits per response"),
    ("figure-3d", "3d. Log-likelihood shifts per token", "ll_mean", f"Mean of {_LL}.", "nats per token"),
    ("figure-3e", "3e. Absolute logit shifts per token", "z2_mean", f"Mean of {_Z2} (reading Z2).", "logits per token"),
    (
        "figure-3f", "3f. Gini coefficients of the logit shifts", "gini",
        "How unevenly a response's absolute logit shifts are spread over its tokens: 0 is evenly, (T − 1) / T all on one.",
        "Gini coefficient of a response",
    ),
)  # fmt: skip
_BOXES = "Dot: mean, 95 % interval (normal, prompts as clusters).  Box: quartiles and median; line: 5 % to 95 %."
_SEEDS = (
    "  Ticks under a box: the mean of each seed; how far they differ is not in the interval, but in that of the table."
)
_HEADER = ("method", "seeds", "n", "mean", "95 % interval", *(f"{share} %" for share in _SPREAD))


def _note(measured: Sequence[Measured]) -> str:
    counts = [len(one.prompts) for one in measured]
    n = f"{min(counts):,} to {max(counts):,}" if min(counts) < max(counts) else f"{counts[0]:,}"
    references = sorted({reference for one in measured for reference in one.references})
    note = f"  n = {n} responses per method"
    note += ", seeds pooled" if any(len(one.seeds) > 1 for one in measured) else ""
    cut = [float(np.mean([bool(c) for c in seed["cut"].to_pylist()])) for one in measured for seed in one.seeds]
    note += f", up to {max(cut):.0%} of a model's cut at the limit of tokens" if max(cut) else ""
    return f"{note}; reference: {', '.join(references)}."


@dataclass(frozen=True, eq=False)
class _Spread:
    """One method's numbers of a column."""

    line: Line
    seeds: tuple[float, ...]
    """Means of the seeds."""
    n: int
    mean: float
    low: float
    high: float
    percentiles: tuple[float, ...]

    def texts(self) -> list[str]:
        interval = f"{self.low:.3g} to {self.high:.3g}"
        rest = [f"{value:.3g}" for value in self.percentiles]
        return [self.line.label, str(len(self.seeds)), str(self.n), f"{self.mean:.3g}", interval, *rest]


def _spread(one: Measured, column: str) -> _Spread:
    values = one.column(column)
    mean = mean_over_prompts(values.tolist(), one.prompts)
    seeds = tuple(float(seed[column].to_numpy().mean()) for seed in one.seeds)
    percentiles = tuple(np.percentile(values, _SPREAD).tolist())
    return _Spread(one.line, seeds, mean.n, mean.mean, mean.low, mean.high, percentiles)


def _alt(rows: Sequence[_Spread]) -> str:
    said = [
        f"{row.line.label}: mean {row.mean:.3g} [{row.low:.3g}, {row.high:.3g}], median {row.percentiles[2]:.3g}"
        for row in rows
    ]
    return "; ".join(said) + "."


def _boxes(rows: Sequence[_Spread], axis: str) -> Draw:
    def draw(axes: Axes) -> None:
        for place, row in enumerate(rows):
            colour, y = series(row.line.index), len(rows) - 1 - place
            first, low, middle, high, last = row.percentiles
            axes.plot([first, last], [y, y], color=colour, linewidth=1.4, solid_capstyle="round")
            axes.barh(y, high - low, 0.46, low, facecolor=colour, alpha=0.3, linewidth=0)
            axes.plot([middle, middle], [y - 0.23, y + 0.23], color=colour, linewidth=1.6)
            axes.plot([row.low, row.high], [y, y], color=INK, linewidth=3, solid_capstyle="butt")
            axes.plot(row.mean, y, "o", color=INK, markersize=5, markeredgewidth=0)
            if len(row.seeds) > 1:
                axes.plot(row.seeds, [y - 0.36] * len(row.seeds), "|", color=INK, markersize=5, markeredgewidth=1)
        axes.set_yticks(range(len(rows)), [short(row.line.label) for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        low, high = axes.get_xlim()
        if low < 0 < high:
            axes.axvline(0, color=INK, linewidth=0.7, zorder=1)
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(axis)

    return draw


def _scatter(measured: Sequence[Measured], place: str, of: str, note: str) -> Figure:
    """3c: one panel per method, all with the same axes."""
    points = [(one, one.column("ll_mean"), one.column("z2_mean")) for one in measured]
    limits = [_limits(np.concatenate([column[axis] for column in points])) for axis in (1, 2)]
    numbers: list[tuple[str, ...]] = [("method", "n", "Pearson", "Spearman", "drawn")]
    parts = []
    for number, (one, x, y) in enumerate(points):
        kept = np.unique(np.linspace(0, len(x) - 1, min(POINTS, len(x))).astype(int))
        shown = [("–" if value is None else f"{value:.2f}") for value in (pearson(x, y), spearman(x, y))]
        numbers.append((one.line.label, str(len(x)), *shown, str(len(kept))))
        title = f"{short(one.line.label, 26)}, r = {shown[0]}"
        picture = _points(x[kept], y[kept], one.line.index, title, limits)
        parts.append(
            panel(f"figure-3c{place}-{number}", picture, f"Scatter of {short(one.line.label)}, r = {shown[0]}.")
        )
    most = max(len(x) for _, x, _ in points)
    sample = (
        f"  At most {POINTS} of a method's responses are drawn, evenly in their order; r is Pearson's, of all of them."
        if most > POINTS
        else "  r is Pearson's."
    )
    return Figure(
        f"figure-3c{place}", f"3c. Logit shifts and log-likelihood shifts{of}",
        "Each dot is a response: its absolute logit shift per token (reading Z2) over its log-likelihood shift per token.  "
        "High and near 0 means that logits moved together, which leaves the likelihood where it was." + sample + note,
        "; ".join(f"{row[0]}: Pearson {row[2]}, Spearman {row[3]}, n = {row[1]}" for row in numbers[1:]) + ".",
        panels(parts), "shifts", tuple(numbers), wide=True,
    )  # fmt: skip


def _limits(values: Numbers) -> tuple[float, float]:
    low, high = float(min(values.min(), 0)), float(max(values.max(), 0))
    room = (high - low or 1) * 0.04
    return low - room, high + room


def _points(x: Numbers, y: Numbers, index: int, title: str, limits: Sequence[tuple[float, float]]) -> Draw:
    def draw(axes: Axes) -> None:
        axes.plot(
            x, y, linestyle="none", marker=MARKERS[index % len(MARKERS)], color=series(index), alpha=0.45,
            markersize=4, markeredgewidth=0,
        )  # fmt: skip
        axes.axvline(0, color=INK, linewidth=0.7, zorder=1)
        axes.set_xlim(limits[0])
        axes.set_ylim(limits[1])
        axes.locator_params(nbins=5)
        axes.set_title(title)
        axes.set_xlabel("log-likelihood shift per token (nats)")
        axes.set_ylabel("absolute logit shift per token")

    return draw


def _bins(measured: Sequence[Measured], place: str, of: str, note: str) -> list[Figure]:
    """Figure 4 in both readings, against DPO where it is there, as in the paper, else against the first method."""
    if len(measured) < 2:
        return []
    names = {str(one.line.index): one for one in measured}
    by = next((name for name, one in names.items() if one.line.label.lower().startswith("dpo")), next(iter(names)))
    if min(sum(map(len, one.column("token_ll"))) for one in measured) < BINS:
        return []
    found = shifting.bins({name: _tokens(one) for name, one in names.items()}, by)
    # Seeds are paired in their order; a method that has more of them shares its first ones.
    least = min(len(one.seeds) for one in measured)
    paired = shifting.bins({name: _tokens(one, least) for name, one in names.items()}, by).paired
    baseline = names[by].line.label
    edges = [f"{short_number(part.low)} to {short_number(part.high)}" for part in found.histogram if part.method == by]
    shares = {name: [part.share * 100 for part in found.histogram if part.method == name] for name in names}
    lines = [one.line for one in measured]
    pictures = [_lines(f"figure-4{place}-own", lines, shares, "Each method's own tokens", "share of its tokens (%)")]
    columns = [("bin", *(str(number + 1) for number in range(len(edges)))), (f"edges of {baseline} (nats)", *edges)]
    columns += [(f"{line.label}, share", *(f"{v:.1f} %" for v in shares[str(line.index)])) for line in lines]
    said = "  The same tokens under every method need the same responses for all of them"
    if paired is not None:
        means = {name: [part.mean for part in paired if part.method == name] for name in names}
        pictures.append(_lines(f"figure-4{place}-same", lines, means, "The same tokens", "mean shift (nats)"))
        columns += [(f"{line.label}, mean", *(f"{v:.3g}" for v in means[str(line.index)])) for line in lines]
        said = "  Right: the tokens of each of those bins, and how far every method moved them on average"
        said += ", seed by seed in their order" if any(len(one.seeds) > 1 for one in measured) else ""
    caption = (
        f"Tokens in ten bins by their log-likelihood shift under {baseline}, most negative first, as many of {baseline}'s "
        f"tokens in each.  {'Left' if paired is not None else 'Shown'}: the share of each method's own tokens between "
        f"those edges; {baseline} has 10 % everywhere.{said}."
    )
    alt = "; ".join(", ".join(column) for column in columns[1:]) + "."
    markup = legend([(line.label, line.index) for line in lines]) + panels(pictures)
    title = f"4. Token-level log-likelihood shifts in the deciles of {baseline}{of}"
    return [
        Figure(
            f"figure-4{place}",
            title,
            caption + note,
            alt,
            markup,
            "shifts",
            tuple(zip(*columns, strict=True)),
            wide=True,
        )
    ]


def short_number(value: float | None) -> str:
    """An edge; the outer bins are open."""
    return "…" if value is None else f"{value:.2g}"


def _tokens(one: Measured, seeds: int | None = None) -> list[dict[str, Any]]:
    """Of the first `seeds` of them, or all.  Seeds are told apart, so that the same response under two of them stays two, each beside its own."""
    return [
        {"sequence": f"{number} {sequence}", "token_ll": values}
        for number, seed in enumerate(one.seeds[:seeds])
        for sequence, values in zip(seed["sequence"].to_pylist(), seed["token_ll"].to_numpy(), strict=True)
    ]


def _lines(name: str, lines: Sequence[Line], values: dict[str, list[float]], title: str, axis: str) -> str:
    def draw(axes: Axes) -> None:
        for line in lines:
            style = {"linestyle": DASHES[line.index % len(DASHES)], "marker": MARKERS[line.index % len(MARKERS)]}
            numbers = values[str(line.index)]
            places = range(1, len(numbers) + 1)
            axes.plot(
                places, numbers, color=series(line.index), linewidth=1.6, markersize=5, markeredgewidth=0, **style
            )
        axes.set_xticks(range(1, len(numbers) + 1))
        axes.set_ymargin(0.08)
        if all(min(part) >= 0 for part in values.values()):
            axes.set_ylim(bottom=0)
        low, high = axes.get_ylim()
        if low < 0 < high:
            axes.axhline(0, color=INK, linewidth=0.7, zorder=1)
        axes.set_title(title)
        axes.set_xlabel("bin, most negative shift first")
        axes.set_ylabel(axis)

    return panel(name, draw, f"{title}: {axis} in ten bins.", height=250)
