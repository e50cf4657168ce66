"""Figures of judged tasks in tables: pools and fits are made here, over all models of the report, from the stored rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from bnfctl.errors import UsageError
from bnfctl.report.evidence import Result
from bnfctl.report.measure import Measure, Scene
from bnfctl.tasks.arena_hard import battles_of
from bnfctl.tasks.battles import Battle, Pool, make_pool, win_rate_statistic
from bnfctl.tasks.bradley_terry import unbounded
from bnfctl.tasks.elo import fitted_statistic, votes_of
from bnfctl.tasks.judging import Judged
from bnfctl.tasks.length_control import lc_equal_length, lc_equal_length_statistic, lc_official, lc_official_statistic
from bnfctl.tasks.statistics import Array, Bootstrap, Statistic, bootstrap
from bnfctl.tasks.wildbench import scored_of
from bnfctl.tasks.wildbench_pairs import WildBenchPairs
from bnfctl.tasks.wildbench_scores import MACRO, OVERALL, groups_of, reward_statistic, score_statistic

LENGTHS_UNKNOWN = "the responses are not known, so neither are their lengths"
_ALONE = "its figure is relative to a pool, and no other model here has the same judge"


def _rows(result: Result, items: frozenset[str]) -> list[Judged]:
    return [row for row in result.rows.judged if row.answered.item.id in items]


def _measure(
    scene: Scene, name: str, statistic: Statistic, sizes: Mapping[str, int], decimals: int = 1,
    why: Mapping[str, str] | None = None, notes: Sequence[str] = (), counted: bool = True,
) -> Measure:  # fmt: skip
    """sizes: run's ref -> n of its figure, in the order of the statistic's columns."""
    found = bootstrap(statistic, len(scene.items), scene.evidence.draws)
    estimates = {ref: replace(found.estimate(r), n=n) for r, (ref, n) in enumerate(sizes.items())}
    kept = {ref: one for ref, one in estimates.items() if np.isfinite(one.mean)}
    unread = {ref: "no judgment could be read" for ref in estimates if ref not in kept}
    columns = [r for r, ref in enumerate(sizes) if ref in kept]
    return Measure(
        scene.task, scene.heading, name, kept, lambda counts: statistic(counts)[:, columns], len(scene.items),
        scene.heading, scene.sources, {**unread, **(why or {})}, decimals, share="%" in name, counted=counted,
        notes=tuple(notes), draws=scene.evidence.draws,
        resampled=Bootstrap(found.n, found.point[columns], found.values[:, columns]),
    )  # fmt: skip


def wildbench(scene: Scene) -> list[Measure]:
    """WB-Elo in the report's own pool, and the score: the macro mean in points, as the paper's table has it."""
    items = frozenset(scene.items)
    runs = list(scene.results)
    scored = {ref: scored_of(_rows(result, items)) for ref, result in scene.results.items()}
    sizes = {ref: sum(one.score is not None for one in scored[ref]) for ref in runs}
    tagged = all(any(groups_of(one.tags) for one in mine) for mine in scored.values())
    column, name = (MACRO, "Score") if tagged else (OVERALL, "Score (overall)")
    each = [score_statistic(scored[ref], scene.items) for ref in runs]
    notes = ("Score: the mean over task groups by their shares, in points: (score of 1 to 10 - 5) x 20.",)
    if not tagged:
        notes = ("Score: the mean over all items in points, (score of 1 to 10 - 5) x 20: their groups are not known.",)
    score = _measure(scene, name, _side_by_side(each, column), sizes, notes=notes)
    return [_elo(scene, runs, items), score]


def _side_by_side(each: Sequence[Statistic], column: int) -> Statistic:
    return lambda counts: np.stack([one(counts)[:, column] for one in each], axis=1)


def _elo(scene: Scene, runs: Sequence[str], items: frozenset[str]) -> Measure:
    pool = {ref: scored_of(_rows(result, items)) for ref, result in scene.pool().items()}
    votes = votes_of(pool)
    sessions: dict[str, set[str]] = {}
    for vote in votes:
        for ref in (vote.first, vote.second):
            sessions.setdefault(ref, set()).add(vote.session_id)
    # A model that nobody voted on would get the mean of all, which nothing says.
    models, mine = [ref for ref in pool if ref in sessions], [ref for ref in runs if ref in sessions]
    no_votes = "no other model has scores of the same whole responses"
    why = dict.fromkeys((ref for ref in runs if ref not in sessions), _ALONE if len(pool) < 2 else no_votes)
    if not mine:
        return Measure(
            scene.task, scene.heading, "Elo", {}, None, len(scene.items), scene.heading, scene.sources, why, 0
        )
    statistic, wins = fitted_statistic(votes, models)
    place = {item: number for number, item in enumerate(scene.items)}
    voted = [place[session] for session in dict.fromkeys(vote.session_id for vote in votes)]
    columns = [models.index(ref) for ref in mine]
    notes = [
        f"Elo: Bradley-Terry of WB-Scores in the local pool ({len(models)} models, mean 1000); not the published one."
    ]
    if unbounded(wins.sum(0)):
        notes.append("Elo: some model never lost or never won; how far it is from the others is not in the data.")
    sizes = {ref: len(sessions[ref]) for ref in mine}
    return _measure(scene, "Elo", lambda counts: statistic(counts[:, voted])[:, columns], sizes, 0, why, notes)


def pairs(scene: Scene) -> list[Measure]:
    """WB-Reward: the mean over the references, in points, without and with the length penalty of the publication."""
    items, runs = frozenset(scene.items), list(scene.results)
    task = WildBenchPairs()
    made = []
    for penalty, name in ((-1, "Reward"), (500, "Reward K=500")):
        each = []
        for result in scene.results.values():
            rows = _rows(result, items)
            references = list(dict.fromkeys(reference for row in rows for reference in row.extra["games"]))
            each.append(
                _mixed([reward_statistic(task.comparisons(rows, [one]), scene.items, penalty) for one in references])
            )
        sizes = {ref: sum(row.value is not None for row in _rows(scene.results[ref], items)) for ref in runs}
        made.append(_measure(scene, name, _side_by_side(each, 0), sizes, counted=penalty == -1))
    return made


def _mixed(each: Sequence[Statistic]) -> Statistic:
    return lambda counts: np.mean([one(counts)[:, [OVERALL]] for one in each], axis=0)


def arena_hard(scene: Scene) -> list[Measure]:
    """Length-controlled win rates, over the report's pool and at equal lengths, and the win rate."""
    items = frozenset(scene.items)
    runs = list(scene.results)
    nulls = "game" if next(iter(scene.results.values())).table.get("generation", "2024") == "2024" else "prompt"
    sized = {ref: result for ref, result in scene.pool().items() if _sized(result, items)}
    own = _pool(scene.results, items, scene.items, nulls)
    rate = _measure(
        scene, "WR (%)", _percent(win_rate_statistic(own)), dict(zip(runs, own.counted.tolist(), strict=True))
    )
    mine = [ref for ref in runs if ref in sized]
    why = {ref: LENGTHS_UNKNOWN for ref in runs if ref not in sized}
    empty = replace(rate, estimates={}, statistic=None, resampled=None, notes=())
    if not mine:
        return [
            replace(empty, name="LC (%)", why=why),
            replace(empty, name="LC equal (%)", why=why, counted=False),
            rate,
        ]
    pool = _pool(sized, items, scene.items, nulls)
    return [_official(scene, empty, pool, mine, why), _equal(scene, empty, pool, mine, why), rate]


