"""What training and building say about themselves: a row per train artifact, a row per build."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from bnfctl.analysis import preferences
from bnfctl.artifact import Artifact
from bnfctl.report.sources import Run, Sources
from bnfctl.report.table import DASH, Cell, Table, number

_FINAL = (
    ("Objective", "objective", 4), ("of +1", "objective_chosen", 4), ("of -1", "objective_rejected", 4),
    ("Shift +1", "shift_chosen", 4), ("Shift -1", "shift_rejected", 4), ("Coefficient", "coefficient", 3),
    ("Margin", "margin", 3), ("Accuracy", "accuracy", 3),
)  # fmt: skip
"""Columns of the last line of metrics.jsonl."""
_TEST = (("Objective", "objective", 4), ("Shift +1", "shift_chosen", 4), ("Shift -1", "shift_rejected", 4),
         ("Margin", "margin", 3), ("Accuracy", "accuracy", 3))  # fmt: skip
_COUNTS = (("Prompts", "prompts"), ("Rows", "rows"), ("Records", "records"), ("Pairs", "pairs"),
           ("Only +1", "chosen_only"), ("Only -1", "rejected_only"), ("Train", "train"), ("Test", "test"))  # fmt: skip


def training(sources: Sources) -> Table | None:
    """None where nothing was trained."""
    runs = [run for method in sources.methods for run in method.runs if run.train is not None]
    if not runs:
        return None
    several = len({run.base for run in runs}) > 1
    columns = (("Base",) if several else ()) + ("Method", "Seed", "Peak lr", "Batch", "Epochs", "Steps", "Records",
               "Tokens", "Seconds", *(name for name, _, _ in _FINAL), *(name for name, _, _ in _TEST))  # fmt: skip
    rows = [((Cell(run.base),) if several else ()) + _training_row(run) for run in runs]
    caption = (
        "Last step: means over its batch; per label (+1 chosen, -1 rejected) where the loss is separable. Shift: mean change "
        "of a token's log-probability against the reference, in nats. Coefficient: how hard the loss pulls, the "
        "absolute coefficients of log-probabilities in its gradient, summed per response or pair; for BNF their mean, 1 where "
        "nothing is held back. Margin: mean over pairs of the chosen response's shift minus the rejected one's, in nats, without "
        "beta; accuracy: share of pairs where it is above 0. Test split: where the training was asked to report on it."
    )
    over = [""] * (len(columns) - len(_FINAL) - len(_TEST)) + ["Last step"] * len(_FINAL) + ["Test split"] * len(_TEST)
    # What no training says (a split that nobody asked for, the coefficient of a contrastive loss) needs no column.
    kept = [n for n in range(len(columns)) if over[n] == "" or any(row[n].value is not None for row in rows)]
    groups = tuple((heading, len(list(same))) for heading, same in groupby(over[n] for n in kept))
    shown = tuple(tuple(row[n] for n in kept) for row in rows)
    return Table("training", "Training", caption, tuple(columns[n] for n in kept), shown, groups=groups)


def _training_row(run: Run) -> tuple[Cell, ...]:
    assert run.train is not None
    manifest, title = run.train.manifest, run.train.ref
    config, summary = manifest.config, manifest.summary
    final, test = summary.get("final") or {}, summary.get("test") or {}
    return (
        Cell(run.label, title=title), Cell(str(run.seed), title=title), Cell(f"{config['lr']:g}", config["lr"], title=title),
        *(number(config.get(name), 0, title) for name in ("batch_size", "epochs")),
        *(number(summary.get(name), 0, title) for name in ("steps", "records", "tokens")),
        number(manifest.provenance.get("seconds"), 0, title),
        *(number(final.get(name), decimals, title) for _, name, decimals in _FINAL),
        *(number(test.get(name), decimals, f"{title}, test split") for _, name, decimals in _TEST),
    )  # fmt: skip


def builds(sources: Sources) -> Table | None:
    """None where no build is there."""
    if not sources.builds:
        return None
    rows = [_build_row(build, sources) for build in sources.builds]
    counts = [name for name, key in _COUNTS if any(build.manifest.summary.get(key) for build in sources.builds)]
    columns = (
        "Build",
        "Choice",
        *counts,
        "Left out",
        "Unit",
        "+1",
        "-1",
        "Difference",
        "+1 longer",
        "-1 longer",
        "Nearly equal",
    )
    groups = (("", 2), ("Counts", len(counts) + 1), ("Mean length of responses", 6), ("Pairs", 1))
    kept = tuple(tuple(cells[name] for name in columns) for cells in rows)
    caption = (
        "Left out: responses, pairs or prompts that became no record, by reason. Longer: share of the pairs whose chosen (+1) "
        "or rejected (-1) response is the longer one: a loss can learn that. Nearly equal: share of the pairs whose edit "
        f"distance is below {preferences.NEAR:.0%} of the longer text, of up to {preferences.SAMPLE} pairs drawn by hash."
    )
    return Table("builds", "Preference data", caption, columns, kept, groups=groups)


def _build_row(build: Artifact, sources: Sources) -> dict[str, Cell]:
    config, summary, title = build.manifest.config, build.manifest.summary, build.ref
    look = preferences.report(build)
    length, near = look["length"], look["near_equal"]
    left = {name: count for name, count in summary.items() if name.startswith(("dropped_", "left_out_"))}
    choice = str(config.get("choose", "best-worst"))
    if config.get("pairing_ratio", 1.0) != 1.0:
        choice += f", {config['pairing_ratio']:.0%} pairs"
    return {
        "Build": Cell(sources.names.get(build.ref, build.ref), title=title), "Choice": Cell(choice, title=title),
        **{name: number(summary.get(key, 0), 0, title) for name, key in _COUNTS},
        "Left out": Cell(_reasons(left) or "none", title=title), "Unit": Cell(length["unit"], title=title),
        "+1": number(length["chosen"], 1, title), "-1": number(length["rejected"], 1, title),
        "Difference": number(length["difference"], 1, title, "+"),
        "+1 longer": _share(length["chosen_longer"], title), "-1 longer": _share(length["rejected_longer"], title),
        "Nearly equal": _share(near["share"] if near else None, title),
    }  # fmt: skip


def _reasons(counts: Mapping[str, Any]) -> str:
    """dropped_no_margin 17 -> no margin 17."""
    words = {name: name.removeprefix("dropped_").removeprefix("left_out_").replace("_", " ") for name in counts}
    return ", ".join(f"{words[name]} {count}" for name, count in counts.items())


def _share(value: float | None, title: str) -> Cell:
    return Cell(DASH, title="no pairs") if value is None else Cell(f"{value:.1%}", value, title=title)
