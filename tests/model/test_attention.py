"""Packed rows: each sequence attends to itself alone, forward and backward, in every attention that models ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PhimoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
)

from bnfctl.errors import UsageError
from bnfctl.model.attention import NAME, Rows, register, rows_attention, rows_of
from bnfctl.model.loading import choose_packing, padded_attention
from bnfctl.model.policy import Policy, Sequences, packs
from tests.losses.ragged import relative

LENGTHS = (7, 1, 12, 4)
IDS = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, **GROUPED),
    "llama without groups": LlamaConfig(**SHAPE),
    "mistral, window 3": MistralConfig(**SHAPE, **GROUPED, sliding_window=3),
    "qwen3": Qwen3Config(**SHAPE, **GROUPED),
    "phi3, window 5": Phi3Config(**SHAPE, num_key_value_heads=2, sliding_window=5),
    "gemma2, window 4": Gemma2Config(
        **SHAPE, **GROUPED, sliding_window=4, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
        query_pre_attn_scalar=8,
    ),
    "gemma3, window 4": Gemma3TextConfig(
        **SHAPE, **GROUPED, sliding_window=4, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4),
}  # fmt: skip
LEAKS: dict[str, PretrainedConfig] = {
    "gpt-oss": GptOssConfig(**SHAPE, **GROUPED, num_local_experts=2, num_experts_per_tok=1),
    "mamba": MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4),
    "lfm2": Lfm2Config(**SHAPE, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
}
"""Attention sinks, a state space, short convolutions."""
WINDOWS: dict[str, PretrainedConfig] = {
    "qwen2-moe": Qwen2MoeConfig(
        **SHAPE, num_key_value_heads=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=2,
        num_experts_per_tok=1, use_sliding_window=True, sliding_window=9, max_window_layers=0,
        layer_types=["sliding_attention"] * 2,
    ),
    "phimoe": PhimoeConfig(**SHAPE, num_key_value_heads=2, num_local_experts=2, sliding_window=9),
}  # fmt: skip
"""Sliding windows of 9 tokens, of which only the mask of these models knows, not the attention."""


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def policy_of(config: PretrainedConfig, compute: torch.dtype = torch.float32, attention: str = "eager") -> Policy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # else scores are near 0 and every attention near the mean
    return Policy(model.eval(), compute)


def tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 61, (n,), generator=torch.Generator().manual_seed(seed))


def packed(parts: Sequence[Tensor], places: Sequence[Tensor], sequences: Sequence[Sequence[int]]) -> Sequences:
    """Tokens of all parts behind one another, every one a predictor."""
    ids = torch.cat(list(parts))
    everywhere = torch.arange(len(ids))
    return Sequences(ids[None], torch.cat(list(places))[None], None, rows_of(sequences, len(ids)), everywhere, ids)


def alone(ids: Tensor) -> Sequences:
    place = torch.arange(len(ids))
    return Sequences(ids[None], place[None], None, None, place, ids)


def pull(n: int, width: int) -> Tensor:
    """A fixed direction to differentiate hidden states [n, width] along."""
    return torch.randn(n, width, generator=torch.Generator().manual_seed(9))


def outcome(policy: Policy, states: Callable[[], Tensor], direction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and gradients of their sum along a direction."""
    policy.zero_grad(set_to_none=True)
    hidden = states()
    (hidden * direction).sum().backward()
    grads = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    return hidden.detach().float(), grads


def check_equal(policy: Policy, packing: Sequences, each: Callable[[], Tensor], pulls: tuple[Tensor, Tensor]) -> None:
    """Packed hidden states and gradients against `each`; pulls: the direction for packed and for separate ones."""
    exact, exact_grads = outcome(policy, each, pulls[1])
    policy.model.set_attn_implementation(NAME)
    found, grads = outcome(policy, lambda: policy.hidden(packing), pulls[0])
    narrow = policy.compute_dtype != torch.float32
    assert relative(found, exact[: len(found)]) < (0.02 if narrow else 1e-5)
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        size = float(exact_grads[name].norm())
        if size > 1e-5:  # a key's bias moves no score
            assert relative(grad, exact_grads[name]) < (0.05 if narrow else 1e-5), name


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_packed_documents_are_as_alone(name: str, compute: torch.dtype) -> None:
    policy = policy_of(CONFIGS[name], compute)
    parts = [tokens(n, seed) for seed, n in enumerate(LENGTHS)]
    cuts = torch.arange(sum(LENGTHS)).split(LENGTHS)
    direction = pull(sum(LENGTHS), 32)
    check_equal(
        policy,
        packed(parts, [torch.arange(n) for n in LENGTHS], [cut.tolist() for cut in cuts]),
        lambda: torch.cat([policy.hidden(alone(part)) for part in parts]),
        (direction, direction),
    )


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_shared_prompt_is_as_two(name: str, compute: torch.dtype) -> None:
    """Prompt a with responses b and c, then a document d of its own: abc + d against ab, ac and d."""
    policy = policy_of(CONFIGS[name], compute)
    a, b, c, d = (tokens(n, seed) for seed, n in enumerate((6, 5, 8, 3)))
    at_a, at_b, at_c, at_d = torch.arange(22).split([6, 5, 8, 3])
    places = [torch.arange(6), torch.arange(6, 11), torch.arange(6, 14), torch.arange(3)]
    rows = [[*at_a.tolist(), *at_b.tolist()], [*at_a.tolist(), *at_c.tolist()], at_d.tolist()]

    def each() -> Tensor:
        ab, ac, own = (policy.hidden(alone(torch.cat(ids))) for ids in ((a, b), (a, c), (d,)))
        assert relative(ab[:6].detach(), ac[:6].detach()) < 0.02, "the prompt does not see its response"
        # The second prompt's states come last: packed, there is one of each.
        return torch.cat([ab, ac[6:], own, ac[:6]])

    direction = pull(22, 32)
    # Half of what pulls at the shared prompt pulls at either copy of it.
    apart = torch.cat([direction[:6] / 2, direction[6:], direction[:6] / 2])
    check_equal(policy, packed([a, b, c, d], places, rows), each, (direction, apart))


