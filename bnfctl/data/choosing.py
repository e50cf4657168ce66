"""Which responses of a prompt become records: the rules of `--choose`, as plain functions of its rewards.

A rule sees only the responses that take part, as [C] rewards in sample order, and answers with positions in that
list.  Of equal rewards the first response counts as the better one at the top, and as the worse one at the bottom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bnfctl.config import BuildConfig
from bnfctl.data.pairing import uniform

Pair = tuple[int, int]
"""(position of the chosen response, position of the rejected one)."""

ONE_PER_PROMPT = ("best-worst", "best-random")
"""Rules whose records are named by their prompt alone."""


def pairs(config: BuildConfig, prompt_id: str, rewards: Sequence[float], lengths: Sequence[int]) -> list[Pair]:
    """What the rule proposes for one prompt of at least two responses; a pair may still have no margin.

    lengths: [C], used by `--length-balance` only.
    """
    if config.choose == "best-random":
        return best_and_random(rewards, uniform(config.seed, "random other", prompt_id))
    if config.choose == "all-pairs":
        return all_pairs(rewards)
    if config.choose == "top-bottom":
        return top_and_bottom(rewards, config.top_k)
    if config.length_balance is not None:
        return most_equal(rewards, lengths, config.length_balance, config.min_margin)
    return top_and_bottom(rewards, 1)


def top_and_bottom(rewards: Sequence[float], k: int) -> list[Pair]:
    """The best against the worst, the second best against the second worst, and so on, k times.

    Fewer where there are fewer than 2k responses: no response is at the top and at the bottom.
    """
    order = sorted(range(len(rewards)), key=lambda i: (-rewards[i], i))
    k = min(k, len(rewards) // 2)
    return list(zip(order[:k], sorted(order[k:], key=lambda i: (rewards[i], i))[:k], strict=True))


def best_and_random(rewards: Sequence[float], draw: float) -> list[Pair]:
    """The best against one of the others; `draw` in [0, 1) says which."""
    best = max(range(len(rewards)), key=lambda i: (rewards[i], -i))
    others = [i for i in range(len(rewards)) if i != best]
    return [(best, others[int(draw * len(others))])]


def all_pairs(rewards: Sequence[float]) -> list[Pair]:
    """Every two responses, the better one first: C (C - 1) / 2 pairs."""
    count = range(len(rewards))
    return [(i, j) if rewards[i] >= rewards[j] else (j, i) for i in count for j in count[i + 1 :]]


def most_equal(rewards: Sequence[float], lengths: Sequence[int], share: float, min_margin: float) -> list[Pair]:
    """Of the pairs with at least `share` of the largest margin, the one with the least difference in length.

    Of equals the one with the larger margin, then the first.  Only pairs above `min_margin` are looked at; where
    there is none, the best against the worst, which then has no margin either.
    """
    widest = top_and_bottom(rewards, 1)
    least = share * margin(rewards, widest[0])
    wide = [pair for pair in all_pairs(rewards) if margin(rewards, pair) >= least]
    fit = [pair for pair in wide if margin(rewards, pair) > min_margin]
    return [min(fit, key=lambda p: (abs(lengths[p[0]] - lengths[p[1]]), -margin(rewards, p)))] if fit else widest


def margin(rewards: Sequence[float], pair: Pair) -> float:
    """Reward of the chosen minus reward of the rejected."""
    return rewards[pair[0]] - rewards[pair[1]]


def label(config: BuildConfig, reward: float, mean: float) -> str | None:
    """The side of one response under `threshold`: "chosen", "rejected", or None between the two.

    mean: of all rewards of the prompt; what `--scope prompt` compares with.  Their difference counts to nine
    decimals: of 1, 1, 1, 1, 0 the ones are 0.2 above the mean, though 1 - 0.8 is a little less in floating point.
    """
    value = round(reward - mean, 9) if config.scope == "prompt" else reward
    if config.good is not None and value >= config.good:
        return "chosen"
    if config.bad is not None and value <= config.bad:
        return "rejected"
    return None


def record_name(config: BuildConfig, prompt_id: str, chosen: int | None, rejected: int | None) -> str:
    """A record's id from the sample numbers of its responses: PROMPT, PROMPT#2>0 (a pair) or PROMPT#2 (one response).

    Unique in a build, since prompt ids are and no rule takes the same responses twice.
    """
    if config.choose in ONE_PER_PROMPT:
        return prompt_id
    return f"{prompt_id}#{'>'.join(str(sample) for sample in (chosen, rejected) if sample is not None)}"


def combine(rewards: Sequence[Sequence[float | None]], weights: Sequence[float], how: str) -> list[float | None]:
    """[C] One reward per response of a prompt from [S, C] rewards of several scorers: their weighted sum.

    how: "raw" adds them as they are; "zscore" first takes each scorer's rewards to mean 0 and standard deviation 1
    over the prompt's responses (all 0 where they are equal), and counts to nine decimals, so that scorers that cancel
    each other leave no margin of rounding errors.  A response without a reward from every scorer has none, and counts
    in no mean.
    """
    whole = [c for c, found in enumerate(zip(*rewards, strict=True)) if None not in found]
    total: list[float | None] = [None] * len(rewards[0])
    for c in whole:
        total[c] = 0.0
    for row, weight in zip(rewards, weights, strict=True):
        values = [float(row[c] or 0.0) for c in whole]
        for c, value in zip(whole, values if how == "raw" else standardized(values), strict=True):
            total[c] = (total[c] or 0.0) + weight * value
    digits = None if how == "raw" else 9
    return [_finite(value, digits) for value in total]


def _finite(value: float | None, digits: int | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return value if digits is None else round(value, digits)


def mean(values: Sequence[float]) -> float:
    """The mean; exactly the value where all are equal, so that nothing is above or below it."""
    if min(values) == max(values):
        return values[0]
    largest = max(map(abs, values))  # no sum overflows
    return largest * (math.fsum(value / largest for value in values) / len(values))


def standardized(values: Sequence[float]) -> list[float]:
    """The values at mean 0 and (population) standard deviation 1; zeros where they are all equal."""
    if not values or min(values) == max(values):
        return [0.0] * len(values)
    largest = max(map(abs, values))  # no square overflows or vanishes
    scaled = [value / largest for value in values]
    center = mean(scaled)
    norm = math.hypot(*(value - center for value in scaled))
    return [(value - center) / norm * math.sqrt(len(values)) for value in scaled]
