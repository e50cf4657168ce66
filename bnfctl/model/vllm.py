"""vLLM's engine in this process, for sampling and for scoring.  vLLM is imported when an engine is made."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from bnfctl.data.chat import context_length, read_config
from bnfctl.errors import UsageError
from bnfctl.machine import resolve_dtype
from bnfctl.model.cache import cache_bytes_per_token
from bnfctl.model.threads import cpu_threads

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Others load, and die at the first step."""
_ENGINE_FAILED = re.compile("initialization failed|out of memory", re.I)
"""How an engine in a process of its own tells, on a GPU, whatever the reason: that one it has logged above."""
_CPU_CACHE = (128 << 20, 2 << 30)
_CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a worker process costs 13 s and 2 GB, and gains nothing
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def load_engine(
    model_dir: Path, *, dtype: str, gpu_memory: float, trust_remote_code: bool, instead: str, **settings: Any
) -> tuple[Any, Any]:
    """(the module vllm, an LLM with the model loaded).

    settings: of vLLM's LLM, over those that suit this machine.  instead: the flag that does without vLLM, for the
    hint of the UsageError that is raised where vLLM is missing or can't load the model.
    """
    vllm, on_cpu = _import_vllm(model_dir, instead)
    machine: dict[str, Any] = {"dtype": resolve_dtype(dtype), "disable_log_stats": True, "seed": 0}
    if on_cpu:
        context = settings.get("max_model_len") or context_length(model_dir)
        machine.update(cpu_settings(model_dir, context, instead))
    else:
        # -1: as much of the model's context as the GPU has memory for
        machine.update(gpu_memory_utilization=gpu_memory, max_model_len=-1)
    try:
        engine = vllm.LLM(model=str(model_dir), trust_remote_code=trust_remote_code, **{**machine, **settings})
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _ENGINE_FAILED.search(str(error)):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"vLLM cannot load the model: {reason}", where=str(model_dir), hint=f"{instead}, or --gpu-memory"
        ) from error
    return vllm, engine


def _import_vllm(model_dir: Path, instead: str) -> tuple[Any, bool]:
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
            f"vLLM cannot be imported: {error}",
            where=instead.split()[0],
            hint=f"pip install 'bnfctl[vllm]', or {instead}",
        ) from error
    return vllm, bool(current_platform.is_cpu())


def cpu_settings(model_dir: Path, context: int | None, instead: str) -> dict[str, Any]:
    """A seed per request crashes the CPU engine as soon as a prefill is chunked, so none may be."""
    config = read_config(model_dir)
    head_dim = config.get("head_dim") or config.get("hidden_size", 0) // (config.get("num_attention_heads") or 1)
    if head_dim not in CPU_HEAD_DIMS:
        raise UsageError(f"vLLM on a CPU cannot run heads of {head_dim} dimensions", where=str(model_dir), hint=instead)
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
