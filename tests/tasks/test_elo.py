"""WB-Elo: the update of one vote, votes from scores at every margin, a loop as a twin, the fit of the same votes."""

from __future__ import annotations

import numpy as np
import pytest

from bnfctl.tasks.elo import Vote, fitted, online, votes_of
from bnfctl.tasks.wildbench_scores import Scored


def rated(found: dict) -> dict[str, float]:
    return {model: estimate.mean for model, estimate in found.items()}


def test_one_vote() -> None:
    assert rated(online([Vote("s", "a", "b", 1.0)], ["a", "b"])) == {"a": 1002, "b": 998}
    assert rated(online([Vote("s", "a", "b", 0.0)], ["a", "b"])) == {"a": 998, "b": 1002}
    assert rated(online([Vote("s", "a", "b", 0.5)], ["a", "b"])) == {"a": 1000, "b": 1000}
    # 400 points ahead: expected 10 / 11
    found = rated(online([Vote("s", "a", "b", 1.0)], ["a", "b"], known={"a": 1400.0}, step=11))
    assert found == {"a": pytest.approx(1401), "b": pytest.approx(999)}


def pair(score: float, other: float, length: int = 100, other_length: int = 100, **margins: float) -> list[float]:
    scored = {"a": [Scored("s", score, length)], "b": [Scored("s", other, other_length)]}
    return [vote.score for vote in votes_of(scored, **margins)]


def test_votes_of_scores() -> None:
    assert (pair(8, 6), pair(6, 8), pair(7, 6), pair(6, 6)) == ([1.0], [0.0], [0.5], [0.5])
    older = {"margin": 3.0, "tie_margin": 1.0}
    assert (pair(9, 6, **older), pair(8, 6, **older), pair(7, 6, **older)) == ([1.0], [], [0.5])
    # Longer or shorter by exactly the margin is no tie, by one more it is.
    assert (pair(9, 1, 1600, 100), pair(9, 1, 1601, 100), pair(9, 1, 100, 1601)) == ([1.0], [0.5], [0.5])
    assert pair(9, 1, 9000, 0, length_margin=None) == [1.0]


def test_votes_need_two_whole_scored_responses() -> None:
    scored = {
        "a": [Scored("1", 9, 10), Scored("2", 9, 10, whole=False), Scored("3", 9, 10), Scored("4", 9, 10)],
        "b": [Scored("1", 5, 10), Scored("2", 5, 10), Scored("3", None, 10)],
        "c": [Scored("4", 9, 10), Scored("1", 1, 10)],
    }
    found = votes_of(scored)
    assert found == [
        Vote("1", "a", "b", 1.0),
        Vote("1", "a", "c", 1.0),
        Vote("4", "a", "c", 0.5),
        Vote("1", "b", "c", 1.0),
    ]
    assert votes_of(scored, known={"a": 1100, "c": 1050}) == [found[0], found[3]]


def loop(votes: list[Vote], start: dict[str, float], known: set[str], interval: int) -> dict[str, float]:
    """One round in the given order, as plainly as it can be said."""
    rating, seen = dict(start), dict.fromkeys(start, 0)
    for vote in votes:
        expected = 1 / (1 + 10 ** ((rating[vote.second] - rating[vote.first]) / 400))
        gain = 4 * (vote.score - expected)
        rating[vote.first] += gain
        rating[vote.second] -= gain
        for model in (vote.first, vote.second):
            seen[model] += 1
            if model in known and seen[model] % interval == 0:
                rating[model] = (rating[model] + start[model]) / 2
    return rating


def test_rounds_equal_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    source = np.random.default_rng(1)
    names = ["old", "x", "y"]
    votes = []
    for s in range(200):
        i, j = source.choice(3, 2, replace=False)
        votes.append(Vote(str(s), names[i], names[j], float(source.choice([0, 0.5, 1]))))
    orders = np.random.default_rng(5)
    expected = [
        loop([votes[v] for v in orders.permutation(200)], {"old": 1150.0, "x": 1000.0, "y": 1000.0}, {"old"}, 7)
        for _ in range(6)
    ]
    found = online(votes, names, {"old": 1150.0}, rounds=6, interval=7, seed=5)
    for name in names:
        assert found[name].mean == pytest.approx(np.mean([each[name] for each in expected]))
        assert found[name].low == pytest.approx(np.percentile([each[name] for each in expected], 2.5))
    assert sum(estimate.n for estimate in found.values()) == 400


def test_known_models_stay_unless_dynamic() -> None:
    votes = [Vote(str(s), "old", "new", 0.0) for s in range(50)]
    still = rated(online(votes, ["old", "new"], {"old": 1100.0}, dynamic=False))
    assert still["old"] == 1100 and still["new"] > 1050
    assert rated(online(votes, ["old", "new"], {"old": 1100.0}))["old"] < 1100
    # Points are neither made nor lost while nobody is known.
    assert sum(rated(online(votes, ["old", "new"])).values()) == pytest.approx(2000)


def table(gaps: dict[str, float], sessions: int, seed: int) -> dict[str, list[Scored]]:
    source = np.random.default_rng(seed)
    hard = source.normal(0, 1, sessions)
    return {
        name: [
            Scored(str(s), float(np.clip(np.round(6 + gap - hard[s] + source.normal(0, 1.2)), 1, 10)), 100)
            for s in range(sessions)
        ]
        for name, gap in gaps.items()
    }


def test_the_fit_orders_as_the_online_rating_and_is_no_lottery() -> None:
    """4 models, 300 sessions, seed 3: the fit does not depend on the order of the votes; its interval is wider."""
    gaps = {"a": -1.0, "b": 0.0, "c": 0.4, "d": 1.5}
    votes = votes_of(table(gaps, 300, 3))
    fit, walk = fitted(votes, list(gaps), draws=500), online(votes, list(gaps))
    assert not fit.unbounded
    assert sorted(gaps, key=lambda m: fit.ratings[m].mean) == sorted(gaps, key=lambda m: walk[m].mean) == list(gaps)
    assert np.mean([estimate.mean for estimate in fit.ratings.values()]) == pytest.approx(1000)
    for model in gaps:
        assert walk[model].mean == pytest.approx(fit.ratings[model].mean, abs=25)
        assert fit.ratings[model].low < fit.ratings[model].mean < fit.ratings[model].high
    again = fitted(votes[::-1], list(gaps), draws=10)
    assert {m: e.mean for m, e in again.ratings.items()} == pytest.approx(rated(fit.ratings), abs=1e-6)


def test_the_fit_is_anchored_at_known_models() -> None:
    votes = votes_of(table({"a": 0.0, "b": 1.0, "c": 2.0}, 100, 4))
    free = rated(fitted(votes, ["a", "b", "c"], draws=10).ratings)
    moved = rated(fitted(votes, ["a", "b", "c"], known={"a": 1100.0}, draws=10).ratings)
    assert moved["a"] == pytest.approx(1100)
    assert moved["c"] - moved["a"] == pytest.approx(free["c"] - free["a"])


def test_a_model_that_never_loses_is_reported() -> None:
    assert fitted([Vote("1", "a", "b", 1.0), Vote("2", "a", "b", 1.0)], ["a", "b"], draws=10).unbounded
    assert not fitted([Vote("1", "a", "b", 1.0), Vote("2", "a", "b", 0.5)], ["a", "b"], draws=10).unbounded
