"""vLLM's engine in this process, for sampling and for scoring, and the command of its server.

vLLM is imported when an engine is made.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

from bnfctl.data.chat import context_length, read_config
from bnfctl.errors import UsageError
from bnfctl.machine import has_gpu, resolve_dtype
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
    machine = {
        **_settings(model_dir, dtype, gpu_memory, settings.get("max_model_len"), on_cpu, instead),
        "disable_log_stats": True, "seed": 0,
    }  # fmt: skip
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


def check_server(where: str, instead: str) -> None:
    """UsageError where vLLM is not installed; imports nothing."""
    if importlib.util.find_spec("vllm") is None:
        hint = f"pip install 'bnfctl[vllm]', or {instead}"
        raise UsageError("vLLM is not installed, which would serve the model here", where=where, hint=hint)


def server_command(
    model_dir: Path, name: str, *, dtype: str, gpu_memory: float, trust_remote_code: bool, instead: str,
    tensor_parallel: int = 1, context: int | None = None, seed: int = 0,
) -> tuple[list[str], dict[str, str]]:  # fmt: skip
    """(command, environment beyond this process's own) of vLLM's OpenAI-compatible server, for `client.local.serving`.

    The same settings of the machine as `load_engine`; all else is as `vllm serve` has it, so that an answer does not
    depend on who has started the server.  name: of the model, for clients.  context: None is all that there is memory
    for on a GPU, the model's own on a CPU.  Imports no vLLM.  UsageError for what the CPU engine cannot run.
    """
    on_cpu = not has_gpu()
    settings = _settings(model_dir, dtype, gpu_memory, context, on_cpu, instead)
    settings |= {"served_model_name": name, "seed": seed, "tensor_parallel_size": tensor_parallel}
    if trust_remote_code:
        settings["trust_remote_code"] = True
    # A process of its own for the engine, whatever an engine in this process has asked for.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    if on_cpu:
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(cpu_threads(model_dir)))
    # -P: a folder called vllm where the user happens to be is none of ours
    command = [sys.executable, "-P", "-m", *_server_module(), "--model", str(model_dir), "--disable-uvicorn-access-log"]
    return command + [_flag(option, value) for option, value in settings.items() if value is not None], environment


def _server_module() -> list[str]:
    """The older way works with every vLLM that has it; its command does not with a build of another name."""
    spec = importlib.util.find_spec("vllm")
    older = "entrypoints/openai/api_server.py"
    if spec is None or any((Path(folder) / older).is_file() for folder in spec.submodule_search_locations or ()):
        return ["vllm.entrypoints.openai.api_server"]
    return ["vllm.entrypoints.cli.main", "serve"]


def _flag(name: str, value: Any) -> str:
    """A setting as vLLM's command line takes it."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option}={value}"


def _settings(
    model_dir: Path, dtype: str, gpu_memory: float, context: int | None, on_cpu: bool, instead: str
) -> dict[str, Any]:
    """What suits this machine, by the names that vLLM's LLM and its server share."""
    settings: dict[str, Any] = {"dtype": resolve_dtype(dtype)}
    if on_cpu:
        return {**settings, **cpu_settings(model_dir, context or context_length(model_dir), instead)}
    # -1: as much of the model's context as the GPU has memory for
    return {**settings, "gpu_memory_utilization": gpu_memory, "max_model_len": context or -1}


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
