"""The embedded world: a small real Llama, its prompts and its verifiers, so that alignment can be tried on a laptop.

`world` is plain Python; `tokenizer` and `pretrain` made the model in `MODEL_PATH` (see NOTES.md).
"""

from __future__ import annotations

from pathlib import Path

MODEL_PATH: Path = Path(__file__).resolve().parent / "model"
