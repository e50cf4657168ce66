"""What a step says about itself: sums over its tokens and responses, of all ranks, as one line of metrics.jsonl.

Deterministic values only; times and rates are in log/speed.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bnfctl.errors import BnfctlError
from bnfctl.losses import Loss, TokenLogps
from bnfctl.training.batches import StepData
from bnfctl.training.world import World

FILE = "metrics.jsonl"
_LABELS = (("chosen", 1), ("rejected", -1))


class StepSums:
    """Sums over the micro-batches of a step, float64 on the CPU."""

    def __init__(self) -> None:
        names = ["value", "pull", "drift", "gap", "margin", "wins"]
        names += [f"{what}_{label}" for what in ("value", "logp", "shift") for label, _ in _LABELS]
        self._sums = {name: torch.zeros((), dtype=torch.float64) for name in names}

    def add(self, tokens: TokenLogps, value: Tensor, coefficients: Tensor | None) -> None:
        """One micro-batch: value [R] of `Loss.value`, coefficients [N] of the gradient (None: not trained on)."""
        with torch.no_grad():
            logp = tokens.sum_by_response(tokens.logp.double())
            columns = {"value": value.double(), "logp": logp}
            if tokens.ref_log_odds is not None:
                shift = columns["shift"] = logp - tokens.sum_by_response(logsigmoid(tokens.ref_log_odds).double())
                chosen, rejected = tokens.pairs()
                margins = shift[chosen] - shift[rejected]
                self._plus("margin", margins)
                self._plus("wins", margins > 0)
                away = (tokens.log_odds - tokens.ref_log_odds).double()
                self._plus("drift", -torch.expm1(away.clamp(max=0)))
                self._plus("gap", -torch.expm1(-away.abs()))
            self._plus("value", value)
            for what, column in columns.items():
                for label, sign in _LABELS:
                    self._plus(f"{what}_{label}", column[tokens.label * sign > 0])
            if coefficients is not None:
                self._plus("pull", coefficients.abs())

    def _plus(self, name: str, values: Tensor) -> None:
        self._sums[name] += values.double().sum().cpu()

    def over_ranks(self, world: World) -> dict[str, float]:
        """Every sum, of all ranks together."""
        packed = torch.stack(list(self._sums.values())).to(world.device)
        return dict(zip(self._sums, world.sum(packed).tolist(), strict=True))


def line(sums: dict[str, float], loss: Loss, data: StepData, has_reference: bool) -> dict[str, Any]:
    """The numbers of a line; null where there is nothing to say (no rejected response, no reference).

    objective: the loss's value over the step, per denominator; for chosen and rejected each over its own
        denominator (a contrastive loss has no such split).
    logp_*: mean over tokens, nats; shift_*: that minus the reference's.
    margin: mean over pairs of rho_w - rho_l, without beta; accuracy: share of pairs where it is above 0.
    """
    denominator = loss.denominator(data.label, data.length, data.pair)
    out: dict[str, Any] = {"objective": _ratio(sums["value"], denominator)}
    for name, sign in _LABELS:
        side = data.label * sign > 0
        tokens = float(data.length[side].sum())
        own = 0.0 if loss.needs_pairs else loss.denominator(data.label[side], data.length[side], data.pair[side])
        out[f"objective_{name}"] = _ratio(sums[f"value_{name}"], own)
        out[f"logp_{name}"] = _ratio(sums[f"logp_{name}"], tokens)
        out[f"shift_{name}"] = _ratio(sums[f"shift_{name}"], tokens) if has_reference else None
    pairs = float(((data.label > 0) & (data.pair >= 0)).sum()) if has_reference else 0.0
    out["margin"] = _ratio(sums["margin"], pairs)
    out["accuracy"] = _ratio(sums["wins"], pairs)
    return out


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


class MetricsFile:
    """metrics.jsonl, cut back to the checkpoint that training resumes from."""

    def __init__(self, path: Path, size: int, also: Callable[[dict[str, Any]], None] | None = None) -> None:
        """size: bytes that the checkpoint vouches for; what was written after it is dropped.  also: gets each line.

        Raises BnfctlError where the file has lost some of them.
        """
        path.touch()
        if (found := path.stat().st_size) < size:
            what = f"{path.name} has {found} bytes, and had {size} when the checkpoint was saved"
            raise BnfctlError(what, where=str(path), hint="the same command with --force starts over")
        with open(path, "r+b") as file:
            file.truncate(size)
        self.path, self._also = path, also

    def append(self, line: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._also is not None:
            self._also(line)

    def last(self, split: str) -> dict[str, Any] | None:
        """The newest line of a split."""
        lines = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return next((line for line in reversed(list(lines)) if line["split"] == split), None)
