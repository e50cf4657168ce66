from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bnfctl.data.records import Candidate, Prompt
from bnfctl.errors import UsageError
from bnfctl.samplers import Chunk, Decoding, hf
from tests import models

PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": "ab" * (1 + 5 * i % 7) + str(i)},)) for i in range(7)]


def decoding(**changes: Any) -> Decoding:
    given: dict[str, Any] = {"n": 3, "temperature": 1.0, "top_p": 1.0, "max_tokens": 12, "seed": 0, "dtype": "float32"}
    return Decoding(**{**given, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_llama(tmp_path_factory.mktemp("llama"), stop=1.2)


@pytest.fixture(scope="module")
def sampler(folder: Path) -> hf.HFSampler:
    return hf.HFSampler(folder, decoding())


def sampled(
    sampler: hf.HFSampler, prompts: Sequence[Prompt], index: int = 0, how: Decoding | None = None
) -> list[Candidate]:
    """The candidates of one chunk."""
    ((found, made),) = sampler.sample([(index, prompts)], how)
    assert found == index
    return made


def logits_of(sampler: hf.HFSampler, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = sampler._model(torch.tensor([ids])).logits[0, -1]
    return found


def test_candidates_come_in_prompt_then_sample_order(sampler: hf.HFSampler) -> None:
    made = sampled(sampler, PROMPTS, 0)
    assert [(c.prompt_id, c.sample) for c in made] == [(p.id, i) for p in PROMPTS for i in range(3)]
    assert sampler.version.startswith("transformers ")
    assert sampler.context == 256


def test_both_stop_ids_end_a_response_and_count(sampler: hf.HFSampler) -> None:
    made = sampled(sampler, PROMPTS, 0, decoding(n=20))
    stops = {257, 259}
    ends = {c.token_ids[-1] for c in made if c.token_ids and c.finish_reason == "stop"}
    assert ends == stops
    assert {c.finish_reason for c in made} == {"stop", "length"}
    for c in made:
        assert c.token_ids
        inside = c.token_ids[:-1] if c.finish_reason == "stop" else c.token_ids
        assert not stops & set(inside)
        assert len(c.token_ids) == 12 or c.finish_reason == "stop"
        assert c.text == sampler.tokenizer.decode(inside, skip_special_tokens=True)


def test_a_chunk_is_the_same_whatever_came_before(sampler: hf.HFSampler) -> None:
    chunks = [PROMPTS[:3], PROMPTS[3:6], PROMPTS[6:]]
    whole = dict(sampler.sample(enumerate(chunks)))
    torch.manual_seed(99)
    resumed = dict(sampler.sample((index, chunks[index]) for index in (2, 1)))
    assert resumed == {index: whole[index] for index in (1, 2)} and len(whole) == 3


def test_a_chunk_is_pulled_when_the_one_before_is_given_out(sampler: hf.HFSampler) -> None:
    pulled = []

    def chunks() -> Iterator[Chunk]:
        for index in range(3):
            pulled.append(index)
            yield index, PROMPTS[index : index + 1]

    for index, _ in sampler.sample(chunks()):
        assert pulled[-1] == index


def test_seeds_differ_by_chunk_and_by_run(sampler: hf.HFSampler) -> None:
    texts = [
        [c.token_ids for c in sampled(sampler, PROMPTS, index, decoding(seed=seed))]
        for index, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert texts[0] != texts[1] != texts[2] != texts[0]


def test_sampling_leaves_the_global_generator_alone(sampler: hf.HFSampler) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sampled(sampler, PROMPTS[:1], 0)
    assert torch.equal(torch.rand(3), expected)


def test_greedy_is_the_argmax_of_every_step(sampler: hf.HFSampler) -> None:
    for c in sampled(sampler, PROMPTS, 0, decoding(n=1, temperature=0.0)):
        assert c.prompt_ids
        ids = list(c.prompt_ids)
        expected: list[int] = []
        while len(expected) < 12 and (not expected or expected[-1] not in (257, 259)):
            expected.append(int(logits_of(sampler, ids + expected).argmax()))
        assert c.token_ids == expected


def test_the_models_own_generation_config_does_not_leak(sampler: hf.HFSampler) -> None:
    """Its top_k is 2: sampling from two tokens cannot give the frequencies of the full softmax."""
    prompt = PROMPTS[0]
    drawn = sampled(sampler, [prompt], 0, decoding(n=4000, max_tokens=1))
    assert drawn[0].prompt_ids
    expected = logits_of(sampler, drawn[0].prompt_ids).softmax(-1)
    counts = torch.zeros_like(expected)
    for c in drawn:
        assert c.token_ids
        counts[c.token_ids[0]] += 1
    assert (counts > 0).sum() > 20
    assert (counts / 4000 - expected).abs().sum() / 2 < 0.1  # total variation


def test_temperature_and_top_p_are_applied(sampler: hf.HFSampler) -> None:
    drawn = sampled(sampler, PROMPTS[:1], 0, decoding(n=2000, max_tokens=1, temperature=0.7, top_p=0.5))
    assert drawn[0].prompt_ids
    ordered, order = (logits_of(sampler, drawn[0].prompt_ids) / 0.7).softmax(-1).sort(descending=True)
    nucleus = order[: int((ordered.cumsum(0) < 0.5).sum()) + 1].tolist()
    seen = {c.token_ids[0] for c in drawn if c.token_ids}
    assert seen <= set(nucleus)
    assert len(seen) > 1


def test_the_context_caps_each_prompt_on_its_own(tmp_path: Path) -> None:
    sampler = hf.HFSampler(models.make_llama(tmp_path, context=32, stop=-9.0), decoding(n=2, max_tokens=4096))
    made = sampled(sampler, PROMPTS, 0)
    for c in made:
        assert c.prompt_ids
        assert c.token_ids
        assert c.finish_reason == "length"
        assert len(c.prompt_ids) + len(c.token_ids) == 32


def test_small_batches_hold_every_prompt(sampler: hf.HFSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = decoding(n=1, temperature=0.0)
    whole = [c.token_ids for c in sampled(sampler, PROMPTS, 0, greedy)]
    monkeypatch.setattr(sampler, "_batch_tokens", 60)
    assert [c.token_ids for c in sampled(sampler, PROMPTS, 0, greedy)] == whole


def test_without_a_pad_token(tmp_path: Path) -> None:
    sampler = hf.HFSampler(models.make_llama(tmp_path, pad=False), decoding(n=1, temperature=0.0))
    alone: list[Candidate] = [c for prompt in PROMPTS for c in sampled(sampler, [prompt], 0)]
    assert [c.token_ids for c in sampled(sampler, PROMPTS, 0)] == [c.token_ids for c in alone]


def test_a_folder_without_parameters_is_a_usage_error(tmp_path: Path) -> None:
    models.make_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError) as caught:
        hf.HFSampler(tmp_path, decoding())
    assert caught.value.where == str(tmp_path)
