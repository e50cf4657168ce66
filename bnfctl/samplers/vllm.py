"""Sampling with vLLM in this process.  vLLM is imported when a sampler is made, never by importing this file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnfctl import console
from bnfctl.data.chat import context_length, load_tokenizer, stop_ids
from bnfctl.data.records import Candidate
from bnfctl.model.vllm import load_engine
from bnfctl.samplers import Chunk, Decoding, Request, candidate, requests

_AHEAD = 2
"""Sequences under way, as a multiple of what the engine runs at once: so none of its places is ever empty."""


@dataclass
class _Open:
    """A chunk whose prompts are with the engine."""

    index: int
    requests: list[Request]
    found: dict[int, list[Candidate]] = field(default_factory=dict)
    """Place in the chunk -> the candidates of a prompt that is done."""


class VLLMSampler:
    """A causal language model in vLLM's engine.  Every prompt has a seed of its own, so order and batching of the
    prompts leave no trace (measured on a CPU)."""

    def __init__(self, model_dir: Path, decoding: Decoding) -> None:
        self.decoding = decoding
        self.tokenizer = load_tokenizer(model_dir, decoding.trust_remote_code)
        self.stops = stop_ids(model_dir, self.tokenizer)
        several = {"tensor_parallel_size": decoding.tensor_parallel} if decoding.tensor_parallel > 1 else {}
        self._vllm, self._llm = load_engine(
            model_dir, dtype=decoding.dtype, gpu_memory=decoding.gpu_memory,
            trust_remote_code=decoding.trust_remote_code, instead="--sampler hf",
            generation_config="vllm",  # the model's own sampling defaults must not leak into ours
            enable_prefix_caching=True, **several,
        )  # fmt: skip
        self._engine = self._llm.llm_engine
        self._window = _AHEAD * int(self._engine.vllm_config.scheduler_config.max_num_seqs)
        self.version = f"vllm {self._vllm.__version__}"
        self.context = int(self._engine.model_config.max_model_len)
        of_model = context_length(model_dir) or self.context
        if self.context < of_model:
            what = f"the GPU has memory for a context of {self.context} tokens; the model's is {of_model}"
            console.say(f"{what}: responses may end sooner (--gpu-memory, --tensor-parallel)")

    def sample(
        self, chunks: Iterable[Chunk], decoding: Decoding | None = None
    ) -> Iterator[tuple[int, list[Candidate]]]:
        """A continuous feed: the prompts of the next chunks join while the last long ones of earlier chunks still run."""
        decoding = decoding or self.decoding
        source = iter(chunks)
        running: dict[str, tuple[_Open, int]] = {}
        exhausted = False
        try:
            while True:
                while not exhausted and self._engine.get_num_unfinished_requests() < self._window:
                    following = next(source, None)
                    if following is None:
                        exhausted = True
                    elif not self._add(*following, decoding, running):
                        yield following[0], []
                if not running:
                    return
                for output in self._step():
                    if output.finished:
                        chunk, place = running.pop(output.request_id)
                        chunk.found[place] = self._candidates(chunk.requests[place], output)
                        if len(chunk.found) == len(chunk.requests):
                            yield chunk.index, [one for place in sorted(chunk.found) for one in chunk.found[place]]
        except GeneratorExit:
            self._engine.abort_request(list(running))  # the engine is used again, and must not go on with these
            raise

    def _add(
        self, index: int, prompts: Sequence[Any], decoding: Decoding, running: dict[str, tuple[_Open, int]]
    ) -> bool:
        """Hand the prompts of a chunk to the engine; whether there were any."""
        chunk = _Open(index, requests(self.tokenizer, self.context, prompts, decoding))
        parameters = [
            self._vllm.SamplingParams(
                n=decoding.n, seed=request.seed, temperature=decoding.temperature,
                top_p=decoding.top_p if decoding.temperature > 0 else 1.0, top_k=0, max_tokens=request.max_tokens,
                stop_token_ids=self.stops, detokenize=False,
            )
            for request in chunk.requests
        ]  # fmt: skip
        # ids, never text: the engine would add a BOS to the one that the template wrote
        tokens = [self._vllm.TokensPrompt(prompt_token_ids=request.ids) for request in chunk.requests]
        for place, name in enumerate(self._llm.enqueue(tokens, parameters, use_tqdm=False) if tokens else ()):
            running[name.partition("-")[0]] = (chunk, place)  # behind the number that outputs go by: a random part
        return bool(tokens)

    def _step(self) -> list[Any]:
        try:
            found: list[Any] = self._engine.step()
        except Exception:
            console.check_stop()  # Ctrl-C reaches the engine's own process too, and ends it
            raise
        return found

    def _candidates(self, request: Request, output: Any) -> list[Candidate]:
        return [
            candidate(self.tokenizer, request, one.index, one.token_ids, self.stops, request.seed + one.index)
            for one in sorted(output.outputs, key=lambda one: one.index)
        ]
