"""A policy: body and head of a transformers model, and nothing in between that they do not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaForCausalLM,
    PhiConfig,
    PretrainedConfig,
)

from bnfctl.errors import UsageError
from bnfctl.model.policy import Policy, Sequences, check_parts
from tests.losses.ragged import relative
from tests.model.tiny import VOCABULARY, tiny_config

IDS = torch.tensor([5, 9, 200, 306, 17])
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GROUPED = {"num_key_value_heads": 1, "head_dim": 16}


def policy_of(config: PretrainedConfig, compute: torch.dtype = torch.float32, attention: str = "eager") -> Policy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return Policy(model.eval(), compute)


def sequences(ids: Tensor = IDS, padding: int = 0) -> Sequences:
    """One sequence, every token but the last a predictor."""
    place = torch.arange(len(ids) + padding)
    mask = (place < len(ids)).long()[None] if padding else None
    padded = torch.cat([ids, torch.zeros(padding, dtype=torch.int64)])
    return Sequences(padded[None], place[None], mask, None, torch.arange(len(ids) - 1), ids[1:])


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(tie_word_embeddings=False),
        Gemma2Config(**SHAPE, **GROUPED, final_logit_softcapping=2.0, query_pre_attn_scalar=16),
        GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2),
        PhiConfig(**SHAPE),  # a bias in the head
    ],
    ids=["tied", "untied", "gemma2", "gpt2", "phi"],
)
def test_body_and_head_are_the_model(config: PretrainedConfig) -> None:
    policy = policy_of(config)
    if policy.model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(policy.model.get_output_embeddings().bias)
    check_parts(policy, "here")
    logits = policy.model(IDS[None]).logits[0, :-1].double()
    exact = logits.log_softmax(-1).gather(-1, IDS[1:, None]).squeeze(-1)
    logp, log_odds, entropy = policy.logps(sequences())
    torch.testing.assert_close(logp.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_odds.double(), exact - torch.log(-torch.expm1(exact)), rtol=1e-5, atol=1e-5)
    assert entropy is None and logp.requires_grad and not log_odds.requires_grad
    tied = policy.head.matrix is policy.model.get_input_embeddings().weight
    assert tied == config.tie_word_embeddings


def test_both_ways_agree() -> None:
    policy = policy_of(tiny_config())
    pull = torch.linspace(-1, 1, len(IDS) - 1)
    logp, log_odds, entropy = policy.logps(sequences(), entropy=True)
    (logp @ pull).backward()
    exact = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    surrogate, *others = policy.one_pass(sequences(), lambda part, odds: pull[part], entropy=True)
    surrogate.backward()
    assert float(surrogate.detach()) == pytest.approx(float((logp @ pull).detach()), rel=1e-6)
    assert torch.equal(others[0], logp.detach()) and torch.equal(others[1], log_odds)
    # One pass has the entropy's sum from its gradient.
    torch.testing.assert_close(others[2], entropy, rtol=1e-6, atol=1e-6)
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and relative(parameter.grad, exact[name]) < 1e-6, name


def test_padding_on_the_right_changes_nothing() -> None:
    policy = policy_of(tiny_config(), attention="sdpa")
    torch.testing.assert_close(policy.hidden(sequences(padding=4)), policy.hidden(sequences()), rtol=1e-5, atol=1e-5)


def test_dropout_is_off() -> None:
    policy = policy_of(tiny_config())
    assert policy.model.config.attention_dropout == 0.5
    once, again = (policy.hidden(sequences()) for _ in range(2))
    assert torch.equal(once, again) and once.requires_grad


def test_bfloat16_computes_over_float32_masters() -> None:
    exact, policy = policy_of(tiny_config()), policy_of(tiny_config(), torch.bfloat16)
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    hidden, expected = policy.hidden(sequences()).detach(), exact.hidden(sequences()).detach()
    assert hidden.dtype == torch.bfloat16 and expected.dtype == torch.float32
    assert 0 < relative(hidden, expected) < 0.05
    assert policy.logps(sequences())[0].dtype == torch.float32


@pytest.mark.parametrize(
    "config",
    [GraniteConfig(**SHAPE, num_key_value_heads=1, logits_scaling=4.0), CohereConfig(**SHAPE, logit_scale=0.25)],
    ids=["granite", "cohere"],
)
def test_unknown_changes_to_the_logits_are_refused(config: PretrainedConfig) -> None:
    """They scale their logits: a head that ignores that would train something else, silently."""
    with pytest.raises(UsageError, match="changes its logits") as caught:
        check_parts(policy_of(config), "that folder")
    assert caught.value.where == "that folder" and "Llama" in str(caught.value.hint)


def test_a_model_without_a_head_is_refused() -> None:
    with torch.random.fork_rng():
        model: Any = LlamaForCausalLM(tiny_config())
    with pytest.raises(UsageError, match="no separate body and head"):
        Policy(model.model, torch.float32)


def test_an_encoder_is_refused() -> None:
    """BERT as a language model puts more between body and logits than a matrix."""
    config = BertConfig(**SHAPE, is_decoder=True)
    with pytest.raises(UsageError, match="changes its logits"):
        check_parts(policy_of(config), "here")
