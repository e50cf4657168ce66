"""vLLM against itself in another order, and against transformers; the real engine, on a CPU too."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bnfctl.data.records import Candidate, Prompt
from bnfctl.errors import UsageError
from bnfctl.samplers import Chunk, Decoding, Sampler, candidate, prompt_seed, requests
from bnfctl.samplers.vllm import VLLMSampler
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


def sampled(sampler: Sampler, prompts: list[Prompt], index: int, how: Decoding | None = None) -> list[Candidate]:
    """The candidates of one chunk."""
    ((found, made),) = sampler.sample([(index, prompts)], how)
    assert found == index
    return made


def by_prompt(candidates: list[Candidate]) -> dict[tuple[str, int], Candidate]:
    return {(c.prompt_id, c.sample): c for c in candidates}


@pytest.mark.vllm
@needs_vllm
def test_order_and_company_change_nothing(sampler: VLLMSampler) -> None:
    whole = by_prompt(sampled(sampler, PROMPTS, 0))
    assert list(whole) == [(p.id, i) for p in PROMPTS for i in range(3)]
    assert by_prompt(sampled(sampler, PROMPTS[::-1], 5)) == whole
    some = by_prompt(sampled(sampler, PROMPTS[3:5], 1))
    assert some == {key: whole[key] for key in some}
    assert len({tuple(c.token_ids or ()) for c in whole.values()}) > 30
    assert {c.seed for c in whole.values()} == {prompt_seed(0, p.id) + i for p in PROMPTS for i in range(3)}
    assert by_prompt(sampled(sampler, PROMPTS, 0, decoding(seed=1))) != whole


@pytest.mark.vllm
@needs_vllm
def test_sample_i_has_seed_plus_i(sampler: VLLMSampler) -> None:
    few, many = by_prompt(sampled(sampler, PROMPTS, 0, decoding(n=2))), by_prompt(sampled(sampler, PROMPTS, 0))
    assert few == {key: many[key] for key in few}


@pytest.mark.vllm
@needs_vllm
def test_both_stop_ids_end_a_response_and_count(sampler: VLLMSampler) -> None:
    made = sampled(sampler, PROMPTS, 0, decoding(n=20))
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
    expected = sampled(HFSampler(folder, greedy), PROMPTS, 0)
    found = sampled(sampler, PROMPTS, 0, greedy)
    assert [(c.token_ids, c.text, c.finish_reason, c.prompt_ids) for c in found] == [
        (c.token_ids, c.text, c.finish_reason, c.prompt_ids) for c in expected
    ]


@pytest.mark.vllm
@needs_vllm
def test_the_models_own_generation_config_does_not_leak(sampler: VLLMSampler) -> None:
    drawn = sampled(sampler, PROMPTS[:1], 0, decoding(n=500, max_tokens=1, top_p=1.0))
    assert len({c.token_ids[0] for c in drawn if c.token_ids}) > 20  # its top_k is 2


@pytest.mark.vllm
@needs_vllm
def test_many_long_prompts_with_a_seed_each(sampler: VLLMSampler) -> None:
    """More prefill than a step holds: chunked prefill with seeds crashes the CPU engine."""
    long = [Prompt(f"l{i}", ({"role": "user", "content": f"{i} " + "xyz" * 70},)) for i in range(80)]
    made = sampled(sampler, long, 0, decoding(n=2, max_tokens=4096))
    assert len(made) == 160
    assert sampler.context == 256
    for c in made:
        assert c.prompt_ids
        assert c.token_ids
        assert len(c.prompt_ids) + len(c.token_ids) <= 256
    assert sampler.version.startswith("vllm ")


def together(sampler: VLLMSampler, how: Decoding) -> list[Candidate]:
    """All prompts in one call of the engine's own `generate`."""
    todo = requests(sampler.tokenizer, sampler.context, PROMPTS, how)
    parameters = [
        sampler._vllm.SamplingParams(
            n=how.n, seed=request.seed, temperature=how.temperature, top_p=how.top_p, max_tokens=request.max_tokens,
            stop_token_ids=sampler.stops,
        )
        for request in todo
    ]  # fmt: skip
    prompts = [sampler._vllm.TokensPrompt(prompt_token_ids=request.ids) for request in todo]
    made = sampler._llm.generate(prompts, parameters, use_tqdm=False)
    return [
        candidate(sampler.tokenizer, request, one.index, one.token_ids, sampler.stops, request.seed + one.index)
        for request, of_prompt in zip(todo, made, strict=True)
        for one in of_prompt.outputs
    ]


@pytest.mark.vllm
@needs_vllm
@pytest.mark.parametrize("window", [1, 10, 10_000])
def test_a_continuous_feed_gives_what_one_call_of_the_engine_gives(
    window: int, sampler: VLLMSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long and short limits, so that later chunks are done before earlier ones."""
    monkeypatch.setattr(sampler, "_window", window)
    how = decoding(n=4, max_tokens=60)
    under_way, most = 0, 0

    def chunks() -> Iterator[Chunk]:
        nonlocal under_way, most
        for start in range(0, len(PROMPTS), 3):
            under_way += 1
            most = max(most, under_way)
            yield start // 3, PROMPTS[start : start + 3]

    found = {}
    for index, made in sampler.sample(chunks(), how):
        under_way -= 1
        found[index] = made
    assert sorted(found) == [0, 1, 2, 3]
    assert [one for index in range(4) for one in found[index]] == together(sampler, how)
    assert most == 1 if window == 1 else most > 1


@pytest.mark.vllm
@needs_vllm
def test_chunks_are_pulled_only_while_there_is_room(sampler: VLLMSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_window", 4)
    unfinished = []

    def chunks() -> Iterator[Chunk]:
        for index, prompt in enumerate(PROMPTS):
            unfinished.append(sampler._engine.get_num_unfinished_requests())
            yield index, [prompt]

    assert len(list(sampler.sample(chunks(), decoding(n=3)))) == len(PROMPTS)
    assert unfinished[:2] == [0, 3] and max(unfinished) == 3


@pytest.mark.vllm
@needs_vllm
def test_an_abandoned_feed_leaves_the_engine_empty(sampler: VLLMSampler) -> None:
    feed = sampler.sample([(0, PROMPTS[:1]), (1, PROMPTS[1:])], decoding(max_tokens=200))
    next(feed)
    feed.close()
    assert not sampler._engine.has_unfinished_requests()
    whole = by_prompt(sampled(sampler, PROMPTS, 0))
    assert whole == by_prompt(together(sampler, decoding()))


@pytest.mark.vllm
@needs_vllm
def test_a_chunk_without_prompts_is_done_at_once(sampler: VLLMSampler) -> None:
    assert dict(sampler.sample([(0, []), (1, PROMPTS[:1]), (2, [])])).keys() == {0, 1, 2}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_a_usage_error(folder: Path) -> None:
    with pytest.raises(UsageError, match="cannot be imported") as caught:
        VLLMSampler(folder, decoding())
    assert "--sampler hf" in (caught.value.hint or "")
