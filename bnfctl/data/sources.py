"""Where prompts and ready sets come from: a file, a folder, a hub data set, or the lab; pinned by content."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from bnfctl import console, hub
from bnfctl.artifact import Pinned, Store
from bnfctl.config import GenerateConfig
from bnfctl.data.files import FILE_ENDINGS, read_path
from bnfctl.data.records import Message, Prompt
from bnfctl.data.rows import PROMPT_ID, Seen, as_messages, column_of, given_id, is_missing, pick, prompt_id
from bnfctl.errors import UsageError, nearest
from bnfctl.options import fingerprint
from bnfctl.tables import PROMPTS, load


def pin_data(ref: str, store: Store, where: str, split: str = "train") -> Pinned:
    """The data behind `ref`, by the content of the file or folder, the commit of the hub data set, or the lab's rows.

    where: the flag that names it; INPUT, of build, may be an artifact too, so names of such are suggested, and not the
    lab, which has prompts only.  UsageError where there is nothing.
    """
    path = Path(ref).expanduser()
    if path.exists():
        kind = "folder" if path.is_dir() else "file"
        return Pinned(kind, str(path.absolute()), store.digests.any(path), str(path.absolute()))
    source, _, rest = ref.partition(":")
    if rest and source in PROMPTS:
        try:
            load(PROMPTS, source, "prompts")(rest, split, 1)  # refuses an unknown family or split
        except UsageError as error:
            raise UsageError(error.what, where=f"{where} {ref}, --split {split}", hint=error.hint) from None
        # Enumerating the rows would cost more than hashing the code that draws them.
        code = Path(load(PROMPTS, source, "prompts").__code__.co_filename).parent.glob("*.py")
        return Pinned("lab", ref, fingerprint([rest, split, [store.digests.file(path) for path in sorted(code)]]))
    if hub.looks_like_hub(ref) and path.suffix.lower() not in FILE_ENDINGS and not path.parent.is_dir():
        commit, why = hub.commit_of(ref, "dataset")
        name, _ = hub.split_revision(ref)
        return Pinned("hub-data", f"{name}@{commit}" if commit else ref, commit, None, why or None)
    hint = "a JSONL file, Parquet, CSV, a folder saved by datasets, a hub data set (owner/name)"
    if where != "INPUT":
        raise UsageError(f"no such file '{ref}'", where=where, hint=f"{hint} or lab:chat")
    hint = f"{hint} or scores (bnfctl ls score)"
    if path.suffix.lower() in FILE_ENDINGS:
        raise UsageError(f"no such file '{ref}'", where=where, hint=hint)
    close = nearest(ref, [*store.names(), *(artifact.ref for artifact in store.artifacts())])
    raise UsageError(f"no such file or artifact '{ref}'{close}", where=where, hint=hint)


def read_rows(pinned: Pinned, split: str, subset: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """("where", row) of a pinned file, folder or hub data set, streamed."""
    if pinned.path is not None:
        yield from read_path(Path(pinned.path), split, subset)
        return
    import datasets

    name, commit = hub.split_revision(pinned.ref)
    number = 0
    try:
        rows = iter(datasets.load_dataset(name, subset, split=split, revision=commit))
    except Exception as error:  # every client error means the same to the user: it could not be fetched
        what = f"could not load {pinned.ref} ({split}): {(str(error) or type(error).__name__).splitlines()[0]}"
        raise UsageError(what, where=pinned.ref, hint="check --split and --subset") from None
    while True:
        where = f"{pinned.ref} {split}[{number}]"
        try:
            row = next(rows, None)
        except Exception as error:  # a file that is broken in the cache, a column that cannot be decoded
            raise UsageError(f"the row cannot be read: {error}", where=where, hint="fetch the data set again") from None
        if row is None:
            return
        yield where, dict(row)
        number += 1


def read_prompts(pinned: Pinned, config: GenerateConfig, counts: Counter[str]) -> Iterator[Prompt]:
    """The prompts in their order, each id once: counts["repeated"] says how many rows were left out for that.

    A row without an id gets one from its content, so ids are stable across runs and orders.  Holds ids and hashes
    only; with `sort` or `shuffle_seed` the prompts that will be taken.  counts["answered"]: rows whose `messages`
    ended with the assistant's turn, which is left out, since it is what will be sampled.

    UsageError names the row and what is wrong with it; also when there is no row at all.
    """
    if config.sort and config.shuffle_seed is not None:
        raise UsageError("sorted and shuffled at once", where="--sort", hint="leave out --sort or --shuffle-seed")
    found = _unique(_prompts(pinned, config, counts), counts)
    if config.sort:
        found = iter(_without_equal_texts(sorted(found, key=_by_text), counts))
    elif config.shuffle_seed is not None:
        order = _shuffled(config.shuffle_seed)
        found = iter(heapq.nsmallest(config.limit, found, order) if config.limit else sorted(found, key=order))
    empty = True
    for prompt in islice(found, config.limit):
        empty = False
        yield prompt
    if counts["answered"]:
        console.say(f"rows that end with the assistant's turn, which is not part of the prompt: {counts['answered']}")
    if empty:
        raise UsageError("no prompts", where=pinned.ref, hint="the file is empty, or --split is")


def _unique(prompts: Iterator[Prompt], counts: Counter[str]) -> Iterator[Prompt]:
    seen = Seen()
    for prompt in prompts:
        if seen.add(prompt):
            yield prompt
        else:
            counts["repeated"] += 1


def _by_text(prompt: Prompt) -> tuple[list[str], str]:
    """The texts of the turns, the system's last, then the id: one user turn sorts as its text does."""
    turns = sorted(prompt.messages, key=lambda turn: turn["role"] == "system")
    return [turn["content"] for turn in turns], prompt.id


