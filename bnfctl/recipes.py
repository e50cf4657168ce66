"""What a known base model brings along: the paper's preference set and learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PUBLISHED_SETS = {
    "mistralai/Mistral-7B-Instruct-v0.2": "princeton-nlp/mistral-instruct-ultrafeedback",
    "meta-llama/Meta-Llama-3-8B-Instruct": "princeton-nlp/llama3-ultrafeedback-armorm",
    "google/gemma-2-9b-it": "princeton-nlp/gemma2-ultrafeedback-armorm",
}
"""The preference sets that the paper trained its three models on."""

_TRAIN_RECIPES: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-Instruct-v0.2": {"lr": 5e-7},
    "meta-llama/Meta-Llama-3-8B-Instruct": {"lr": 6e-7},
    "google/gemma-2-9b-it": {"lr": 8e-7},
    "lab": {"lr": 1.8e-4, "batch_size": 32},
}
"""Paper, section 4: learning rates after its grid search at batch 128; the lab's are measured in its notes."""


LORA_LR = 1e-5
"""Of adapters, which start at 0 and need a larger rate than the paper's, which are for all parameters."""


def train_recipe(values: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(title, values) that a known base model brings along, and LoRA's rate; empty for any other."""
    model = str(values.get("model") or "").split("@")[0]
    recipe = _TRAIN_RECIPES.get(model, {})
    if values.get("lora"):
        return "recipe of LoRA: the rates of full training don't apply", {**recipe, "lr": LORA_LR}
    return f"recipe of {model}", recipe
