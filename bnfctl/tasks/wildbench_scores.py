"""WildBench v2's two figures: the score of single responses, and the reward of pairwise choices.

Source: allenai/WildBench, the code of 2024-08-01; its quirks are kept and named.  A task file fills `Scored` or
`Comparison`; `summarize_scores` and `summarize_rewards` give every figure with an interval that resamples sessions.
The statistics behind them take `sessions`, the order of the counts, so that two models can be compared on the same
resamples (paired.bootstrap_difference), where column OVERALL or MACRO is picked.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from bnfctl.errors import UsageError
from bnfctl.tasks.statistics import DRAWS, Array, Bootstrap, Estimate, Statistic, bootstrap, ratio

GROUP_OF_TAG = {
    "Information seeking": "Information/Advice seeking",
    "Advice seeking": "Information/Advice seeking",
    "Creative Writing": "Creative Tasks",
    "Editing": "Creative Tasks",
    "Brainstorming": "Creative Tasks",
    "Role playing": "Creative Tasks",
    "Others": "Creative Tasks",
    "Coding & Debugging": "Coding & Debugging",
    "Reasoning": "Planning & Reasoning",
    "Planning": "Planning & Reasoning",
    "Math": "Math & Data Analysis",
    "Data Analysis": "Math & Data Analysis",
}
GROUPS = {
    "Creative Tasks": 0.5,
    "Planning & Reasoning": 1.25,
    "Math & Data Analysis": 1.0,
    "Information/Advice seeking": 0.75,
    "Coding & Debugging": 1.25,
}
"""Task groups and their share in the macro mean (of 4.75)."""
OVERALL, MACRO = 0, 1
"""Columns of the statistics; the groups follow in the order of GROUPS."""

CHOICES = {"A++": 1.0, "A+": 0.5, "A=B": 0.0, "B+": -0.5, "B++": -1.0}
"""Pairwise choices and what they are worth to A."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A judge's score of one response."""

    session_id: str
    score: float | None
    """1 to 10 (1 for an empty response, without a call); None where none could be read: the item is dropped."""
    length: int
    """Characters of the response."""
    tags: tuple[str, ...] = ()
    """Primary and secondary tags; the item counts once in every group that they name."""
    whole: bool = True
    """Neither empty nor cut short.  Others count in the overall mean only: not in groups, length or Elo."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A judge's choice between the model's response and a reference model's: one game, sides at random."""

    session_id: str
    choice: str | None
    """One of CHOICES; None where none could be read: the item is dropped."""
    model_is_a: bool
    length: int
    """Characters of the model's response."""
    other_length: int
    tags: tuple[str, ...] = ()
    whole: bool = True
    """Both responses neither empty nor cut; others are worth 0 but stay in the divisor of the overall reward."""


@dataclass(frozen=True)
class Summary:
    """Points of one model: -80 to 100 for scores, where 5 of 10 is 0; -100 to 100 for rewards."""

    n: int
    dropped: int
    """Items whose judgment could not be read; not in n."""
    overall: Estimate
    macro: Estimate
    groups: dict[str, Estimate]
    """Only groups with an item; the macro mean is over these, by their shares."""
    length: float
    """Mean characters of whole responses; NaN without any."""


def groups_of(tags: Sequence[str]) -> set[str]:
    """The task groups of an item; UsageError for an unknown tag."""
    unknown = [tag for tag in tags if tag not in GROUP_OF_TAG]
    if unknown:
        raise UsageError(f"no WildBench tag: '{unknown[0]}'", hint=f"tags: {', '.join(GROUP_OF_TAG)}")
    return {GROUP_OF_TAG[tag] for tag in tags}


def points(score: float) -> float:
    """A score of 1 to 10 on the leaderboard's scale: its adjusted score, (score - 5) * 2, times 10."""
    return (score - 5) * 20


def reward(comparison: Comparison, length_penalty: int = -1) -> float:
    """What the choice is worth to the model: 1, 0.5, 0, -0.5, -1; 0 unless both responses are whole.

    length_penalty K >= 0: a slight win is a tie where the winner is longer by more than K characters; -1: never.
    """
    if comparison.choice is None or not comparison.whole:
        return 0.0
    if comparison.choice not in CHOICES:
        raise UsageError(f"no choice: '{comparison.choice}'", hint=f"choices: {', '.join(CHOICES)}")
    value = CHOICES[comparison.choice] * (1 if comparison.model_is_a else -1)
    longer = (comparison.length - comparison.other_length) * (1 if value > 0 else -1)
    return 0.0 if abs(value) == 0.5 and 0 <= length_penalty < longer else value


def score_statistic(items: Sequence[Scored], sessions: Sequence[str]) -> Statistic:
    """Counts of `sessions` [b, C] -> points [b, 2 + groups]; every item's session is one of them."""
    return _statistic([(item, points(item.score)) for item in items if item.score is not None], sessions)


def reward_statistic(items: Sequence[Comparison], sessions: Sequence[str], length_penalty: int = -1) -> Statistic:
    """Counts of `sessions` [b, C] -> rewards in points [b, 2 + groups]; every item's session is one of them."""
    valued = [(item, 100 * reward(item, length_penalty)) for item in items if item.choice is not None]
    return _statistic(valued, sessions)


def _statistic(valued: Sequence[tuple[Scored | Comparison, float]], sessions: Sequence[str]) -> Statistic:
    """Overall over all items; groups over whole ones; macro over the groups there are."""
    place = {session: c for c, session in enumerate(sessions)}
    top, bottom = np.zeros((2, len(sessions), 1 + len(GROUPS)))
    for item, value in valued:
        mine = groups_of(item.tags) if item.whole else ()
        for column, group in enumerate(("", *GROUPS)):
            if not group or group in mine:
                top[place[item.session_id], column] += value
                bottom[place[item.session_id], column] += 1
    means = ratio(top, bottom)
    shares = np.array(list(GROUPS.values()))

    def of(counts: Array) -> Array:
        found = means(counts)
        groups = found[:, 1:]
        there = shares * ~np.isnan(groups)
        with np.errstate(invalid="ignore"):
            macro = np.nansum(groups * shares, axis=1) / there.sum(1)
        return np.concatenate([found[:, :1], macro[:, None], groups], axis=1)

    return of


def summarize_scores(items: Sequence[Scored], draws: int = DRAWS, seed: int = 0) -> Summary:
    """Every figure of WB-Score.  UsageError where no item has a score."""
    kept = [item for item in items if item.score is not None]
    sessions = _sessions([item.session_id for item in kept])
    found = bootstrap(score_statistic(kept, sessions), len(sessions), draws, seed)
    return _summary(found, len(items) - len(kept), kept)


def summarize_rewards(
    items: Sequence[Comparison], length_penalty: int = -1, draws: int = DRAWS, seed: int = 0
) -> Summary:
    """Every figure of WB-Reward against one reference.  UsageError where no item has a choice."""
    kept = [item for item in items if item.choice is not None]
    sessions = _sessions([item.session_id for item in kept])
    found = bootstrap(reward_statistic(kept, sessions, length_penalty), len(sessions), draws, seed)
    return _summary(found, len(items) - len(kept), kept)


def reward_mix(
    references: Sequence[Sequence[Comparison]], length_penalty: int = -1, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """The mean of the overall rewards against several reference models, sessions resampled once for all of them."""
    sessions = list(dict.fromkeys(item.session_id for items in references for item in items if item.choice))
    each = [reward_statistic(items, sessions, length_penalty) for items in references]
    mean: Statistic = lambda counts: np.mean([one(counts)[:, OVERALL] for one in each], axis=0)  # noqa: E731
    return bootstrap(mean, len(sessions), draws, seed).estimate()


def _sessions(ids: list[str]) -> list[str]:
    if not ids:
        raise UsageError("no judgment could be read", hint="bnfctl show of the rows tells what the judge wrote")
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise UsageError("a session is judged twice", where=twice, hint="one row for each session and model")
    return ids


def _summary(found: Bootstrap, dropped: int, kept: Sequence[Scored | Comparison]) -> Summary:
    whole = [item for item in kept if item.whole]
    members = Counter(group for item in whole for group in groups_of(item.tags))
    return Summary(
        found.n,
        dropped,
        found.estimate(OVERALL),
        found.estimate(MACRO),
        {
            group: dataclasses.replace(found.estimate(2 + g), n=members[group])
            for g, group in enumerate(GROUPS)
            if members[group]
        },
        fmean(item.length for item in whole) if whole else math.nan,
    )
