"""vLLM against itself in another order, and against transformers; the real engine, on a CPU too."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from bnfctl.data.records import Candidate, Prompt
from bnfctl.errors import UsageError
from bnfctl.samplers import Decoding, prompt_seed
from bnfctl.samplers.vllm import CPU_HEAD_DIMS, VLLMSampler, _cpu_settings
from tests import models

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": "ab" * (1 + 5 * i % 7) + str(i)},)) for i in range(12)]


def decoding(**changes: Any) -> Decoding:
    given: dict[str, Any] = {"n": 3, "temperature": 1.0, "top_p": 0.95, "max_tokens": 12, "seed": 0, "dtype": "float32"}
    return Decoding(**{**given, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_llama(tmp_path_factory.mktemp("llama"), stop=1.2)


@pytest.fixture(scope="module")
def sampler(folder: Path) -> VLLMSampler:
    return VLLMSampler(folder, decoding())


def by_prompt(candidates: list[Candidate]) -> dict[tuple[str, int], Candidate]:
    return {(c.prompt_id, c.sample): c for c in candidates}


@pytest.mark.vllm
@needs_vllm
def test_order_and_company_change_nothing(sampler: VLLMSampler) -> None:
    whole = by_prompt(sampler.sample(PROMPTS, 0))
    assert list(whole) == [(p.id, i) for p in PROMPTS for i in range(3)]
    assert by_prompt(sampler.sample(PROMPTS[::-1], 5)) == whole
    some = by_prompt(sampler.sample(PROMPTS[3:5], 1))
    assert some == {key: whole[key] for key in some}
    assert len({tuple(c.token_ids or ()) for c in whole.values()}) > 30
    assert {c.seed for c in whole.values()} == {prompt_seed(0, p.id) + i for p in PROMPTS for i in range(3)}
    assert by_prompt(sampler.sample(PROMPTS, 0, decoding(seed=1))) != whole


@pytest.mark.vllm
@needs_vllm
def test_sample_i_has_seed_plus_i(sampler: VLLMSampler) -> None:
    few, many = by_prompt(sampler.sample(PROMPTS, 0, decoding(n=2))), by_prompt(sampler.sample(PROMPTS, 0))
    assert few == {key: many[key] for key in few}


@pytest.mark.vllm
@needs_vllm
def test_both_stop_ids_end_a_response_and_count(sampler: VLLMSampler) -> None:
    made = sampler.sample(PROMPTS, 0, decoding(n=20))
    assert {c.token_ids[-1] for c in made if c.token_ids and c.finish_reason == "stop"} == {257, 259}
    assert {c.finish_reason for c in made} == {"stop", "length"}
    for c in made:
        assert c.token_ids
        assert c.finish_reason == "stop" or len(c.token_ids) == 12
        inside = c.token_ids[:-1] if c.finish_reason == "stop" else c.token_ids
        assert not {257, 259} & set(inside)
        assert c.text == sampler.tokenizer.decode(inside, skip_special_tokens=True)


@pytest.mark.vllm
@needs_vllm
def test_greedy_equals_transformers(sampler: VLLMSampler, folder: Path) -> None:
    from bnfctl.samplers.hf import HFSampler

    greedy = decoding(n=1, temperature=0.0, max_tokens=40)
    expected = HFSampler(folder, greedy).sample(PROMPTS, 0)
    found = sampler.sample(PROMPTS, 0, greedy)
    assert [(c.token_ids, c.text, c.finish_reason, c.prompt_ids) for c in found] == [
        (c.token_ids, c.text, c.finish_reason, c.prompt_ids) for c in expected
    ]


@pytest.mark.vllm
@needs_vllm
def test_the_models_own_generation_config_does_not_leak(sampler: VLLMSampler) -> None:
    drawn = sampler.sample(PROMPTS[:1], 0, decoding(n=500, max_tokens=1, top_p=1.0))
    assert len({c.token_ids[0] for c in drawn if c.token_ids}) > 20  # its top_k is 2


@pytest.mark.vllm
@needs_vllm
def test_many_long_prompts_with_a_seed_each(sampler: VLLMSampler) -> None:
    """More prefill than a step holds: chunked prefill with seeds crashes the CPU engine."""
    long = [Prompt(f"l{i}", ({"role": "user", "content": f"{i} " + "xyz" * 70},)) for i in range(80)]
    made = sampler.sample(long, 0, decoding(n=2, max_tokens=4096))
    assert len(made) == 160
    assert sampler.context == 256
    for c in made:
        assert c.prompt_ids
        assert c.token_ids
        assert len(c.prompt_ids) + len(c.token_ids) <= 256
    assert sampler.version.startswith("vllm ")


def test_a_head_that_the_cpu_engine_cannot_run_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}')
    with pytest.raises(UsageError, match="16 dimensions") as caught:
        _cpu_settings(tmp_path, 512)
    assert "--sampler hf" in (caught.value.hint or "")


def test_cpu_settings_hold_the_longest_sequence(tmp_path: Path) -> None:
    assert 32 in CPU_HEAD_DIMS
    config = '{"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_hidden_layers": 2}'
    (tmp_path / "config.json").write_text(config)
    settings = _cpu_settings(tmp_path, 32_768)
    assert settings["max_num_batched_tokens"] >= 32_768
    assert settings["kv_cache_memory_bytes"] >= 32_768 * 2 * 2 * 64 * 4
    assert not settings["enable_chunked_prefill"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_a_usage_error(folder: Path) -> None:
    with pytest.raises(UsageError, match="cannot be imported") as caught:
        VLLMSampler(folder, decoding())
    assert "--sampler hf" in (caught.value.hint or "")
