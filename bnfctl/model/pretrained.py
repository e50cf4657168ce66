"""Model folders into memory, the one way for sampling, scoring and training; what is not whole is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from bnfctl.errors import UsageError
from bnfctl.machine import resolve_dtype
from bnfctl.model.threads import limit_threads

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a config's dtype; `auto` as `machine.resolve_dtype` has it."""
    return DTYPES[resolve_dtype(name)]


def load_pretrained(auto_class: Any, path: Path, dtype: torch.dtype, trust_remote_code: bool, **options: Any) -> Any:
    """The model in `path` by a transformers Auto class, on the CPU, in eval mode.

    Raises UsageError when it can't be read, or lacks parameters: transformers would make those up.
    """
    logging.disable_progress_bar()  # bnfctl has its own
    limit_threads(path)
    try:
        model, info = auto_class.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"cannot load the model: {reason}", where=str(path), hint="check its config.json and *.safetensors"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UsageError(
            f"the checkpoint lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
            where=str(path),
            hint=f"this is no complete {type(model).__name__}: take another model, or another --scorer or stage",
        )
    return model.eval()


def device() -> torch.device:
    """The GPU where torch has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
