"""What a step says about itself: per-response sums, added up over micro-batches, as one line of metrics.jsonl.

Deterministic values only; times and rates are in log/speed.jsonl.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bnfctl.losses import Loss, TokenLogps

FILE = "metrics.jsonl"


class StepSums:
    """Sums over the responses of a step; everything is float64 on the CPU."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        """Per micro-batch [R, 6]: label, |y|, pair, value, log pi(y), log pi_ref(y)."""
        self.margins: list[Tensor] = []
        """Per micro-batch [P]: rho of chosen - rho of rejected, rho = log pi(y) - log pi_ref(y)."""
        self.pull = 0.0
        """Sum over tokens of |d total / d logp|."""

    def add(self, tokens: TokenLogps, value: Tensor, coefficients: Tensor | None) -> None:
        """One micro-batch: value [R] of `Loss.value`, coefficients [N] of the gradient (None: not trained on)."""
        with torch.no_grad():
            policy = tokens.sum_by_response(tokens.logp.double())
            base = torch.full_like(policy, torch.nan)
            if tokens.ref_log_odds is not None:
                base = tokens.sum_by_response(logsigmoid(tokens.ref_log_odds).double())
                chosen, rejected = tokens.pairs()
                rho = policy - base
                self.margins.append((rho[chosen] - rho[rejected]).cpu())
            columns = (tokens.label, tokens.length, tokens.pair, value.detach(), policy, base)
            self.rows.append(torch.stack([column.double() for column in columns], dim=1).cpu())
            if coefficients is not None:
                self.pull += float(coefficients.double().abs().sum())

    def line(self, loss: Loss, denominator: float) -> dict[str, Any]:
        """The numbers of a line; null where there is nothing to say (no rejected response, no reference).

        objective: the loss's value over the step, per denominator; for chosen and rejected each over its own
            denominator (a contrastive loss has no such split).
        logp_*: mean over tokens, nats; shift_*: that minus the reference's.
        margin: mean over pairs of rho_w - rho_l, without beta; accuracy: share of pairs where it is above 0.
        """
        rows = torch.cat(self.rows)
        label, value, policy, base = rows[:, 0], rows[:, 3], rows[:, 4], rows[:, 5]
        out: dict[str, Any] = {"objective": _ratio(value.sum(), denominator)}
        for name, sign in (("chosen", 1), ("rejected", -1)):
            side = label * sign > 0
            count = rows[side, 1].sum()
            own = loss.denominator(label[side], rows[side, 1], rows[side, 2]) if loss.separable else 0.0
            out[f"objective_{name}"] = _ratio(value[side].sum(), own)
            out[f"logp_{name}"] = _ratio(policy[side].sum(), count)
            out[f"shift_{name}"] = _ratio((policy - base)[side].sum(), count)
        margins = torch.cat(self.margins) if self.margins else rows.new_zeros(0)
        out["margin"] = _ratio(margins.sum(), margins.numel())
        out["accuracy"] = _ratio((margins > 0).sum(), margins.numel())
        return out


def _ratio(total: Tensor, count: Tensor | float) -> float | None:
    value = float(total) / float(count) if float(count) else None
    return None if value is None or value != value else value


class MetricsFile:
    """metrics.jsonl, cut back to the checkpoint that training resumes from."""

    def __init__(self, path: Path, size: int) -> None:
        """size: bytes that the checkpoint vouches for; what was written after it is dropped."""
        path.touch()
        with open(path, "r+b") as file:
            file.truncate(size)
        self.path = path

    def append(self, line: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def last(self, split: str) -> dict[str, Any] | None:
        """The newest line of a split."""
        lines = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return next((line for line in reversed(list(lines)) if line["split"] == split), None)
