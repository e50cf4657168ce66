"""log/speed.jsonl: how fast each step was.  Outside the digest, since no two runs agree on it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bnfctl.training.setup import Run

PEAK_FLOPS = {
    "A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "L40S": 362e12, "L4": 121e12,
    "4090": 165e12, "A10": 125e12,
}  # fmt: skip
"""Dense bfloat16 with float32 accumulation, per second, by a part of the GPU's name (NVIDIA's data sheets)."""


def training_flops(run: Run, positions: Sequence[int]) -> float:
    """Model FLOPs of a step: 6 per body parameter and token, 6 per head parameter and trained token, and attention.

    Causal attention costs 12 * layers * width * L^2 / 2 per sequence of L tokens; recomputation does not count.
    """
    work, config = run.splits["train"], run.policy.model.config.get_text_config()
    head = run.policy.model.get_output_embeddings()
    head_numbers = head.in_features * head.out_features
    embeddings = run.policy.model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    total = sum(parameter.numel() for parameter in run.policy.model.parameters())
    body = total - head_numbers - (0 if tied else embeddings.num_embeddings * embeddings.embedding_dim)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * width
    flops = 0.0
    for position in positions:
        record = work.records[position]
        lengths = [len(side.ids) for side in record.sides if work.keep(side)]
        flops += 6 * body * work.layout.tokens(record, work.keep) + 6 * head_numbers * sum(lengths)
        flops += attention * sum((len(record.prompt_ids) + length - 1) ** 2 for length in lengths)
    return flops


class SpeedLog:
    """A line a step: seconds, computed and trained tokens per second, share of the GPU's peak, memory."""

    def __init__(self, folder: Path, run: Run) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.run = folder / "speed.jsonl", run
        self._tick = time.monotonic()
        name = torch.cuda.get_device_name(run.policy.device) if run.policy.device.type == "cuda" else ""
        self.peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)

    def add(self, step: int, positions: Sequence[int]) -> None:
        now = time.monotonic()
        seconds, self._tick = now - self._tick, now
        if not self.run.world.main:
            return
        work = self.run.splits["train"]
        trained = sum(len(s.ids) for p in positions for s in work.records[p].sides if work.keep(s))
        computed = sum(work.layout.tokens(work.records[p], work.keep) for p in positions)
        line: dict[str, Any] = {
            "step": step, "seconds": round(seconds, 4), "tokens_per_second": round(computed / seconds, 1),
            "trained_tokens_per_second": round(trained / seconds, 1),
        }  # fmt: skip
        if self.peak:
            share = training_flops(self.run, positions) / seconds / self.peak / self.run.world.size
            line["share_of_peak"] = round(share, 4)
        if self.run.policy.device.type == "cuda":
            line["gpu_memory_peak_bytes"] = torch.cuda.max_memory_allocated()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
