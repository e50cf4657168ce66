"""Reward models: any sequence classifier with one label, read at its raw logit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification

from bnfctl.config import ScoreConfig
from bnfctl.data.chat import context_length, load_tokenizer, read_config, render_conversation
from bnfctl.data.records import Group, Reward
from bnfctl.errors import UsageError
from bnfctl.model.pretrained import device, load_pretrained, torch_dtype

_WINDOW = 32
"""Batches that are gathered before they are sorted by length."""


class ClassifierScorer:
    """One forward per candidate: the model's own chat template over the prompt and the response as assistant turn.

    The reward is the raw logit, without a sigmoid.  A candidate longer than `config.max_length`, or than the model
    has positions for, gets no reward and says its length as {"too_long": tokens}.
    """

    def __init__(self, config: ScoreConfig, model_dir: Path) -> None:
        self.config = config
        self.version = f"transformers {transformers.__version__}"
        self.device = device()
        self.tokenizer = load_tokenizer(model_dir, config.trust_remote_code)
        self.limit = min(config.max_length, context_length(model_dir) or config.max_length)
        self._model = _load(model_dir, torch_dtype(config.dtype), config.trust_remote_code).to(self.device)
        shape = self._model.config.get_text_config()
        # old configs spell "none" as -1
        self._pad: int | None = shape.pad_token_id if (shape.pad_token_id or 0) in range(shape.vocab_size) else None

    def score(self, groups: Iterable[Group]) -> Iterator[list[Reward]]:
        """One list per group, in order; reads some batches ahead, to put similar lengths together."""
        window: list[list[list[int]]] = []
        tokens = 0
        for group in groups:
            window.append([self._encode(group, candidate.text) for candidate in group.candidates])
            tokens += sum(map(len, window[-1]))
            if tokens >= _WINDOW * self.config.batch_tokens:
                yield from self._rewards(window)
                window, tokens = [], 0
        yield from self._rewards(window)

    def _encode(self, group: Group, response: str) -> list[int]:
        turns = [*group.prompt.messages, {"role": "assistant", "content": response}]
        try:
            return render_conversation(self.tokenizer, turns)
        except UsageError as error:
            raise UsageError(error.what, where=group.prompt.where or group.prompt.id, hint=error.hint) from error

    def _rewards(self, window: Sequence[Sequence[list[int]]]) -> Iterator[list[Reward]]:
        texts = [ids for group in window for ids in group]
        found: dict[int, Reward] = {}
        for index, ids in enumerate(texts):
            if len(ids) > self.limit:
                found[index] = Reward(None, {"too_long": len(ids)})
        for batch in _batches(texts, [i for i in range(len(texts)) if i not in found], self.config.batch_tokens):
            for index, value in zip(batch, self._forward([texts[i] for i in batch]), strict=True):
                # a reward that is no number can be neither stored nor compared
                found[index] = Reward(value) if math.isfinite(value) else Reward(None, {"not_finite": str(value)})
        index = 0
        for group in window:
            yield [found[index + offset] for offset in range(len(group))]
            index += len(group)

    @torch.inference_mode()
    def _forward(self, batch: Sequence[list[int]]) -> list[float]:
        """The logit of each sequence; right padding, so that every token keeps its position."""
        pad = self._pad
        if pad is None:
            # transformers finds the last token by the pad id; one that is not in the batch never hides a real token
            used = {number for ids in batch for number in ids}
            pad = next(number for number in range(len(used) + 1) if number not in used)
            self._model.config.get_text_config().pad_token_id = pad
        width = max(map(len, batch))
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in batch], device=self.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in batch], device=self.device)
        logits: list[float] = self._model(input_ids=ids, attention_mask=mask).logits.float()[:, 0].tolist()
        return logits


def _batches(texts: Sequence[list[int]], indices: Iterable[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar lengths, at most `batch_tokens` padded tokens each (or one text)."""
    batch: list[int] = []
    for index in sorted(indices, key=lambda index: len(texts[index])):
        if batch and (len(batch) + 1) * len(texts[index]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _load(model_dir: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    shape = read_config(model_dir)
    labels = len(shape.get("id2label") or ()) or shape.get("num_labels", 2)  # two is transformers' default
    if labels != 1:
        raise UsageError(
            f"a reward model has one label, this model {labels}",
            where=str(model_dir),
            hint="take a sequence classifier with num_labels 1",
        )
    return load_pretrained(AutoModelForSequenceClassification, model_dir, dtype, trust_remote_code)
