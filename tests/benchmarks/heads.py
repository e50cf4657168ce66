"""The head alone, forward and backward, on N response tokens: ours in one pass, ours with recomputation, Appendix B
and plain cross-entropy on [N, V] logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.clock import now
from tests.benchmarks.job import Job, Timing

NAMES = ("head-one-pass", "head-recompute", "head-appendix-b", "head-cross-entropy")
NOTES = {
    "head-one-pass": "BNF, stored reference",
    "head-recompute": "BNF, stored reference",
    "head-appendix-b": "with the reference's logits",
    "head-cross-entropy": "SFT",
}
RUNS = 5


def run(job: Job) -> Timing:
    """Fastest of a few runs after a first one that is not timed."""
    import torch

    step = HEADS[job.name](*_inputs(job))
    seconds = []
    for _ in range(RUNS + 1):
        started = now()
        step()
        if job.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(now() - started)
    return Timing(min(seconds[1:]), None, NOTES[job.name])


def _inputs(job: Job) -> tuple[Any, ...]:
    """Hidden states [N, H] of policy and reference, output matrix [V, H], targets [N], labels [N]."""
    import torch

    config = json.loads((Path(job.folder) / "config.json").read_text(encoding="utf-8"))
    width, vocabulary, n = config["hidden_size"], config["vocab_size"], job.micro_tokens
    assert n is not None
    kind = getattr(torch, job.dtype)
    torch.manual_seed(0)
    hidden = torch.randn(n, width).to(job.device, kind).requires_grad_()
    ref_hidden = (hidden.detach() + 0.1 * torch.randn(n, width).to(job.device, kind)).detach()
    matrix = (torch.randn(vocabulary, width) * width**-0.5).to(job.device).requires_grad_()
    target = torch.randint(vocabulary, (n,)).to(job.device)
    label = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).to(job.device)
    return hidden, ref_hidden, matrix, target, label


def _reference_odds(ref_hidden: Any, matrix: Any, target: Any) -> Any:
    import torch

    from bnfctl.model.head import Head

    with torch.no_grad():
        return Head(matrix)(ref_hidden, target).log_odds


def _one_pass(hidden: Any, ref_hidden: Any, matrix: Any, target: Any, label: Any) -> Callable[[], None]:
    from bnfctl.model.head import Head

    ref = _reference_odds(ref_hidden, matrix, target)

    def coefficients(part: slice, odds: Any) -> Any:
        return -label[part] * (odds - ref[part]).clamp(max=0).exp()

    def step() -> None:
        Head(matrix).one_pass(hidden, target, coefficients)[0].backward()

    return step


def _recompute(hidden: Any, ref_hidden: Any, matrix: Any, target: Any, label: Any) -> Callable[[], None]:
    from bnfctl.model.head import Head

    ref = _reference_odds(ref_hidden, matrix, target)

    def step() -> None:
        result = Head(matrix)(hidden, target)
        result.logp.backward(-label * (result.log_odds - ref).clamp(max=0).exp())

    return step


def _appendix_b(hidden: Any, ref_hidden: Any, matrix: Any, target: Any, label: Any) -> Callable[[], None]:
    import torch

    from tests.reference import appendix_b

    everything = torch.ones(len(target), 1, dtype=torch.bool, device=target.device)

    def step() -> None:
        work = matrix.to(hidden.dtype)
        with torch.no_grad():
            ref_logits = (ref_hidden @ work.T).float()
        logits = (hidden @ work.T).float()
        appendix_b(logits.unsqueeze(1), ref_logits.unsqueeze(1), target.unsqueeze(1), everything, label).backward()

    return step


def _cross_entropy(hidden: Any, ref_hidden: Any, matrix: Any, target: Any, label: Any) -> Callable[[], None]:
    from torch.nn.functional import cross_entropy

    def step() -> None:
        cross_entropy((hidden @ matrix.to(hidden.dtype).T).float(), target).backward()

    return step


HEADS: dict[str, Callable[..., Callable[[], None]]] = {
    "head-one-pass": _one_pass,
    "head-recompute": _recompute,
    "head-appendix-b": _appendix_b,
    "head-cross-entropy": _cross_entropy,
}
