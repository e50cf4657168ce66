"""Scoring with ArmoRM: 5 responses to a long prompt, the prompt computed once or once per response, against SimPO's
script, which runs a batch of one for each response.  Run by hand: python -m tests.benchmarks.scoring
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.clock import now

GOAL = 3.0
"""Times as fast as the script, on a CPU with a small ArmoRM."""


def main() -> None:
    """Fastest of some runs of each, in turn, and the largest difference of their scores."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=1500, help="characters, about one token each")
    parser.add_argument("--response", type=int, default=100, help="characters, about one token each")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ways = prepare(Path(folder), options)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        scores = {name: torch.tensor(way()) for name, way in ways.items()}  # the first run is not timed
        for _ in range(options.runs):
            for name, way in ways.items():
                started = now()
                way()
                seconds[name].append(now() - started)
    best = {name: min(runs) for name, runs in seconds.items()}
    script = best["script"]
    print(f"{options.groups} prompts of {options.prompt} with 5 responses of {options.response}, "
          f"{options.layers} layers of {options.hidden}, {torch.get_num_threads()} thread(s)")  # fmt: skip
    for name, value in best.items():
        difference = float((scores[name] - scores["unshared"]).abs().max())
        print(f"{name:10} {value:7.3f} s  {script / value:5.2f} times  differs from unshared by {difference:.1e}")
    print(f"goal: {GOAL:g} times with the prompt shared: {'met' if script / best['shared'] >= GOAL else 'missed'}")


def prepare(folder: Path, options: argparse.Namespace) -> dict[str, Callable[[], list[float]]]:
    """name -> all scores of the same candidates."""
    from bnfctl.config import ScoreConfig
    from bnfctl.data.records import Candidate, Group, Prompt
    from bnfctl.scorers.armorm import ArmoRMScorer
    from tests.scorers import armorm_twin

    sizes = {"hidden_size": options.hidden, "intermediate_size": options.hidden * 7 // 2,
             "num_hidden_layers": options.layers, "num_attention_heads": options.hidden // 64,
             "num_key_value_heads": max(1, options.hidden // 256), "gating_hidden_dim": 1024}  # fmt: skip
    shape = armorm_twin.published_config(**sizes)
    armorm_twin.write_tokenizer(folder, template=armorm_twin.TEMPLATES["on request"])
    armorm_twin.write_parameters(folder, shape, armorm_twin.random_parameters(shape, 0))

    texts = [chr(ord("b") + i) * options.response for i in range(5)]
    groups = [
        Group(Prompt(str(g), ({"role": "user", "content": f"{g} why? " * (options.prompt // 7)},)),
              tuple(Candidate(str(g), i, text) for i, text in enumerate(texts)))
        for g in range(options.groups)
    ]  # fmt: skip
    config = ScoreConfig(input="", scorer="armorm", dtype="float32", max_length=8192)
    shared, single = (ArmoRMScorer(config, folder, share=share) for share in (True, False))
    twin = armorm_twin.Twin(folder)

    def scored(scorer: ArmoRMScorer) -> list[float]:
        return [reward.value or 0.0 for rewards in scorer.score(groups) for reward in rewards]

    def script() -> list[float]:
        return [float(twin.one(twin.encode(group.prompt.messages, candidate.text))["score"])
                for group in groups for candidate in group.candidates]  # fmt: skip

    return {"script": script, "unshared": lambda: scored(single), "shared": lambda: scored(shared)}


if __name__ == "__main__":
    main()
