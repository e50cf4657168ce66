"""A real run of the lab, small: two losses, two seeds each, evaluated with shifts, all in this process."""

from __future__ import annotations

from pathlib import Path

from bnfctl.artifact import Artifact, Store
from bnfctl.config import BuildConfig, EvalConfig, GenerateConfig, ScoreConfig, TrainConfig
from tests.stages.chain import run, write_jsonl

LOSSES, SEEDS = ("bnf", "dpo"), (0, 1)
ITEMS = 12


def lab_run(folder: Path) -> tuple[Store, list[Artifact]]:
    """The store, and the evals of the base and of the four models."""
    store = Store(folder / "artifacts")
    asked = [{"id": f"s{n}", "prompt": f"{name} has {12 + n} pens and gets {n + 2}. How many now?"} for n, name in
             enumerate(("Ann", "Ben", "Eva", "Ian", "Kim", "Leo"))]  # fmt: skip
    prompts = write_jsonl(folder / "shift-prompts.jsonl", asked)
    candidates = run(
        GenerateConfig(model="lab", prompts="lab:chat", limit=24, sampler="hf", n=4, max_tokens=60, chunk=24), store
    )
    rewards = run(ScoreConfig(input=candidates.ref, rule="lab"), store)
    pairs = run(BuildConfig(input=rewards.ref, test_fraction=0.2), store)
    tasks = ("lab-chat", "lab-reasoning")
    evals = [run(EvalConfig(tasks=tasks, model="lab", sampler="hf", limit=ITEMS), store)]
    for loss in LOSSES:
        for seed in SEEDS:
            policy = run(
                TrainConfig(model="lab", data=pairs.ref, loss=loss, seed=seed, lr=2e-4, batch_size=4, eval_every=1),
                store,
            )
            asks = EvalConfig(
                tasks=(*tasks, "shifts"), model=policy.ref, base=evals[0].ref, sampler="hf", limit=ITEMS,
                shift_prompts=str(prompts), shift_responses="reference",
            )  # fmt: skip
            evals.append(run(asks, store))
    return store, evals
