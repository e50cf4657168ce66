"""Where prompts and preference sets come from: a JSONL file, a hub data set, or the lab; pinned by content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bnfctl import hub
from bnfctl.artifact import Pinned, Store
from bnfctl.data.jsonl import read_jsonl
from bnfctl.data.records import Message, Prompt
from bnfctl.errors import UsageError, nearest
from bnfctl.options import fingerprint
from bnfctl.tables import PROMPTS, load

_ROLES = ("system", "user", "assistant", "tool")


def pin_data(ref: str, store: Store, where: str, split: str = "train") -> Pinned:
    """The data behind `ref`, by the content of the file, the commit of the hub data set, or the lab's rows."""
    path = Path(ref).expanduser()
    if path.is_file():
        return Pinned("file", str(path.absolute()), store.digests.file(path), str(path.absolute()))
    source, _, rest = ref.partition(":")
    if rest and source in PROMPTS:
        load(PROMPTS, source, "prompts")(rest, split, 1)  # refuses an unknown family or split
        # Enumerating the rows would cost more than hashing the code that draws them.
        code = Path(load(PROMPTS, source, "prompts").__code__.co_filename).parent.glob("*.py")
        return Pinned("lab", ref, fingerprint([rest, split, [store.digests.file(path) for path in sorted(code)]]))
    if hub.looks_like_hub(ref) and path.suffix not in (".jsonl", ".json") and not path.parent.is_dir():
        commit, why = hub.commit_of(ref, "dataset")
        name, _ = hub.split_revision(ref)
        return Pinned("hub-data", f"{name}@{commit}" if commit else ref, commit, None, why or None)
    raise UsageError(f"no such file '{ref}'", where=where, hint="a JSONL file, a hub data set (owner/name) or lab:chat")


def read_rows(pinned: Pinned, split: str, subset: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """("where", row) of a pinned file or hub data set, streamed."""
    if pinned.kind == "file":
        assert pinned.path is not None
        yield from read_jsonl(Path(pinned.path))
        return
    import datasets

    name, commit = hub.split_revision(pinned.ref)
    try:
        rows = datasets.load_dataset(name, subset, split=split, revision=commit)
    except Exception as error:  # every client error means the same to the user: it could not be fetched
        raise UsageError(f"could not load {pinned.ref} ({split}): {error}", hint="check --split and --subset") from None
    for number, row in enumerate(rows):
        yield f"{pinned.ref} {split}[{number}]", dict(row)


def read_prompts(
    pinned: Pinned, *, split: str, subset: str | None, prompt_column: str, answer_column: str, limit: int | None
) -> tuple[list[Prompt], int]:
    """(prompts in their order with unique ids, how many repeated ones were dropped).

    A row without an id gets one from its content, so ids are stable across runs and orders.
    """
    found: dict[str, Prompt] = {}
    repeated = 0
    for prompt, given in _prompts(pinned, split, subset, prompt_column, answer_column):
        earlier = found.get(prompt.id)
        if earlier is None:
            found[prompt.id] = prompt
        elif given and earlier.messages != prompt.messages:
            raise UsageError(
                f"two prompts with the id {prompt.id}", where=f"{earlier.where} and {prompt.where}",
                hint="give each prompt its own id, or none",
            )  # fmt: skip
        else:
            repeated += 1
        if limit is not None and len(found) == limit:
            break
    if not found:
        raise UsageError("no prompts", where=pinned.ref, hint="the file is empty, or --split is")
    return list(found.values()), repeated


def _prompts(
    pinned: Pinned, split: str, subset: str | None, prompt_column: str, answer_column: str
) -> Iterator[tuple[Prompt, bool]]:
    if pinned.kind == "lab":
        source, _, family = pinned.ref.partition(":")
        for row in load(PROMPTS, source, "prompts")(family, split):
            yield Prompt(row["id"], as_messages(row["prompt"], row["id"]), row["answer"], row["id"]), True
        return
    for where, row in read_rows(pinned, split, subset):
        messages = as_messages(pick(row, prompt_column, where, also=("messages",)), where)
        answer = row.get(answer_column)
        given = row["prompt_id"] if row.get("prompt_id") is not None else row.get("id")
        identity = str(given) if given is not None else prompt_id(messages)
        yield Prompt(identity, messages, None if answer is None else str(answer), where), given is not None


def pick(row: dict[str, Any], column: str, where: str, also: tuple[str, ...] = ()) -> Any:
    """row[column] (or the first of `also` that is there); UsageError names the columns that exist."""
    for name in (column, *also):
        if row.get(name) is not None:
            return row[name]
    raise UsageError(
        f"no column '{column}'{nearest(column, row)}", where=where, hint=f"columns here: {', '.join(row) or 'none'}"
    )


def as_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Chat turns that end with the user's, from a text or a list of {role, content}."""
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns or not all(_is_turn(turn) for turn in turns):
        raise UsageError(
            "a prompt is a text or a list of {role, content}", where=where,
            hint=f'"prompt": "...", or a list of {{"role": {" | ".join(_ROLES)}, "content": "..."}}',
        )  # fmt: skip
    if turns[-1]["role"] != "user":
        raise UsageError(
            f"the prompt ends with the turn of {turns[-1]['role']}", where=where, hint="end with the user's"
        )
    if not turns[-1]["content"].strip():
        raise UsageError("empty prompt", where=where, hint="remove the row, or give it a text")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") in _ROLES and isinstance(turn.get("content"), str)


def prompt_id(messages: tuple[Message, ...]) -> str:
    """An id from the content: the same prompt has the same id in every file."""
    return f"p-{fingerprint([[turn['role'], turn['content']] for turn in messages])[:16]}"