def _without_equal_texts(prompts: list[Prompt], counts: Counter[str]) -> Iterator[Prompt]:
    """SimPO's `sorted(set(prompts))`: the same text under two ids is one prompt, with the first of the ids."""
    for index, prompt in enumerate(prompts):
        if index and prompts[index - 1].messages == prompt.messages:
            counts["repeated"] += 1
        else:
            yield prompt


def _shuffled(seed: int) -> Callable[[Prompt], str]:
    """An order that depends on nothing but the seed and each prompt's id."""
    return lambda prompt: fingerprint(["shuffle", seed, prompt.id])


def _prompts(pinned: Pinned, config: GenerateConfig, counts: Counter[str]) -> Iterator[Prompt]:
    if pinned.kind == "lab":
        source, _, family = pinned.ref.partition(":")
        for row in load(PROMPTS, source, "prompts")(family, config.split):
            messages = with_system(as_messages(row["prompt"], row["id"]), config.system)
            yield Prompt(row["id"], messages, row["answer"], row["id"])
        return
    for where, row in read_rows(pinned, config.split, config.subset):
        yield prompt_of(row, where, config, counts)


def prompt_of(row: dict[str, Any], where: str, config: GenerateConfig, counts: Counter[str]) -> Prompt:
    """The prompt of one row, by the config's columns; `messages` stands in for a prompt column that is not there."""
    column = column_of(row, (config.prompt_column, "messages"))
    turns = pick(row, config.prompt_column, where, also=("messages",))
    if column == "messages" and is_answered(turns):
        counts["answered"] += 1
        turns = turns[:-1]
    messages = with_system(as_messages(turns, where), config.system)
    if config.id_column is not None and is_missing(row.get(config.id_column)):
        hint = f"give every row one; columns here: {', '.join(row)}"
        raise UsageError(f"no id in column '{config.id_column}'", where=where, hint=hint)
    given = given_id(row, PROMPT_ID if config.id_column is None else (config.id_column,), where)
    answer = row.get(config.answer_column)
    return Prompt(given or prompt_id(messages), messages, None if is_missing(answer) else str(answer), where)


def is_answered(turns: Any) -> bool:
    """Whether turns end as in UltraFeedback's `messages`: with the assistant's."""
    last = turns[-1] if isinstance(turns, list) and len(turns) > 1 else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """The turns behind a system turn, where one is wanted and they have none."""
    if not system or messages[0]["role"] == "system":
        return messages
    return ({"role": "system", "content": system}, *messages)
