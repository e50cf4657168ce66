"""The result of an evaluation as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bnfctl import console
from bnfctl.artifact import Artifact
from bnfctl.evaluation.inputs import SHIFTS
from bnfctl.evaluation.rows import NO_ROOM

POINTS = ("wildbench", "wildbench-pairs")
"""Tasks whose figures are points of up to 100; others have shares of 1."""


_MANY = 4
"""Models of which the headline does not give each one's figure."""
_OLDER = "evaluated by an older bnfctl: run it again to read its figures"


def headline_of(artifact: Artifact) -> str:
    """The means, and the gains, in a few words."""
    if artifact.manifest.stage_version < 2:
        return _OLDER
    summary = artifact.manifest.summary
    parts = []
    for name, task in summary["tasks"].items():
        models = summary["models"] if name != SHIFTS else ()
        if len(models) > _MANY:
            means = [task["models"][model]["mean"] for model in models]
            parts.append(f"{name} of {len(models)} models {_number(name, min(means))} to {_number(name, max(means))}")
            continue
        for model in models:
            found = task["models"][model]
            gain = _estimate(name, found, "gain", "gain_low", "gain_high", "+") if "gain" in found else []
            whose = [model] if len(summary["models"]) > 1 else []
            parts.append(
                " ".join([name, *whose, _number(name, found["mean"]), *([f"({' '.join(gain)})"] if gain else [])])
            )
    parts += ["shifts"] if SHIFTS in summary["tasks"] else []
    return ", ".join(parts)


def table_of(artifact: Artifact) -> str:
    """Mean, interval and gain of every task; for several models a line each; warnings, judges and comparisons below."""
    if artifact.manifest.stage_version < 2:
        return _OLDER
    summary = artifact.manifest.summary
    results = {name: task for name, task in summary["tasks"].items() if name != SHIFTS}
    several = len(summary["models"]) > 1
    found = [(name, model, task["models"][model]) for name, task in results.items() for model in summary["models"]]
    parts = []
    if found:
        columns = ["task", *(["model"] if several else []), "n", "mean", "95 %"]
        rows = [[name, *([model] if several else []), r["n"], *_estimate(name, r, "mean", "low", "high")] for name, model, r in found]  # fmt: skip
        for heading, cells in _more(found).items():
            columns.append(heading)
            for row, cell in zip(rows, cells, strict=True):
                row.append(cell)
        title = ", ".join(summary["models"]) if not several else ""
        parts.append(console.table(title, columns, rows, right=range(2 if several else 1, len(columns))))
    parts += [f"{name}: {line}" for name, task in results.items() for line in _notes(task)]
    if SHIFTS in summary["tasks"]:
        parts.append(("\n" if found else "") + _shifts(summary["tasks"][SHIFTS]))
    return "\n".join(parts)


def _more(found: list[tuple[str, str, Mapping[str, Any]]]) -> dict[str, list[str]]:
    """Heading -> cells of the columns that only some results have."""
    columns: dict[str, list[str]] = {}
    if any("gain" in r for _, _, r in found):
        cells = [
            [
                _number(name, r["base_mean"]),
                *_estimate(name, r, "gain", "gain_low", "gain_high", "+"),
                p_text(r["p_holm"]),
            ]
            if "gain" in r
            else [""] * 4
            for name, _, r in found
        ]
        for heading, column in zip(
            ("base", "gain", "95 % of the gain", "p (Holm)"), zip(*cells, strict=True), strict=True
        ):
            columns[heading] = list(column)
    if any(r.get("lc_official") or r.get("lc_equal_length") for _, _, r in found):
        for heading, figure in (("LC official", "lc_official"), ("LC equal length", "lc_equal_length")):
            columns[heading] = [f"{r[figure]['estimate']['mean']:.4f}" if r.get(figure) else "" for _, _, r in found]
    for heading, figure in (("score of 10", "score"), ("adjusted", "adjusted")):
        if any("adjusted" in r for _, _, r in found):
            columns[heading] = [f"{r[figure]:.3f}" if "adjusted" in r else "" for _, _, r in found]
    if any(r["tokens"] is not None for _, _, r in found):
        columns["tokens"] = [f"{r['tokens']:.1f}" if r["tokens"] is not None else "" for _, _, r in found]
    columns["characters"] = [f"{r['characters']:.2f}" if r["characters"] is not None else "" for _, _, r in found]
    if any("no_answer" in r for _, _, r in found):
        columns["no answer"] = [f"{r['no_answer']:.2%}" if "no_answer" in r else "" for _, _, r in found]
        columns["reasoning characters"] = [
            f"{r['reasoning_characters']:.2f}" if r.get("reasoning_characters") else "" for _, _, r in found
        ]
    for other in sorted({name for _, _, r in found for name in r if name.startswith("acc_")}):
        columns[other.removeprefix("acc_")] = [_number(name, r.get(other)) for name, _, r in found]
    if any(r["ungraded"] for _, _, r in found):
        columns["ungraded"] = [str(r["ungraded"]) for _, _, r in found]
    return columns


