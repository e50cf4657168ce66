"""Rows of a build, as the token ids that training batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from bnfctl import console
from bnfctl.config import TrainConfig
from bnfctl.data.chat import (
    context_length,
    load_tokenizer,
    render_prompt,
    response_ids,
    stop_ids,
    template_kwargs,
    tokenizer_digest,
)
from bnfctl.data.records import Record, Side
from bnfctl.errors import UsageError

_SIDES = (("chosen", 1), ("rejected", -1))

CUT, NO_ROOM, EMPTY, NO_SIDE = "cut", "no_room", "empty", "no_side"
"""What `records` counts: responses cut, records whose prompt leaves no room, responses without a token, records
without a response.
"""


def check_digest(model_dir: Path, config: TrainConfig, build_tokenizer_digest: str | None) -> None:
    """UsageError when the ids that the build's responses were sampled as mean other tokens to this model.

    For a build with sampled ids; a build of texts only has no digest and nothing to check.
    """
    if config.retokenize or build_tokenizer_digest in (None, tokenizer_digest(model_dir)):
        return
    raise UsageError(
        "the build's token ids come from another tokenizer than this model's",
        where="--data",
        hint="--retokenize tokenizes the texts with this model",
    )


def records(
    rows: Iterable[dict[str, Any]], config: TrainConfig, model_dir: Path, build_tokenizer_digest: str | None
) -> tuple[list[Record], list[Record], dict[str, int]]:
    """(train, test, counts): every row that has a response left, in the build's order.

    Prompt + response is at most `config.max_length` tokens, or what the model has positions for: a longer response
    loses its end (and so its stop id), a prompt is never cut.  Counts say what was cut and dropped.

    Raises UsageError when sampled ids are not this model's, and whatever the chat template refuses, with the record.
    """
    limit = _limit(config.max_length, model_dir)
    maker = _Maker(config, model_dir, limit)
    split: dict[str, list[Record]] = {"train": [], "test": []}
    checked = config.retokenize
    for row in rows:
        if not checked and _has_ids(row):
            if build_tokenizer_digest is None:
                raise UsageError(
                    "the build has token ids but does not say whose", where="--data", hint="add --retokenize"
                )
            check_digest(model_dir, config, build_tokenizer_digest)
            checked = True
        record = maker.record(row)
        if record is not None:
            split[row["split"]].append(record)
    return split["train"], split["test"], maker.counts


def _limit(max_length: int, model_dir: Path) -> int:
    context = context_length(model_dir)
    if context is None or context >= max_length:
        return max_length
    console.say(f"max_length is {context} here, not {max_length}: the model has no more positions")
    return context


def _has_ids(row: Mapping[str, Any]) -> bool:
    return any(row[f"{name}_text"] is not None and row[f"{name}_ids"] is not None for name, _ in _SIDES)


class _Maker:
    """One build row to one record; the tokenizer is loaded only if a row needs it."""

    def __init__(self, config: TrainConfig, model_dir: Path, limit: int) -> None:
        self.config, self.model_dir, self.limit = config, model_dir, limit
        self.template = template_kwargs(config.chat_template_kwargs)
        self.counts = {CUT: 0, NO_ROOM: 0, EMPTY: 0, NO_SIDE: 0}
        self._known: dict[int, int] = {}

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model_dir, self.config.trust_remote_code)

    @cached_property
    def stops(self) -> list[int]:
        return stop_ids(self.model_dir, self.tokenizer)

    def record(self, row: Mapping[str, Any]) -> Record | None:
        """The record of one row; None, and a count, when nothing of it can be trained on."""
        try:
            return self._record(row)
        except UsageError as error:
            raise UsageError(error.what, where=f"{error.where}; record {row['record_id']}", hint=error.hint) from error

    def _record(self, row: Mapping[str, Any]) -> Record | None:
        if not self.config.retokenize and _has_ids(row) and row["prompt_ids"] is not None:
            prompt_ids = row["prompt_ids"]
        else:
            prompt_ids = render_prompt(self.tokenizer, row["prompt"], **self.template)
        room = self.limit - len(prompt_ids)
        if room < 1:
            self.counts[NO_ROOM] += 1
            return None
        sides = []
        for name, label in _SIDES:
            if row[f"{name}_text"] is None:
                continue
            ids = self._response(row, name)
            self.counts[CUT] += len(ids) > room
            self.counts[EMPTY] += not ids
            if ids:
                sides.append(Side(label, self._shared(ids[:room])))
        if not sides:
            self.counts[NO_SIDE] += 1
            return None
        return Record(row["record_id"], self._shared(prompt_ids), tuple(sides))

    def _response(self, row: Mapping[str, Any], name: str) -> list[int]:
        sampled: list[int] | None = row[f"{name}_ids"]
        if sampled is not None and not self.config.retokenize:
            return sampled
        ids, ended = response_ids(self.tokenizer, row["prompt"], row[f"{name}_text"], self.stops, **self.template)
        if ended and row[f"{name}_finish"] == "length":
            # sampling broke off in mid-sentence: the template's end of turn would teach to stop there
            return ids[:-1]
        return ids

    def _shared(self, ids: Iterable[int]) -> list[int]:
        """The ids as shared int objects: 8 bytes a token rather than 36, and a build has 10^8 of them."""
        known = self._known
        return [known.setdefault(number, number) for number in ids]
