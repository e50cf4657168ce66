"""Arena-Hard's files in both schemas: questions, responses ("model answers") and judgments, of 2024 and of 2025.

2024: `question_id`, `turns`, `choices`, `model_id`.  2025: `uid`, `prompt`, `messages`, `model`.  Rows may be in JSONL,
JSON, Parquet or CSV; a file may hold either schema.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bnfctl import hub
from bnfctl.artifact import Pinned
from bnfctl.data.records import Prompt
from bnfctl.errors import UsageError
from bnfctl.tasks.imports import id_in, responses_in
from bnfctl.tasks.items import ENDINGS, Source, current, read_file

SOURCE = Source(
    "lmarena-ai/arena-hard-auto@15f3746e21432264ce9b453999bde4f3c946d2e6", None, "train", 500,
    ("arena-hard-v0.1", "arena-hard"), inside="/question",
)  # fmt: skip
_HUB_FOLDER = "data/arena-hard-v0.1"


def locate(data_dir: Path | None, pinned: Pinned | None, baseline: str) -> tuple[Path, Path]:
    """(file of the questions, file of the baseline's responses), of the user's folder or of the hub's data set.

    data_dir: a folder with question.jsonl and model_answer/BASELINE.jsonl, or the one above it.  UsageError says what is
    missing.
    """
    names = ("question", f"model_answer/{baseline}")
    if data_dir is None:
        pinned = pinned or current(SOURCE)
        return _fetched(pinned, f"{_HUB_FOLDER}/{names[0]}.jsonl"), _fetched(pinned, f"{_HUB_FOLDER}/{names[1]}.jsonl")
    folders = [data_dir, *(data_dir / name for name in SOURCE.names)]
    found = []
    for name in names:
        places = [folder / f"{name}{ending}" for folder in folders for ending in ENDINGS]
        place = next((place for place in places if place.is_file()), None)
        if place is None:
            raise UsageError(
                f"no {SOURCE.names[0]}/{name}.jsonl in it", where=f"--data-dir {data_dir}",
                hint=f"the folder data/ of lmarena/arena-hard-auto; responses of {baseline} belong to the task",
            )  # fmt: skip
        found.append(place)
    return found[0], found[1]


def _fetched(pinned: Pinned, file: str) -> Path:
    """One file of a hub data set at a commit; the cached one where there is no network."""
    from huggingface_hub import hf_hub_download

    name, commit = hub.split_revision(pinned.ref)
    try:
        return Path(hf_hub_download(name, file, revision=commit, repo_type="dataset", etag_timeout=hub.TIMEOUT))
    except Exception as error:  # every client error means the same to the user: it could not be fetched
        raise UsageError(
            f"could not fetch {file}: {str(error).splitlines()[0]}", where=pinned.ref,
            hint="--data-dir FOLDER with arena-hard-v0.1/question.jsonl and its model_answer/",
        ) from None  # fmt: skip


def read_questions(path: Path) -> dict[str, Prompt]:
    """id -> its prompt, in the file's order.  UsageError for a broken row and for an id that is there twice."""
    found: dict[str, Prompt] = {}
    for where, row in read_file(path):
        item_id = id_in({name: row.get(name) for name in ("question_id", "uid")})
        text = row["prompt"] if "prompt" in row else _turn(row)
        if item_id is None or not isinstance(text, str) or not text.strip():
            hint = f"question_id and turns, or uid and prompt; columns here: {', '.join(row)}"
            raise UsageError("no question of Arena-Hard", where=where, hint=hint)
        if item_id in found:
            places = f"{found[item_id].where} and {where}"
            raise UsageError(f"two questions with the id {item_id}", where=places, hint="give each its own id")
        found[item_id] = Prompt(item_id, ({"role": "user", "content": text},), where=where)
    if not found:
        raise UsageError("no questions", where=str(path), hint="the file is empty")
    return found


def _turn(row: dict[str, Any]) -> Any:
    """The text of the only turn: v0.1 has no others."""
    turns = row.get("turns")
    return (
        turns[0].get("content") if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], dict) else None
    )


def responses_of(row: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """(model or "", text) of each response in a row of either schema, or of plain rows; UsageError where there is none."""
    if isinstance(row.get("choices"), list) and row["choices"]:
        text, model = _turn(row["choices"][0]), row.get("model_id")
    elif isinstance(row.get("messages"), list) and row["messages"]:
        text, model = row["messages"][-1].get("content"), row.get("model")
        text = text.get("answer") if isinstance(text, dict) else text
    else:
        return responses_in(row, where)
    if not isinstance(text, str):
        raise UsageError("no response", where=where, hint="choices[0].turns[0].content, or messages[-1].content.answer")
    return [(model if isinstance(model, str) else "", text)]


def read_baseline(path: Path, questions: dict[str, Prompt]) -> dict[str, str]:
    """id -> the baseline's response.  UsageError where a question has none, or two."""
    found: dict[str, str] = {}
    for where, row in read_file(path):
        item_id = id_in(row)
        if item_id is None or item_id in found:
            raise UsageError(f"no id, or a second response to {item_id}", where=where, hint="one row for each question")
        found[item_id] = responses_of(row, where)[0][1]
    for missing in questions.keys() - found.keys():
        raise UsageError(f"the baseline has no response to {missing}", where=str(path), hint="fetch the file again")
    return found


def read_judgments(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(id, model, row) of a file of judgments, with `games` as [{"text", "score"?}, ...] in their order.

    A game that was never judged (null in 2025, "$ERROR$" in 2024) has no text and the score None.  UsageError for a row
    that is no judgment.
    """
    for where, row in read_file(path):
        item_id, games = id_in(row), row.get("games")
        if item_id is None or not isinstance(games, list) or len(games) != 2 or not isinstance(row.get("model"), str):
            hint = f"question_id or uid, model, and two games; columns here: {', '.join(row)}"
            raise UsageError("no judgment of Arena-Hard", where=where, hint=hint)
        yield item_id, row["model"], {"judge": str(row.get("judge", "")), "games": [_game(game) for game in games]}


def _game(game: Any) -> dict[str, Any]:
    if not isinstance(game, dict):
        return {"text": "", "score": None}
    text = game.get("judgment")
    text = text.get("answer") if isinstance(text, dict) else text
    if not isinstance(text, str) or text.strip() == "$ERROR$":
        text = ""
    return {"text": text, **({"score": game["score"]} if "score" in game else {})}
