"""Training curves from metrics.jsonl: objective and log-probability shift per label, coefficient, margin.

A thick line is the mean over seeds, thin lines are the seeds; held-out figures are the markers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bnfctl.analysis.distributions import Numbers
from bnfctl.artifact import Artifact
from bnfctl.errors import BnfctlError
from bnfctl.report.figures_svg import (
    DASHES,
    DRAWABLE,
    INK,
    MARKERS,
    MUTED,
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
from bnfctl.report.sources import Sources

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 80
"""Of a drawn line at most; longer trainings are drawn as means of consecutive steps."""
SPLITS = ("train", "test")

Curve = tuple[Numbers, Numbers]
"""(steps, values)"""


@dataclass(frozen=True, eq=False)
class Curves:
    """A method's lines: of each seed, per (split, name of the number)."""

    line: Line
    seeds: tuple[dict[tuple[str, str], Curve], ...]

    def of(self, split: str, name: str) -> list[Curve]:
        return [seed[split, name] for seed in self.seeds if (split, name) in seed]


def figures(sources: Sources) -> list[Figure]:
    """A set per base model; a number that no training has (a margin without a reference) has no figure."""
    found: list[Figure] = []
    for place, of, lines in by_base(sources):
        curves = [Curves(line, _seeds(line)) for line in lines]
        curves = [one for one in curves if one.seeds]
        found += _figures(curves, place, of) if curves else []
    return found


def _seeds(line: Line) -> tuple[dict[tuple[str, str], Curve], ...]:
    trains = {run.train.ref: run.train for run in line.method.runs if run.train is not None}
    return tuple(_read(train) for train in trains.values())


def _read(train: Artifact) -> dict[tuple[str, str], Curve]:
    path = train.path / "metrics.jsonl"
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "step":
                    drawn = value if abs(value) < DRAWABLE else np.nan
                    found.setdefault((line["split"], name), []).append((line["step"], drawn))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = f"bnfctl verify {train.ref}; then make it again"
        raise BnfctlError(f"unreadable metrics: {error}", where=str(path), hint=hint) from None
    return {key: thinned(np.asarray(pairs, np.float64)) for key, pairs in found.items()}


