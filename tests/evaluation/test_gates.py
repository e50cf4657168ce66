"""Gates: drops, groups of tasks, several models; what cannot be asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bnfctl.config import EvalConfig
from bnfctl.errors import GateError, UsageError
from bnfctl.evaluation import gates

REASONING = {"gsm8k": {"mean": 0.5, "gain": -0.03, "gain_low": -0.05, "gain_high": -0.01},
             "crux": {"mean": 0.3, "gain": 0.01, "gain_low": -0.01, "gain_high": 0.03}}  # fmt: skip


def artifact(**models: dict[str, dict[str, float]]) -> Any:
    """An evaluation with these figures: model -> task -> figures."""
    names = dict.fromkeys(task for found in models.values() for task in found)
    tasks = {task: {"models": {model: found[task] for model, found in models.items()}} for task in names}
    return SimpleNamespace(ref="eval/x", manifest=SimpleNamespace(summary={"models": list(models), "tasks": tasks}))


def asked(*require: str, base: str | None = "base") -> EvalConfig:
    return EvalConfig(tasks=("gsm8k", "crux"), model="m", base=base, require=require)


@pytest.mark.parametrize(
    ("gate", "value"),
    [
        ("gsm8k.drop", 0.03),
        ("gsm8k.drop_high", 0.05),
        ("gsm8k.drop_low", 0.01),
        ("reasoning.drop", 0.01),
        ("reasoning", 0.4),
        ("reasoning.gain_low", -0.03),
        ("crux.mean", 0.3),
    ],
)
def test_a_gate_holds_up_to_its_figure(gate: str, value: float) -> None:
    made = artifact(m=REASONING)
    gates.check(asked(f"{gate}<={value + 1e-9}", f"{gate}>={value - 1e-9}"), made)
    with pytest.raises(GateError, match=rf"{gate.split('.')[0]}\.\w+ is {value:.4f}, not > {value + 1e-6:g}") as caught:
        gates.check(asked(f"{gate}>{value + 1e-6}"), made)
    assert (caught.value.exit_code, caught.value.where) == (3, "eval/x")


def test_every_model_of_a_table_has_to_hold() -> None:
    low = {task: {**found, "mean": 0.1} for task, found in REASONING.items()}
    made = artifact(good=REASONING, bad=low)
    with pytest.raises(GateError) as caught:
        gates.check(asked("gsm8k>=0.4"), made)
    assert caught.value.what == "gsm8k.mean of bad is 0.1000, not >= 0.4"


@pytest.mark.parametrize(
    ("gate", "base", "what"),
    [
        ("gsm8k.drop<=0.02", None, "a drop needs --base"),
        ("gsm8k.dorp<=0.02", "base", "no figure 'dorp' .did you mean 'drop'"),
        ("qa>=0.5", "base", "no task 'qa' here"),
        ("resoning>=0.5", "base", "did you mean 'reasoning'"),
        ("gsm8k=>0.5", "base", "not a gate"),
        ("gsm8k>=inf", "base", "'inf' is not a number"),
    ],
)
def test_a_gate_that_cannot_be_asked(gate: str, base: str | None, what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        gates.parse(gate, asked(base=base))
    assert caught.value.where == "--require"
