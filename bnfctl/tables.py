"""Name -> "module:attribute" for everything that can be chosen by name.

Plain strings, so that listing them imports nothing.  Adding one is one file and one line here.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bnfctl.errors import UsageError, nearest

LOSSES = {
    "bnf": "bnfctl.losses.bidirectional:BNF",
    "sft": "bnfctl.losses.likelihood:SFT",
    "nll-pll": "bnfctl.losses.likelihood:NLLPLL",
    "slic-hf": "bnfctl.losses.margin:SLiCHF",
    "dpo": "bnfctl.losses.dpo:DPO",
    "ipo": "bnfctl.losses.dpo:IPO",
    "kto": "bnfctl.losses.kto:KTO",
    "orpo": "bnfctl.losses.margin:ORPO",
    "r-dpo": "bnfctl.losses.dpo:RDPO",
    "simpo": "bnfctl.losses.margin:SimPO",
}
SAMPLERS = {
    "vllm": "bnfctl.samplers.vllm:VLLMSampler",
    "hf": "bnfctl.samplers.hf:HFSampler",
    "server": "bnfctl.samplers.server:ServerSampler",
    "file": "bnfctl.samplers.file:FileSampler",
}
SCORERS = {
    "rules": "bnfctl.scorers.rules:RulesScorer",
    "reward-model": "bnfctl.scorers.classifier:ClassifierScorer",
    "pairrm": "bnfctl.scorers.pairrm:PairRMScorer",
    "armorm": "bnfctl.scorers.armorm:ArmoRMScorer",
    "judge": "bnfctl.scorers.judge:JudgeScorer",
}
RULES = {
    "exact": "bnfctl.scorers.rules:exact",
    "numeric": "bnfctl.scorers.rules:numeric",
    "regex": "bnfctl.scorers.rules:regex",
    "math-verify": "bnfctl.scorers.mathematics:math_verify",
    "lab": "bnfctl.lab.tasks:reward",
}
TASKS = {
    "lab-chat": "bnfctl.lab.tasks:ChatTask",
    "lab-reasoning": "bnfctl.lab.tasks:ReasoningTask",
    "lab-math": "bnfctl.lab.tasks:MathTask",
    "gsm8k": "bnfctl.tasks.gsm8k:GSM8K",
    "math-l5": "bnfctl.tasks.math_l5:MathL5",
    "crux": "bnfctl.tasks.crux:Crux",
    "mmlu-redux": "bnfctl.tasks.mmlu_redux:MMLURedux",
    "arena-hard": "bnfctl.tasks.arena_hard:ArenaHard",
    "wildbench": "bnfctl.tasks.wildbench:WildBench",
    "wildbench-pairs": "bnfctl.tasks.wildbench_pairs:WildBenchPairs",
    "shifts": "bnfctl.tasks.shift_prompts:ShiftPrompts",
}
MODELS = {"lab": "bnfctl.lab:MODEL_PATH"}
"""Models that come with the package."""
PROMPTS = {"lab": "bnfctl.lab.world:prompts"}
"""Prompt sources that come with the package, named `lab:FAMILY`."""


def load(table: dict[str, str], name: str, what: str) -> Any:
    """The object behind `name`; UsageError lists the known names."""
    if name not in table:
        raise UsageError(f"unknown {what} '{name}'{nearest(name, table)}", hint=f"one of: {', '.join(table)}")
    module, attribute = table[name].split(":")
    return getattr(import_module(module), attribute)