def thinned(pairs: Numbers) -> Curve:
    """pairs: [n, 2] -> at most POINTS of them, each the mean of as many consecutive ones."""
    step = -(-len(pairs) // POINTS)
    starts = np.arange(0, len(pairs), step)
    sizes = np.diff([*starts, len(pairs)])
    return np.add.reduceat(pairs[:, 0], starts) / sizes, np.add.reduceat(pairs[:, 1], starts) / sizes


def mean_of(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds at the steps that all of them have."""
    values = [dict(zip(steps.tolist(), numbers.tolist(), strict=True)) for steps, numbers in curves]
    common = sorted(set.intersection(*(set(value) for value in values))) if values else []
    return np.asarray(common), np.asarray([np.mean([value[step] for value in values]) for step in common])


def _figures(curves: Sequence[Curves], place: str, of: str) -> list[Figure]:
    most = max(len(one.seeds) for one in curves)
    drawn = f"Lines: training batches, of long trainings as means of consecutive ones ({POINTS} points)"
    drawn += "; thick the mean over seeds, thin each seed" if most > 1 else ""
    drawn += ".  Markers on a dotted line: held-out records." if _any(curves, "test") else "."
    counts = {len(one.seeds) for one in curves}
    seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{most}"
    note = f"  {drawn}  n = {seeds} seed{'s' * (most > 1)} per method; no intervals."
    shown = legend([(one.line.label, one.line.index) for one in curves])
    found = [_objectives(curves, place, of, note)] if _any(curves, "train", "objective") else []
    for id_, title, caption, columns, axis in _PLAIN:
        there = [(name, heading) for name, heading in columns if _any(curves, "train", name)]
        if there:
            parts = [
                panel(f"{id_}{place}-{name}", _curves(curves, name, heading, axis), f"{title}: {heading}.")
                for name, heading in there
            ]
            numbers = _numbers(curves, there)
            found.append(Figure(
                f"{id_}{place}", f"{title}{of}", caption + note, _alt(numbers),
                shown + panels(parts), "training", numbers, wide=True,
            ))  # fmt: skip
    return found


_PLAIN = (
    (
        "training-shift", "Log-probability shifts",
        "Mean over the tokens of a batch of log π − log π_ref, in nats, for the chosen and the rejected responses.",
        (("shift_chosen", "chosen"), ("shift_rejected", "rejected")), "shift per token (nats)",
    ),
    (
        "training-margin", "Margins",
        "Mean over the pairs of a batch of the log-probability shift of the chosen response minus that of the rejected "
        "one (whole responses, without a loss's β), and the share of pairs where it is above 0.",
        (("margin", "margin (nats)"), ("accuracy", "share of pairs with a margin above 0")), "",
    ),
    (
        "training-coefficient", "Coefficients",
        "How hard the loss pulls: the sum over a batch's tokens of |∂ loss / ∂ log π|, per response (or pair, for losses "
        "of pairs).  For BNF it is the mean coefficient of its tokens, 1 where nothing is held back.",
        (("coefficient", "coefficient"),), "",
    ),
)  # fmt: skip


def _any(curves: Sequence[Curves], split: str, name: str | None = None) -> bool:
    return any(key[0] == split and name in (None, key[1]) for one in curves for seed in one.seeds for key in seed)


def _objectives(curves: Sequence[Curves], place: str, of: str, note: str) -> Figure:
    """One panel per method: objectives of different losses have no scale in common."""
    parts = []
    for number, one in enumerate(curves):
        names = [name for name in _OBJECTIVES if one.of("train", name)]
        title = short(one.line.label, 40)
        parts.append(panel(f"training-objective{place}-{number}", _labels(one, names, title), f"Objective of {title}."))
    numbers = _numbers(curves, [(name, said) for name, (said, _) in _OBJECTIVES.items()])
    entries = [entry for name, entry in _OBJECTIVES.items() if _any(curves, "train", name)]
    return Figure(
        f"training-objective{place}", f"Objective per label{of}",
        "The loss's value per batch: of all responses, and of the chosen and the rejected ones alone where the loss "
        "can be split by label.  With labels of both signs BNF's value hovers near 0 and need not fall; the two labels tell "
        "more.  Every method has its own scale." + note,
        _alt(numbers), legend(entries) + panels(parts), "training", numbers, wide=True,
    )  # fmt: skip


_OBJECTIVES: dict[str, tuple[str, int | None]] = {
    "objective": ("all responses", None), "objective_chosen": ("chosen", 0), "objective_rejected": ("rejected", 1),
}  # fmt: skip


def _labels(one: Curves, names: Sequence[str], title: str) -> Draw:
    def draw(axes: Axes) -> None:
        for name in names:
            index = _OBJECTIVES[name][1]
            _plot(axes, one, name, MUTED if index is None else series(index), index or 0)
        _steps(axes, title)

    return draw


def _steps(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.locator_params(axis="x", integer=True, nbins=6)


def _curves(curves: Sequence[Curves], name: str, heading: str, axis: str) -> Draw:
    def draw(axes: Axes) -> None:
        for one in curves:
            _plot(axes, one, name, series(one.line.index), one.line.index)
        low, high = axes.get_ylim()
        if low < 0 < high:
            axes.axhline(0, color=INK, linewidth=0.7, zorder=1)
        _steps(axes, heading)
        axes.set_ylabel(axis)

    return draw


def _plot(axes: Axes, one: Curves, name: str, colour: str, index: int) -> None:
    dash = DASHES[index % len(DASHES)]
    train, test = one.of("train", name), one.of("test", name)
    if len(train) > 1:
        for steps, values in train:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.4)
    if train:
        steps, values = mean_of(train)
        point = "." if len(steps) == 1 else ""
        axes.plot(steps, values, color=colour, linewidth=1.7, linestyle=dash, marker=point)
    if test:
        steps, values = mean_of(test)
        every = max(1, len(steps) // 12)
        axes.plot(
            steps, values, color=colour, linewidth=0.9, linestyle=":", marker=MARKERS[index % len(MARKERS)],
            markersize=5, markevery=every, markeredgewidth=0,
        )  # fmt: skip


def _numbers(curves: Sequence[Curves], columns: Sequence[tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
    """What the last drawn point of every line is: the mean over seeds."""
    rows = [("method", "number", "split", "seeds", "first", "last")]
    for one in curves:
        for name, heading in columns:
            for split in SPLITS:
                lines = one.of(split, name)
                values = mean_of(lines)[1]
                if len(values):
                    ends = f"{values[0]:.4g}", f"{values[-1]:.4g}"
                    rows.append((one.line.label, heading, split, str(len(lines)), *ends))
    return tuple(rows)


def _alt(numbers: Sequence[Sequence[str]]) -> str:
    said = [f"{method}, {name}, {split}: from {first} to {last}" for method, name, split, _, first, last in numbers[1:]]
    return "; ".join(said) + "."
