"""Prompts, responses and comparisons for the tests of the ArmoRM scorer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bnfctl.config import ScoreConfig
from bnfctl.data.records import Candidate, Group, Prompt, Reward
from bnfctl.scorers.armorm import OBJECTIVES, ArmoRMScorer
from tests.scorers.armorm_twin import TEMPLATES, Twin, write_tokenizer

TOLERANCE = 1e-5


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


ASSISTANT = {"role": "assistant", "content": "Which one?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TURN_LISTS: list[tuple[dict[str, str], ...]] = [
    (user("Name a synonym for beautiful."),),
    (SYSTEM, user("Name a synonym for beautiful.")),
    (user("Hi"), ASSISTANT, user("The second assistant, please")),
    (SYSTEM, user("a"), ASSISTANT, user("b"), ASSISTANT, user("  c\n\n")),
    (user("long " * 30),),
    (user(""),),
]
RESPONSES = ("Pretty.", "no", "", "Lovely, handsome\n\nand more " * 3, "assistant", "日本語 🙂", " spaces around \n")


def group(number: int, turns: tuple[dict[str, str], ...], *texts: str) -> Group:
    return Group(Prompt(f"p{number}", turns), tuple(Candidate(f"p{number}", i, text) for i, text in enumerate(texts)))


GROUPS = [group(i, turns, *RESPONSES[: 3 + i]) for i, turns in enumerate(TURN_LISTS)]


def config(**changes: Any) -> ScoreConfig:
    return ScoreConfig(**{"input": "x", "scorer": "armorm", "dtype": "float32", **changes})


def flat(scorer: ArmoRMScorer, groups: list[Group]) -> list[Reward]:
    return [reward for rewards in scorer.score(groups) for reward in rewards]


def table(rewards: list[Reward]) -> torch.Tensor:
    """[N, 39]: value, objectives, gating."""
    assert all(list(reward.extra["objectives"]) == list(OBJECTIVES) for reward in rewards)
    rows = [[r.value, *r.extra["objectives"].values(), *r.extra["gating"].values()] for r in rewards]
    return torch.tensor(rows)


def outputs(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([found["score"].unsqueeze(-1), found["rewards"], found["gating"]], dim=-1)


def assert_close(found: torch.Tensor, exact: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == exact.shape
    assert float((found - exact).abs().max()) < tolerance


def alone(twin: Twin) -> torch.Tensor:
    """[N, 39] of all candidates of GROUPS by the twin, each by itself."""
    ids = [twin.encode(one.prompt.messages, candidate.text) for one in GROUPS for candidate in one.candidates]
    return torch.stack([outputs(twin.one(row)) for row in ids])


def retokenized(folder: Path, path: Path, **options: Any) -> Path:
    """The same parameters with another tokenizer."""
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).symlink_to(file)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (path / name).unlink()
    write_tokenizer(path, **{"template": TEMPLATES["on request"], **options})
    return path
