"""Sampling with vLLM in this process.  vLLM is imported when a sampler is made, never by importing this file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnfctl.data.chat import context_length, load_tokenizer, read_config, stop_ids
from bnfctl.data.records import Candidate, Prompt
from bnfctl.errors import UsageError
from bnfctl.machine import resolve_dtype
from bnfctl.model.threads import cpu_threads
from bnfctl.samplers import Decoding, cache_bytes_per_token, candidate, requests

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Others load, and die at the first step."""
_CPU_CACHE = (128 << 20, 2 << 30)
_CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a worker process costs 13 s and 2 GB, and gains nothing
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class VLLMSampler:
    """A causal language model in vLLM's engine.  Every prompt has a seed of its own, so order and batching of the
    prompts leave no trace (measured on a CPU)."""

    def __init__(self, model_dir: Path, decoding: Decoding) -> None:
        self.decoding = decoding
        self.tokenizer = load_tokenizer(model_dir, decoding.trust_remote_code)
        self.stops = stop_ids(model_dir, self.tokenizer)
        vllm, on_cpu = _import_vllm(model_dir)
        self.version = f"vllm {vllm.__version__}"
        context = context_length(model_dir)
        settings: dict[str, Any] = {
            "gpu_memory_utilization": decoding.gpu_memory,
            "dtype": resolve_dtype(decoding.dtype),
        }
        if on_cpu:
            del settings["gpu_memory_utilization"]
            settings.update(_cpu_settings(model_dir, context))
        else:
            settings["max_model_len"] = -1  # as much of the model's context as the GPU has memory for
        try:
            self._engine = vllm.LLM(
                model=str(model_dir), trust_remote_code=decoding.trust_remote_code,
                generation_config="vllm",  # the model's own sampling defaults must not leak into ours
                enable_prefix_caching=True, disable_log_stats=True, seed=0, **settings,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"vLLM cannot load the model: {reason}", where=str(model_dir), hint="--sampler hf, or --gpu-memory"
            ) from error
        self.context = int(self._engine.llm_engine.model_config.max_model_len)
        self._vllm = vllm

    def sample(self, chunk: Sequence[Prompt], chunk_index: int, decoding: Decoding | None = None) -> list[Candidate]:
        """The n candidates of every prompt; the chunk's index plays no part."""
        decoding = decoding or self.decoding
        todo = requests(self.tokenizer, self.context, chunk, decoding)
        parameters = [
            self._vllm.SamplingParams(
                n=decoding.n, seed=request.seed, temperature=decoding.temperature,
                top_p=decoding.top_p if decoding.temperature > 0 else 1.0, top_k=0, max_tokens=request.max_tokens,
                stop_token_ids=self.stops, detokenize=False,
            )
            for request in todo
        ]  # fmt: skip
        # ids, never text: the engine would add a BOS to the one that the template wrote
        prompts = [self._vllm.TokensPrompt(prompt_token_ids=request.ids) for request in todo]
        made = self._engine.generate(prompts, parameters, use_tqdm=False)
        return [
            candidate(self.tokenizer, request, one.index, one.token_ids, self.stops, request.seed + one.index)
            for request, of_prompt in zip(todo, made, strict=True)
            for one in sorted(of_prompt.outputs, key=lambda one: one.index)
        ]


def _import_vllm(model_dir: Path) -> tuple[Any, bool]:
    """(vllm, does it run on the CPU); what it reads from the environment is set before, unless the user has."""
    try:
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("OMP_NUM_THREADS", str(cpu_threads(model_dir)))
            for name, value in _CPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        raise UsageError(
            f"vLLM cannot be imported: {error}", where="--sampler", hint="pip install 'bnfctl[vllm]', or --sampler hf"
        ) from error
    return vllm, bool(current_platform.is_cpu())


def _cpu_settings(model_dir: Path, context: int | None) -> dict[str, Any]:
    """A seed per request crashes the CPU engine as soon as a prefill is chunked, so none may be."""
    config = read_config(model_dir)
    head_dim = config.get("head_dim") or config.get("hidden_size", 0) // (config.get("num_attention_heads") or 1)
    if head_dim not in CPU_HEAD_DIMS:
        raise UsageError(
            f"vLLM on a CPU cannot run heads of {head_dim} dimensions", where=str(model_dir), hint="--sampler hf"
        )
    longest = context or 8192
    least = cache_bytes_per_token(model_dir, 4) * (longest + 256)
    return {
        "max_model_len": context,
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, longest),
        "block_size": 32,
        "kv_cache_memory_bytes": max(least, min(max(32 * least, _CPU_CACHE[0]), _CPU_CACHE[1])),
    }
