"""A tiny random model with a tokenizer, mostly a Llama, as a folder: what the model and training tests run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, PreTrainedTokenizerFast

VOCABULARY = 307


def tiny_config(**overrides: Any) -> LlamaConfig:
    """Two layers, head_dim 32, an odd vocabulary, and attention dropout that training must not apply."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "attention_dropout": 0.5}
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    rest = {"tie_word_embeddings": True, "initializer_range": 0.2}
    return LlamaConfig(**{**shape, **heads, **ids, **rest, **overrides})


def opt_config() -> OPTConfig:
    """Dropout of 0.1 in functions, not modules: a layer in training mode applies it.  No bias of keys: it moves no score."""
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    shape = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96, "num_hidden_layers": 2}
    return OPTConfig(
        **ids, **shape, num_attention_heads=2, max_position_embeddings=128, enable_bias=False, dropout=0.1, init_std=0.2
    )


def write_model(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **overrides: Any) -> Path:
    """Save a random Llama and a word-level tokenizer in `folder`."""
    return write_any(folder, tiny_config(**overrides), dtype, seed)


def write_any(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """The same of another kind of model, with VOCABULARY tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config)
    model.to(dtype).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    splitting = Tokenizer(WordLevel(words, unk_token="w3"))
    splitting.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitting, bos_token="w1", eos_token="w2", pad_token="w0")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder
