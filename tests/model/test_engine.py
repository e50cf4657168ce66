"""The settings of vLLM's engine on a CPU, from config.json alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bnfctl.errors import UsageError
from bnfctl.model import vllm
from bnfctl.model.cache import cache_bytes_per_token
from bnfctl.model.vllm import CPU_HEAD_DIMS, cpu_settings


def test_a_head_that_the_cpu_engine_cannot_run_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}')
    with pytest.raises(UsageError, match="16 dimensions") as caught:
        cpu_settings(tmp_path, 512, "--sampler hf")
    assert "--sampler hf" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}"), UsageError),
        (ValueError("no such architecture"), UsageError),
        (RuntimeError("a fault of ours"), RuntimeError),
    ],
)
def test_an_engine_that_does_not_start_says_what_to_try(
    raised: Exception, expected: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**settings: Any) -> None:
        raise raised

    monkeypatch.setattr(vllm, "_import_vllm", lambda folder, instead: (SimpleNamespace(LLM=refuse), False))
    with pytest.raises(expected, match=str(raised).split(".")[0]) as caught:
        vllm.load_engine(tmp_path, dtype="float32", gpu_memory=0.9, trust_remote_code=False, instead="--sampler hf")
    assert expected is RuntimeError or "--gpu-memory" in str(getattr(caught.value, "hint", None))


def test_cpu_settings_hold_the_longest_sequence(tmp_path: Path) -> None:
    assert 32 in CPU_HEAD_DIMS
    config = '{"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_hidden_layers": 2}'
    (tmp_path / "config.json").write_text(config)
    settings = cpu_settings(tmp_path, 32_768, "--sampler hf")
    assert settings["max_num_batched_tokens"] >= 32_768
    assert settings["kv_cache_memory_bytes"] >= 32_768 * 2 * 2 * 64 * 4
    assert not settings["enable_chunked_prefill"]


def test_cache_bytes_per_token(tmp_path: Path) -> None:
    config = '{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}'
    (tmp_path / "config.json").write_text(config)
    assert cache_bytes_per_token(tmp_path, 2) == 131072  # Llama 3 8B
