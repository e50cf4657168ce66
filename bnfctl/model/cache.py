"""What a token costs in a KV cache, asked of config.json before a model is loaded."""

from __future__ import annotations

from pathlib import Path

from bnfctl.data.chat import read_config


def cache_bytes_per_token(model_dir: Path, bytes_per_number: int) -> int:
    """An upper bound of the KV cache that one token takes, from config.json."""
    config = read_config(model_dir)
    config = {**config, **(config.get("text_config") or {})}
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 1
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    hidden = config.get("hidden_size") or config.get("n_embd") or 1
    head_dim = config.get("head_dim") or hidden // heads
    return max(1, 2 * layers * (config.get("num_key_value_heads") or heads) * head_dim * bytes_per_number)
