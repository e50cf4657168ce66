"""Reward models: any sequence classifier with one label, read at its raw logit."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
import transformers
from transformers import AutoModelForSequenceClassification

from bnfctl.config import ScoreConfig
from bnfctl.data.chat import (
    context_length,
    load_tokenizer,
    read_config,
    render_conversation,
    render_prompt,
    response_ids,
)
from bnfctl.data.records import Group, Reward
from bnfctl.errors import UsageError
from bnfctl.model.pretrained import device, load_pretrained, torch_dtype
from bnfctl.scorers.pooling import PoolingEngine
from bnfctl.scorers.windows import batches, windows


class Engine(Protocol):
    """A loaded classifier."""

    version: str

    def logits(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """The raw logit of each sequence of token ids, none of them empty or longer than the model takes."""
        ...


class ClassifierScorer:
    """One forward per candidate: the model's own chat template over the prompt and the response as assistant turn.

    The reward is the raw logit, without a sigmoid.  Special tokens written out in a response stay plain text.  Equal responses to a prompt get equal rewards, exactly.  A
    candidate longer than `config.max_length`, or than the model has positions for, gets no reward and says its length
    as {"too_long": tokens}.
    """

    def __init__(self, config: ScoreConfig, model_dir: Path) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(model_dir, config.trust_remote_code)
        self.limit = min(config.max_length, context_length(model_dir) or config.max_length)
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self._special = re.compile("|".join(map(re.escape, sorted(special))) or "(?!)")
        _check_one_label(model_dir)
        self._engine: Engine
        if config.engine == "vllm":
            self._engine = PoolingEngine(config, model_dir, self.limit)
        else:
            self._engine = TransformersEngine(config, model_dir)
        self.version = self._engine.version

    def score(self, groups: Iterable[Group]) -> Iterator[list[Reward]]:
        """One list per group, in order; reads some batches ahead, to put similar lengths together."""
        encoded = ([self._encode(group, candidate.text) for candidate in group.candidates] for group in groups)
        for window in windows(encoded, lambda texts: sum(map(len, texts)), self.config.batch_tokens):
            yield from self._rewards(window)

    def _encode(self, group: Group, response: str) -> tuple[int, ...]:
        asked = group.prompt.messages
        if self._special.search(response):
            # plain text, so that a response cannot forge turns; some templates do not let it be told from the prompt
            with contextlib.suppress(UsageError):
                rest, _ = response_ids(self.tokenizer, asked, response, ())
                return (*render_prompt(self.tokenizer, asked), *rest)
        try:
            return tuple(render_conversation(self.tokenizer, [*asked, {"role": "assistant", "content": response}]))
        except UsageError as error:
            raise UsageError(error.what, where=group.prompt.where or group.prompt.id, hint=error.hint) from error

    def _rewards(self, window: Sequence[Sequence[tuple[int, ...]]]) -> Iterator[list[Reward]]:
        # what stands twice is computed once: in another batch, rounding would make it differ from itself
        texts = list(dict.fromkeys(ids for group in window for ids in group))
        fitting = [ids for ids in texts if len(ids) <= self.limit]
        found = {ids: Reward(None, {"too_long": len(ids)}) for ids in texts if len(ids) > self.limit}
        for ids, value in zip(fitting, self._engine.logits(fitting), strict=True):
            # a reward that is no number can be neither stored nor compared
            found[ids] = Reward(value) if math.isfinite(value) else Reward(None, {"not_finite": str(value)})
        for group in window:
            yield [found[ids] for ids in group]


class TransformersEngine:
    """transformers, in batches of `config.batch_tokens` padded tokens."""

    def __init__(self, config: ScoreConfig, model_dir: Path) -> None:
        self.config = config
        self.version = f"transformers {transformers.__version__}"
        self.device = device()
        model = load_pretrained(
            AutoModelForSequenceClassification, model_dir, torch_dtype(config.dtype), config.trust_remote_code
        )
        self._model = model.to(self.device)
        shape = self._model.config.get_text_config()
        # old configs spell "none" as -1
        self._pad: int | None = shape.pad_token_id if (shape.pad_token_id or 0) in range(shape.vocab_size) else None

    def logits(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """As Engine."""
        found = [math.nan] * len(texts)
        for batch in batches([len(ids) for ids in texts], self.config.batch_tokens):
            for index, value in zip(batch, self._forward([texts[i] for i in batch]), strict=True):
                found[index] = value
        return found

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Sequence[int]]) -> list[float]:
        """The logit of each sequence; right padding, so that every token keeps its position."""
        pad = self._pad
        if pad is None:
            # transformers finds the last token by the pad id; one that is not in the batch never hides a real token
            used = {number for ids in batch for number in ids}
            pad = next(number for number in range(len(used) + 1) if number not in used)
            self._model.config.get_text_config().pad_token_id = pad
        width = max(map(len, batch))
        ids = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in batch], device=self.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in batch], device=self.device)
        logits: list[float] = self._model(input_ids=ids, attention_mask=mask).logits.float()[:, 0].tolist()
        return logits


def _check_one_label(model_dir: Path) -> None:
    shape = read_config(model_dir)
    labels = len(shape.get("id2label") or ()) or shape.get("num_labels", 2)  # two is transformers' default
    if labels != 1:
        raise UsageError(
            f"a reward model has one label, this model {labels}",
            where=str(model_dir),
            hint="take a sequence classifier with num_labels 1",
        )
