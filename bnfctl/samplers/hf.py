"""Sampling with transformers' `generate`: works everywhere, a chunk of prompts at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from bnfctl.data.chat import context_length, load_tokenizer, stop_ids
from bnfctl.data.records import Candidate, Prompt
from bnfctl.model.cache import cache_bytes_per_token
from bnfctl.model.pretrained import device, load_pretrained, torch_dtype
from bnfctl.samplers import UNBOUNDED, Chunk, Decoding, Request, candidate, prompt_seed, requests

CACHE_BYTES = 16 << 30
"""Largest KV cache of a batch.  Part of what a seed means: other batches draw other random numbers."""


class HFSampler:
    """A causal language model in this process, on the GPU where there is one."""

    def __init__(self, model_dir: Path, decoding: Decoding) -> None:
        self.decoding = decoding
        self.version = f"transformers {transformers.__version__}"
        self.tokenizer = load_tokenizer(model_dir, decoding.trust_remote_code)
        self.context = context_length(model_dir) or UNBOUNDED
        self.device = device()
        dtype = torch_dtype(decoding.dtype)
        self.stops = stop_ids(model_dir, self.tokenizer)
        self._batch_tokens = CACHE_BYTES // cache_bytes_per_token(model_dir, dtype.itemsize)
        model = load_pretrained(transformers.AutoModelForCausalLM, model_dir, dtype, decoding.trust_remote_code)
        self._model = model.to(self.device)
        # The model's own generation config must not leak into ours: top_k, penalties, forced or suppressed tokens.
        self._model.generation_config = transformers.GenerationConfig()

    def sample(
        self, chunks: Iterable[Chunk], decoding: Decoding | None = None
    ) -> Iterator[tuple[int, list[Candidate]]]:
        """One chunk after the other, each seeded as a whole."""
        for index, prompts in chunks:
            yield index, self._chunk(index, prompts, decoding or self.decoding)

    def _chunk(self, chunk_index: int, chunk: Sequence[Prompt], decoding: Decoding) -> list[Candidate]:
        todo = requests(self.tokenizer, self.context, chunk, decoding)
        seed = prompt_seed(decoding.seed, chunk_index, *(request.prompt_id for request in todo))
        rows: dict[int, list[list[int]]] = {}
        devices = [torch.cuda.current_device()] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(seed)
            for batch in _batches(todo, decoding.n, self._batch_tokens):
                made = self._generate([todo[index] for index in batch], decoding)
                for place, index in enumerate(batch):
                    rows[index] = made[place * decoding.n : (place + 1) * decoding.n]
        return [
            candidate(self.tokenizer, request, sample, ids, self.stops, seed)
            for index, request in enumerate(todo)
            for sample, ids in enumerate(rows[index])
        ]

    def _generate(self, batch: Sequence[Request], decoding: Decoding) -> list[list[int]]:
        """n rows of sampled ids for each request, each with whatever `generate` filled in behind its end."""
        width = max(len(request.ids) for request in batch)
        pad = self._pad()
        # left padding: every response continues its prompt without a gap
        ids = torch.tensor([[pad] * (width - len(r.ids)) + r.ids for r in batch], device=self.device)
        mask = torch.tensor([[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in batch], device=self.device)
        limits = torch.tensor([r.max_tokens for r in batch], device=self.device).repeat_interleave(decoding.n)
        how: dict[str, Any] = {"do_sample": False}
        if decoding.temperature > 0:
            how = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        config = transformers.GenerationConfig(
            **how, num_return_sequences=decoding.n, max_new_tokens=int(limits.max()),
            eos_token_id=self.stops or None, pad_token_id=pad, use_cache=True,
        )  # fmt: skip
        made = self._model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config,
            stopping_criteria=transformers.StoppingCriteriaList([_OwnLimit(width, limits)]),
        )  # fmt: skip
        found: list[list[int]] = made[:, width:].tolist()
        return found

    def _pad(self) -> int:
        for number in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, *self.stops):
            if number is not None:
                return int(number)
        return 0  # masked in the prompt and cut from the response, so any id will do


class _OwnLimit(transformers.StoppingCriteria):
    """Ends each row at its own token limit: the context leaves less to a longer prompt."""

    def __init__(self, width: int, limits: Tensor) -> None:
        self.width, self.limits = width, limits

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] - self.width >= self.limits


def _batches(todo: Sequence[Request], n: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices into `todo`, similar lengths together, in batches whose cache stays within `batch_tokens`."""
    order = sorted(range(len(todo)), key=lambda index: len(todo[index].ids))
    batch: list[int] = []
    response = 0
    for index in order:
        request = todo[index]
        longest = max(response, request.max_tokens)
        if batch and (len(batch) + 1) * n * (len(request.ids) + longest) > batch_tokens:
            yield batch
            batch, longest = [], request.max_tokens
        batch.append(index)
        response = longest
    if batch:
        yield batch
