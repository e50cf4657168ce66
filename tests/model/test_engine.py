"""The settings of vLLM's engine and of its server, from config.json alone."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bnfctl.errors import UsageError
from bnfctl.model import vllm
from bnfctl.model.cache import cache_bytes_per_token
from bnfctl.model.vllm import CPU_HEAD_DIMS, cpu_settings, server_command


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


def flags_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, **settings: Any
) -> tuple[list[str], dict[str, str]]:
    config = '{"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 512}'
    (folder / "config.json").write_text(config)
    monkeypatch.setattr(vllm, "has_gpu", lambda: gpu)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    given = {"dtype": "bfloat16", "gpu_memory": 0.8, "trust_remote_code": False, "instead": "--server URL", **settings}
    return server_command(folder, "owner/judge", **given)


def test_the_command_of_a_server_on_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, environment = flags_of(tmp_path, monkeypatch, True, tensor_parallel=4, trust_remote_code=True)
    assert command[:5] == [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert set(command[5:]) == {
        str(tmp_path), "--disable-uvicorn-access-log", "--dtype=bfloat16", "--gpu-memory-utilization=0.8",
        "--max-model-len=-1", "--served-model-name=owner/judge", "--seed=0", "--tensor-parallel-size=4",
        "--trust-remote-code",
    }  # fmt: skip
    assert environment == {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    shorter, _ = flags_of(tmp_path, monkeypatch, True, context=4096)
    assert "--max-model-len=4096" in shorter and "--trust-remote-code" not in shorter


def test_the_command_of_a_server_on_a_cpu_is_set_like_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, environment = flags_of(tmp_path, monkeypatch, False)
    assert {"--enforce-eager", "--no-enable-chunked-prefill", "--max-model-len=512", "--block-size=32"} <= set(command)
    assert f"--kv-cache-memory-bytes={cpu_settings(tmp_path, 512, '')['kv_cache_memory_bytes']}" in command
    assert not [flag for flag in command if flag.startswith("--gpu-memory")]
    assert environment["OMP_NUM_THREADS"] == "1"  # a narrow model
    monkeypatch.setattr(vllm, "CPU_HEAD_DIMS", (64,))
    with pytest.raises(UsageError, match="32 dimensions") as caught:
        flags_of(tmp_path, monkeypatch, False)
    assert caught.value.hint == "--server URL"


def test_the_server_of_a_vllm_without_the_older_way_to_start_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    command, _ = flags_of(tmp_path, monkeypatch, True)
    assert command[2:6] == ["-m", "vllm.entrypoints.cli.main", "serve", "--model"]
    (tmp_path / "entrypoints" / "openai").mkdir(parents=True)
    (tmp_path / "entrypoints" / "openai" / "api_server.py").touch()
    assert flags_of(tmp_path, monkeypatch, True)[0][2:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model"]
