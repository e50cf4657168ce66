"""Builds: how rewards, margins and lengths of the responses are distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bnfctl.analysis.distributions import Numbers
from bnfctl.analysis.preferences import Histogram
from bnfctl.artifact import Artifact
from bnfctl.data.pairing import SIDES
from bnfctl.report.figures_svg import DRAWABLE, INK, Figure, legend, panel, panels, series, short
from bnfctl.report.sources import Sources

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 24
FEW = 10
"""Distinct rewards that get a bar each: those of rules and judges."""
_UNITS = ("ids", "tokens"), ("text", "characters")


def figures(sources: Sources) -> list[Figure]:
    """One per build."""
    return [_figure(build, sources.names.get(build.ref, ""), place) for place, build in enumerate(sources.builds)]


def _figure(build: Artifact, name: str, place: int) -> Figure:
    rewards, lengths, unit = _columns(build)
    both = np.isfinite(rewards["chosen"]) & np.isfinite(rewards["rejected"])
    with np.errstate(over="ignore"):
        margins = rewards["chosen"][both] - rewards["rejected"][both]
    drawn = {
        "reward": _histogram({side: values[np.isfinite(values)] for side, values in rewards.items()}),
        "margin": _histogram({"pairs": margins[np.isfinite(margins)]}),
        "length": _histogram(lengths, few=1),
    }
    titles = {
        "reward": ("Rewards", "reward"),
        "margin": ("Margins of the pairs", "reward of chosen − rejected"),
        "length": ("Lengths", unit),
    }
    parts, numbers = [], [("panel", "responses", "n", "mean")]
    for key, document in drawn.items():
        if document is not None and max(map(abs, document["bins"][0] + document["bins"][-1])) < DRAWABLE:
            title, axis = titles[key]
            parts.append(panel(f"build-{place}-{key}", _draw(document, title, axis), f"Histogram: {title}."))
            numbers += [
                (title, side, str(sum(document["counts"][side])), "" if mean is None else f"{mean:.4g}")
                for side, mean in document["means"].items()
            ]
    said = f" ({name})" if name else ""
    known = "" if drawn["reward"] else "  This build has no rewards."
    return Figure(
        f"build-{place}",
        f"{build.ref}{said}",
        f"Responses of {build.ref}{said}, train and test split together, counted in bins; a vertical line is the mean.  "
        f"Lengths are in {unit}.{known}",
        "; ".join(f"{part}, {side}: n = {n}, mean {mean or 'unknown'}" for part, side, n, mean in numbers[1:]) + ".",
        legend([("chosen (label +1)", 0), ("rejected (label −1)", 1)], markers=False) + panels(parts),
        "builds",
        tuple(numbers),
        wide=True,
    )


def _columns(build: Artifact) -> tuple[dict[str, Numbers], dict[str, Numbers], str]:
    """(rewards with NaN where unknown, lengths of the responses that are there, their unit), by side."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from bnfctl.shards import read_table

    columns = [f"{side}_{name}" for side in SIDES for name in ("text", "ids", "reward")]
    parts: list[dict[str, Any]] = []
    for shard in build.shards():
        table = read_table(shard, columns)
        part: dict[str, Any] = {}
        for side in SIDES:
            part[f"{side}_reward"] = table[f"{side}_reward"].cast(pa.float64()).to_numpy()
            part[f"{side}_ids"] = pc.list_value_length(table[f"{side}_ids"])
            part[f"{side}_text"] = pc.utf8_length(table[f"{side}_text"])
        parts.append(part)
    unit, named = "ids", "tokens"
    if any(part[f"{side}_ids"].null_count != part[f"{side}_text"].null_count for part in parts for side in SIDES):
        unit, named = _UNITS[1]
    empty = np.zeros(0)
    rewards = {side: np.concatenate([empty, *(part[f"{side}_reward"] for part in parts)]) for side in SIDES}
    lengths = {
        side: np.concatenate([empty, *(part[f"{side}_{unit}"].drop_null().to_numpy() for part in parts)])
        for side in SIDES
    }
    return rewards, lengths, named


def _histogram(values: dict[str, Numbers], few: int = FEW) -> dict[str, Any] | None:
    found = Histogram(tuple(values), BINS, few)
    for name, numbers in values.items():
        found.widen(name, numbers)
    for name, numbers in values.items():
        if len(numbers):
            found.add(name, numbers)
    return found.document()


def _draw(document: dict[str, Any], title: str, axis: str) -> Any:
    bins = document["bins"]
    discrete = all(low == high for low, high in bins)

    def draw(axes: Axes) -> None:
        names = list(document["counts"])
        for number, name in enumerate(names):
            counts = document["counts"][name]
            colour = series(number) if len(names) > 1 else INK
            strong = number == 0
            if discrete:
                places = np.arange(len(bins)) + (number - (len(names) - 1) / 2) * 0.38
                axes.bar(places, counts, 0.36, facecolor=colour, alpha=0.6 if strong else 0.3, edgecolor=colour)
            else:
                dash: Any = "-" if strong else (0, (4, 2))
                edges = [low for low, _ in bins] + [bins[-1][1]]
                axes.stairs(counts, edges, fill=True, facecolor=colour, alpha=0.28 if strong else 0.12)
                axes.stairs(counts, edges, color=colour, linewidth=1.4, linestyle=dash)
                if document["means"][name] is not None:
                    axes.axvline(document["means"][name], color=colour, linewidth=1, linestyle=dash)
        if discrete:
            axes.set_xticks(range(len(bins)), [f"{low:.3g}" for low, _ in bins])
        axes.grid(visible=False, axis="x")
        axes.set_title(short(title, 40))
        axes.set_xlabel(axis)
        axes.set_ylabel("responses" if len(names) > 1 else "pairs")
        axes.locator_params(axis="y", integer=True, nbins=6)

    return draw
