"""A tiny random Llama with a tokenizer, as a folder: what the model and training tests run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 307


def tiny_config(**overrides: Any) -> LlamaConfig:
    """Two layers, head_dim 32, an odd vocabulary, and attention dropout that training must not apply."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "attention_dropout": 0.5}
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    rest = {"tie_word_embeddings": True, "initializer_range": 0.2}
    return LlamaConfig(**{**shape, **heads, **ids, **rest, **overrides})


def write_model(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **overrides: Any) -> Path:
    """Save a random model and a word-level tokenizer in `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(tiny_config(**overrides))
    model.to(dtype).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    splitting = Tokenizer(WordLevel(words, unk_token="w3"))
    splitting.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitting, bos_token="w1", eos_token="w2", pad_token="w0")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder
