"""Samplers: n responses per prompt from a model, here or behind a server.  Imports no torch, transformers or vLLM."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from bnfctl.config import GenerateConfig
from bnfctl.data.chat import context_length, load_tokenizer, render_prompt, template_kwargs
from bnfctl.data.records import Candidate, Prompt
from bnfctl.errors import UsageError
from bnfctl.tables import SAMPLERS, load

UNBOUNDED = 1 << 30
"""The context of a model whose config.json names none."""

Chunk = tuple[int, Sequence[Prompt]]
"""(index of the chunk in the input, its prompts)."""


@dataclass(frozen=True)
class Decoding:
    """How to sample; fields as in GenerateConfig.  UsageError for several greedy responses: they would be equal."""

    n: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    chunk: int = 64
    dtype: str = "auto"
    gpu_memory: float = 0.9
    trust_remote_code: bool = False
    chat_template_kwargs: tuple[str, ...] = ()
    tensor_parallel: int = 1
    long_prompts: str = "error"

    def __post_init__(self) -> None:
        if self.n > 1 and self.temperature == 0:
            raise UsageError(
                f"{self.n} greedy responses to a prompt would all be the same",
                where="--n",
                hint="--n 1, or a --temperature above 0",
            )

    @classmethod
    def of(cls, config: GenerateConfig) -> Decoding:
        """What a generate stage was asked for."""
        return cls(
            n=config.n, temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens,
            seed=config.seed, chunk=config.chunk, dtype=config.dtype, gpu_memory=config.gpu_memory,
            trust_remote_code=config.trust_remote_code, chat_template_kwargs=config.chat_template_kwargs,
            tensor_parallel=config.tensor_parallel, long_prompts=config.long_prompts,
        )  # fmt: skip


class Sampler(Protocol):
    """A loaded model.  An engine's is built as `Sampler(model_dir, decoding)`; UsageError when it cannot be loaded."""

    version: str
    """The engine and its version, for provenance."""

    def sample(
        self, chunks: Iterable[Chunk], decoding: Decoding | None = None
    ) -> Iterator[tuple[int, list[Candidate]]]:
        """(index, the n candidates of every prompt, in prompt, then sample order) of each chunk, as soon as it is whole.

        Pulls the next chunk only when it has room for it; several may be under way, so they come in any order.  The
        same chunk at the same index gives the same candidates, whatever was sampled before or beside it.
        decoding: another one than the sampler was built with (same dtype).
        """
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, ready to sample."""

    prompt_id: str
    ids: list[int]
    """The rendered prompt."""
    max_tokens: int
    """Of the response: what was asked for, or what the context leaves."""
    seed: int
    """Of sample 0; sample i has seed + i."""


def resolve(name: str) -> str:
    """The sampler that `auto` stands for: vllm where it is installed, else hf.  Imports neither."""
    if name != "auto":
        return name
    return "vllm" if importlib.util.find_spec("vllm") is not None else "hf"


def make(name: str, model_dir: Path, decoding: Decoding) -> Sampler:
    """The engine `name` (`hf` or `vllm`) with its model loaded."""
    sampler: Sampler = load(SAMPLERS, name, "sampler")(model_dir, decoding)
    return sampler


def prompt_seed(seed: int, *what: str | int) -> int:
    """A 53-bit hash of the run seed and what is sampled (a prompt id): exact in JSON, far from its neighbours'.

    With so many bits, seed + i is hardly ever another prompt's: one chance in 500,000 for 60,000 prompts x 5.
    """
    text = json.dumps([seed, *what])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") >> 3


def check_prompts(
    model_dir: Path, prompts: Iterable[Prompt], decoding: Decoding, on_long: str, counts: Counter[str]
) -> Iterator[Prompt]:
    """The prompts that leave room for a response, one by one; the others are counted as "dropped_long".

    on_long: "drop" them, or "error" on the first one.  Raises UsageError with the prompt's place in its file, also
    when the chat template refuses the prompt.
    """
    tokenizer = _tokenizer(model_dir, decoding.trust_remote_code)
    context = context_length(model_dir) or UNBOUNDED
    options = template_kwargs(decoding.chat_template_kwargs)
    for prompt in prompts:
        length = len(render(tokenizer, prompt, options))
        if length < context:
            yield prompt
        elif on_long == "drop":
            counts["dropped_long"] += 1
        else:
            raise UsageError(
                f"prompt {prompt.id} has {length} tokens; the model's context is {context}",
                where=prompt.where or prompt.id,
                hint="shorten the prompt; bnfctl generate --long-prompts drop leaves such prompts out",
            )


def render(tokenizer: Any, prompt: Prompt, options: Mapping[str, Any]) -> list[int]:
    """The prompt's ids, with these arguments of the chat template; a UsageError of the template names the prompt."""
    try:
        return render_prompt(tokenizer, prompt.messages, **options)
    except UsageError as error:
        raise UsageError(error.what, where=prompt.where or prompt.id, hint=error.hint) from error


def requests(tokenizer: Any, context: int, prompts: Sequence[Prompt], decoding: Decoding) -> list[Request]:
    """The prompts of a chunk, rendered, each with its own token limit and seed.

    context: the engine's, which may be smaller than the model's.  Of a prompt that fills it: UsageError, or no request
    where `decoding.long_prompts` is "drop".
    """
    made = []
    options = template_kwargs(decoding.chat_template_kwargs)
    for prompt in prompts:
        ids = render(tokenizer, prompt, options)
        room = context - len(ids)
        if room < 1 and decoding.long_prompts == "drop":
            continue
        if room < 1:
            raise UsageError(
                f"prompt {prompt.id} has {len(ids)} tokens; the engine's context is {context}",
                where=prompt.where or prompt.id,
                hint="--long-prompts drop leaves it out; a larger --gpu-memory or --tensor-parallel may make room",
            )
        seed = prompt_seed(decoding.seed, prompt.id)
        made.append(Request(prompt.id, ids, min(decoding.max_tokens, room), seed))
    return made


def candidate(
    tokenizer: Any, request: Request, sample: int, ids: Sequence[int], stops: Sequence[int], seed: int
) -> Candidate:
    """What was sampled, up to its first stop id (which counts) or the request's token limit."""
    ids = list(ids[: request.max_tokens])
    end = next((position for position, number in enumerate(ids) if number in stops), None)
    content = ids if end is None else ids[:end]
    return Candidate(
        prompt_id=request.prompt_id,
        sample=sample,
        text=tokenizer.decode(content, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        token_ids=ids if end is None else ids[: end + 1],
        finish_reason="length" if end is None else "stop",
        seed=seed,
        prompt_ids=request.ids,
    )


@lru_cache(maxsize=2)
def _tokenizer(model_dir: Path, trust_remote_code: bool) -> Any:
    return load_tokenizer(model_dir, trust_remote_code)