def _sized(result: Result, items: frozenset[str]) -> bool:
    return all(row.extra["length"] is not None for row in _rows(result, items))


def _pool(results: dict[str, Result], items: frozenset[str], order: Sequence[str], nulls: str) -> Pool:
    """The battles of these runs on these items, the prompts in the order given."""
    battles: list[Battle] = []
    for ref, result in results.items():
        battles += [replace(battle, model=ref) for battle in battles_of(_rows(result, items))]
    place = {item: number for number, item in enumerate(order)}
    battles.sort(key=lambda battle: place[battle.prompt_id])  # stable; prompts are numbered by first appearance
    made = make_pool(battles, nulls)  # type: ignore[arg-type]
    wanted = [made.models.index(ref) for ref in results if ref in made.models]
    return Pool(
        tuple(made.models[m] for m in wanted),
        made.prompts,
        made.weight[wanted],
        made.score[wanted],
        made.surplus[wanted],
    )


def _percent(statistic: Statistic) -> Statistic:
    return lambda counts: 100 * statistic(counts)


def _official(scene: Scene, empty: Measure, pool: Pool, runs: Sequence[str], why: dict[str, str]) -> Measure:
    empty = replace(empty, name="LC (%)")
    try:
        joint = lc_official_statistic(pool)
        flags = lc_official(pool, draws=2)
    except UsageError as error:
        return replace(empty, why={**why, **dict.fromkeys(runs, error.what)})
    columns = [pool.models.index(ref) for ref in runs]
    notes = [
        f"LC: the official length control, over the pool of the {len(pool.models)} models here; it depends on them."
    ]
    notes += _stopped("LC", [scene.results[ref].run.title for ref in runs if flags[ref].separated])
    sizes = {ref: int(pool.counted[m]) for ref, m in zip(runs, columns, strict=True)}
    return _measure(scene, "LC (%)", _percent(lambda counts: joint(counts)[:, columns]), sizes, why=why, notes=notes)


def _equal(scene: Scene, empty: Measure, pool: Pool, runs: Sequence[str], why: dict[str, str]) -> Measure:
    each: dict[str, Callable[[Array], Array]] = {}
    why, stopped = dict(why), []
    for ref in runs:
        alone = pool.only(ref)
        try:
            each[ref] = lc_equal_length_statistic(alone)
            if lc_equal_length(alone, draws=2)[ref].separated:
                stopped.append(scene.results[ref].run.title)
        except UsageError as error:
            why[ref] = error.what
    if not each:
        return replace(empty, name="LC equal (%)", why=why, counted=False)
    sizes = {ref: int(pool.counted[pool.models.index(ref)]) for ref in each}
    notes = ("LC equal: the win rate at equal lengths, of each model alone; not counted in the average rank.",)
    joined: Statistic = lambda counts: np.concatenate([one(counts) for one in each.values()], axis=1)  # noqa: E731
    return _measure(
        scene, "LC equal (%)", _percent(joined), sizes, why=why, counted=False, notes=(*notes, *_stopped("LC equal", stopped)),
    )  # fmt: skip


def _stopped(name: str, models: Sequence[str]) -> list[str]:
    if not models:
        return []
    return [f"{name} of {', '.join(models)}: lengths tell wins from losses without a miss; the fit is stopped short."]
