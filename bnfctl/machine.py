"""What this machine computes with, asked without importing torch: `auto` has to be resolved before the key."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Device files of NVIDIA, AMD and WSL drivers."""


def has_gpu() -> bool:
    """Whether torch will find a GPU: a driver is there, torch is no CPU build, and none of them is hidden."""
    try:
        cpu_build = version("torch").endswith("+cpu")
    except PackageNotFoundError:
        cpu_build = True
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    return not cpu_build and not hidden and any(Path(device).exists() for device in _DEVICES)


def resolve_dtype(name: str) -> str:
    """The compute type that `auto` stands for here: bfloat16 on a GPU, float32 on a CPU."""
    if name != "auto":
        return name
    return "bfloat16" if has_gpu() else "float32"