def _notes(task: Mapping[str, Any]) -> list[str]:
    """What has to be known beside the figures."""
    judges = {r["judge"]["digest"]: r["judge"] for r in task["models"].values() if "judge" in r}
    lines = [
        f"judged by {one['served_model']} ({one['protocol']}; fingerprint {digest})" for digest, one in judges.items()
    ]
    lines += [f"warning: {line}" for line in task.get("warnings", ())]
    whys = task.get("why", {})
    lines += [f"no {', '.join(n for n in whys if whys[n] == why)}: {why}" for why in dict.fromkeys(whys.values())]
    lines += [
        f"gain of {model}: on the {r['paired']} of {r['n']} items that the base has too"
        for model, r in task["models"].items()
        if r.get("paired", r.get("n")) != r.get("n")
    ]
    lines += [
        f"lc_equal_length of {model} says little: the lengths alone tell its wins from its losses"
        for model, r in task["models"].items()
        if (r.get("lc_equal_length") or {}).get("separated")
    ]
    for model, found in task["models"].items():
        if found.get(NO_ROOM):
            lines.append(f"{found[NO_ROOM]} prompts fill the context of {model}: its responses to them are empty")
        if found.get("cut"):
            lines.append(f"{found['cut']:.1%} of the responses of {model} were cut at the most tokens")
    if len(task["models"]) > 1 and "comparisons" not in task:
        lines.append("too many models to compare two by two: evaluate two of them together, or one with --base")
    for one in task.get("comparisons", ()):
        points = f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"
        lines.append(
            f"{one['first']} - {one['second']}: {points} on {one['n']} items, p {p_text(one['p'])} (Holm {p_text(one['p_holm'])})"
        )
    return lines


def _shifts(task: Mapping[str, Any]) -> str:
    """Figures 3 a, b, d, e and f of the paper as numbers."""
    labels = {
        "ll_sum": "log-likelihood shift", "ll_mean": "log-likelihood shift per token", "z2_sum": "absolute logit shift",
        "z2_mean": "absolute logit shift per token", "gini": "Gini coefficient of logit shifts",
    }  # fmt: skip
    rows = [
        [label, found["n"], f"{found[name]['mean']:{sign}.4f}", f"[{found[name]['low']:{sign}.4f}, {found[name]['high']:{sign}.4f}]"]
        for found in task["models"].values()
        for name, label in labels.items()
        for sign in ["+" if name.startswith("ll") else ""]
    ]  # fmt: skip
    title = f"{', '.join(task['models'])} against {task['reference']}, on responses of the {task['responses']}"
    return console.table(title, ["shift", "n", "mean", "95 %"], rows, right=range(1, 4))


def _estimate(task: str, found: Mapping[str, Any], mean: str, low: str, high: str, sign: str = "") -> list[str]:
    return [
        _number(task, found[mean], sign),
        f"[{_number(task, found[low], sign)}, {_number(task, found[high], sign)}]",
    ]


def _number(task: str, value: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    # A share is rounded as the percentage that others publish: 0.36625 is 36.62 %, though 0.3663 with four decimals.
    return f"{value:{sign}.2f}" if task in POINTS else f"{float(f'{value * 100:.2f}') / 100:{sign}.4f}"


def p_text(p: float) -> str:
    """A p-value to two digits, with an end to them."""
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"
