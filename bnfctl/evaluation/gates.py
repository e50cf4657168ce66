"""--require: what a result has to reach, so that a script or CI stops where it does not."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bnfctl.artifact import Artifact
from bnfctl.config import EvalConfig
from bnfctl.errors import GateError, UsageError, nearest
from bnfctl.evaluation.inputs import SHIFTS
from bnfctl.evaluation.shown import POINTS

GROUPS = {
    "reasoning": ("gsm8k", "math-l5", "crux", "mmlu-redux", "lab-reasoning", "lab-math"),
    "chat": ("lab-chat",),
    "qa": ("arena-hard", "wildbench", "wildbench-pairs"),
}
"""A name for several tasks: its figure is the mean over those that were evaluated, points as hundredths of a share."""
_FIGURES = {
    "mean": ("mean", 1), "low": ("low", 1), "high": ("high", 1), "gain": ("gain", 1), "gain_low": ("gain_low", 1),
    "gain_high": ("gain_high", 1), "drop": ("gain", -1), "drop_low": ("gain_high", -1), "drop_high": ("gain_low", -1),
}  # fmt: skip
"""Word of a gate -> (figure of the summary, sign): a drop is what was lost against the base."""
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_GATE = re.compile(r"\s*([a-z0-9-]+)(?:\.([a-z_]+))?\s*(>=|<=|>|<)\s*(\S+)\s*")


@dataclass(frozen=True)
class Gate:
    """`subject.figure comparison bound`."""

    subject: str
    tasks: tuple[str, ...]
    figure: str
    comparison: str
    bound: float


def parse(text: str, config: EvalConfig) -> Gate:
    """The gate that a text says; UsageError for one that cannot be read, or that asks for what will not be there."""
    match = _GATE.fullmatch(text)
    if match is None:
        raise UsageError(f"not a gate: '{text}'", where="--require", hint="e.g. lab-chat>=0.5 or lab-chat.gain>=0.15")
    subject, figure, comparison, bound = match.groups()
    figure = figure or "mean"
    if figure not in _FIGURES:
        raise UsageError(
            f"no figure '{figure}'{nearest(figure, _FIGURES)}",
            where="--require",
            hint=f"figures: {', '.join(_FIGURES)}",
        )
    tasks = (subject,) if subject in config.tasks else tuple(t for t in config.tasks if t in GROUPS.get(subject, ()))
    if not tasks or subject == SHIFTS:
        known = [
            *(task for task in config.tasks if task != SHIFTS),
            *(name for name, members in GROUPS.items() if set(members) & set(config.tasks)),
        ]
        raise UsageError(
            f"no task '{subject}' here{nearest(subject, known)}", where="--require", hint=f"tasks: {', '.join(known)}"
        )
    if _FIGURES[figure][0].startswith("gain") and config.base is None:
        raise UsageError(f"a {figure} needs --base", where="--require", hint="--base EVAL_ARTIFACT of the base model")
    try:
        value = float(bound)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"'{bound}' is not a number", where="--require", hint="e.g. lab-chat>=0.5")
    return Gate(subject, tasks, figure, comparison, value)


def check(config: EvalConfig, artifact: Artifact) -> None:
    """Apply the gates to every model of a published result; GateError says what fell short and by how much."""
    short = []
    summary = artifact.manifest.summary
    for gate in (parse(text, config) for text in config.require):
        for model in summary["models"]:
            value = _value(gate, summary["tasks"], model)
            if not _COMPARE[gate.comparison](value, gate.bound):
                whose = f" of {model}" if len(summary["models"]) > 1 else ""
                short.append(
                    f"{gate.subject}.{gate.figure}{whose} is {value:.4f}, not {gate.comparison} {gate.bound:g}"
                )
    if short:
        raise GateError("; ".join(short), where=artifact.ref, hint=f"bnfctl show {artifact.ref} has all figures")


def _value(gate: Gate, tasks: Mapping[str, Any], model: str) -> float:
    name, sign = _FIGURES[gate.figure]
    points = [task in POINTS and gate.subject in GROUPS for task in gate.tasks]
    values = [tasks[task]["models"][model][name] for task in gate.tasks]
    return sign * fmean(value / 100 if scaled else value for value, scaled in zip(values, points, strict=True))