def test_rows_know_every_place() -> None:
    rows = rows_of([[0, 1, 2], [0, 1, 3, 4], [5]], 6)
    assert rows.shape == (3, 4)
    assert rows.source.view(3, 4).tolist() == [[0, 1, 2, 0], [0, 1, 3, 4], [5, 0, 0, 0]]
    assert rows.home.tolist() == [0, 1, 2, 6, 7, 8]
    assert (rows.again.tolist(), rows.again_place.tolist()) == ([0, 1], [4, 5])


def qkv(total: int, heads: int = 2, size: int = 4) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, total, size, generator=draw).requires_grad_() for _ in range(3)]


def test_padding_gives_and_gets_nothing() -> None:
    """Places without a token copy token 0; were they looked at, its gradient would have their share."""
    query, key, value = qkv(4)
    out, _ = rows_attention(None, query, key, value, None, bnfctl_rows=rows_of([[0], [1, 2, 3]], 4))
    assert out.shape == (1, 4, 2, 4)
    torch.testing.assert_close(out[:, 0], value.transpose(1, 2)[:, 0])
    out[:, 1:].sum().backward()
    for states in (query, key, value):
        assert states.grad is not None and not states.grad[:, :, 0].any()
        assert states is not value or bool(states.grad[:, :, 1:].any())


def test_rows_that_did_not_arrive_are_an_error() -> None:
    with pytest.raises(ValueError, match="rows did not arrive"):
        rows_attention(None, *qkv(3), None)


def test_rows_move_to_a_device() -> None:
    rows = rows_of([[0, 1], [0, 2]], 3).to(torch.device("meta"))
    assert isinstance(rows, Rows) and rows.shape == (2, 2)
    assert all(part.is_meta for part in (rows.source, rows.home, rows.again, rows.again_place))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_these_models_pack(name: str) -> None:
    policy = policy_of(CONFIGS[name])
    assert packs(policy, NAME, "eager", 64) and policy.attends_rows


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(LEAKS))
def test_these_models_leak(name: str, compute: torch.dtype) -> None:
    policy = policy_of(LEAKS[name], compute)
    before = policy.attention
    assert not packs(policy, NAME, before, 64) and policy.attention == before


@pytest.mark.parametrize("name", list(WINDOWS))
def test_a_window_that_packing_would_lose(name: str) -> None:
    """Nothing is lost where no sequence is longer than the window."""
    policy = policy_of(WINDOWS[name])
    assert not packs(policy, NAME, "eager", longest=10) and policy.attention == "eager"
    assert packs(policy, NAME, "eager", longest=9) and policy.attention == NAME


def test_sdpa_without_rows_is_found_out() -> None:
    """An attention that is not told where documents end leaks, with or without position ids."""
    policy = policy_of(CONFIGS["llama"], attention="sdpa")

    def blind(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        total = query.shape[2]
        one = rows_of([range(total)], total)
        return rows_attention(module, query, key, value, None, bnfctl_rows=one)

    from transformers import AttentionInterface

    AttentionInterface.register("blind", blind)
    assert not packs(policy, "blind", "sdpa", 64) and policy.attention == "sdpa"


def test_auto_falls_back_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    policy = policy_of(LEAKS["gpt-oss"])
    assert not choose_packing(policy, "auto", "auto", 64, "here")
    said = capsys.readouterr().err
    assert "GptOssForCausalLM with eager attention does not keep packed documents apart" in said
    assert "sequences are padded" in said


def test_packed_is_an_error_where_it_leaks() -> None:
    with pytest.raises(UsageError, match="does not keep packed documents apart") as caught:
        choose_packing(policy_of(LEAKS["lfm2"]), "packed", "auto", 64, "the folder")
    assert caught.value.where == "the folder" and caught.value.hint == "--layout padded"


@pytest.mark.parametrize("layout", ["auto", "packed"])
def test_eager_pads(layout: str) -> None:
    policy = policy_of(CONFIGS["llama"])
    if layout == "packed":
        with pytest.raises(UsageError, match="eager attention does not keep"):
            choose_packing(policy, layout, "eager", 64, "here")
    else:
        assert not choose_packing(policy, layout, "eager", 64, "here")
    assert policy.attention == "eager"


def test_padded_is_not_tried(capsys: pytest.CaptureFixture[str]) -> None:
    policy = policy_of(CONFIGS["llama"], attention="sdpa")
    assert not choose_packing(policy, "padded", "auto", 64, "here") and policy.attention == "sdpa"
    assert choose_packing(policy, "auto", "auto", 64, "here") and policy.attention == NAME
    assert not capsys.readouterr().err


def test_a_soft_cap_needs_eager_where_it_pads(tmp_path: Path) -> None:
    """transformers' sdpa leaves Gemma-2's cap out."""
    for name, expected in (("gemma2, window 4", "eager"), ("llama", "sdpa")):
        CONFIGS[name].save_pretrained(tmp_path / name)
        assert padded_attention(tmp_path / name) == expected
        assert padded_attention(tmp_path / name, "flash_attention_2") == "flash_attention_2"
