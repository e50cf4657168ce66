"""doctor: what this machine can do, which extras are missing, and the command that installs them."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bnfctl import __version__, console
from bnfctl.browse import human

_EXTRAS = {
    "vllm": "vllm",
    "math_verify": "math",
    "bitsandbytes": "bitsandbytes",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "hypothesis": "test",
    "trl": "bench",
    "ruff": "dev",
}
"""A module that tells whether an extra is there, and the extra's name."""

_ONE_8B_TRAINING = 96e9
"""Bytes of one checkpoint of an 8B model: float32 masters and two AdamW moments."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    state: str
    """ "ok", "missing" or "note"."""
    detail: str


def examine(home: Path) -> Iterator[Finding]:
    """Everything doctor knows how to look at; loads torch, changes nothing."""
    yield Finding("bnfctl", "ok", f"{__version__}, Python {platform.python_version()}, {platform.system()}")
    for package in ("torch", "transformers", "datasets", "accelerate", "peft"):
        try:
            yield Finding(package, "ok", version(package))
        except PackageNotFoundError:
            yield Finding(package, "missing", "pip install bnfctl")
    yield from _devices()
    yield from _extras()
    yield Finding("pairrm, armorm", "note", "not yet checked against the released weights")
    yield _disk(home)
    yield _hub()


def _devices() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("cpu", "ok", f"{cores} cores, {human(memory)} memory")
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        yield Finding("gpu", "note", "none that torch can use: fine for the lab, too slow for a real model")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = f"{properties.name}, {human(properties.total_memory)}, bfloat16 {torch.cuda.is_bf16_supported()}"
        yield Finding(f"gpu {index}", "ok", detail)


def _extras() -> Iterator[Finding]:
    for module, extra in _EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(f"extra {extra}", "missing", f"pip install 'bnfctl[{extra}]'")
        else:
            yield Finding(f"extra {extra}", "ok", f"{module} is installed")


def _disk(home: Path) -> Finding:
    existing = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    state = "ok" if free > 2 * _ONE_8B_TRAINING else "note"
    hint = "" if state == "ok" else "; training an 8B model keeps up to two checkpoints of 96 GB while it runs"
    return Finding("disk", state, f"{human(free)} free for {home}{hint}")


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes"):
        return Finding("hub", "note", "HF_HUB_OFFLINE is set: only what the local cache holds")
    from huggingface_hub import HfApi, get_token

    try:
        HfApi().repo_info("llm-blender/PairRM", timeout=5.0)
    except Exception as error:  # whatever the client raises, the answer is that the hub did not answer
        return Finding(
            "hub", "note", f"not reached ({type(error).__name__}): folders, local files and the lab still work"
        )
    signed_in = "with a token" if get_token() else "no token: gated models need `hf auth login`"
    return Finding("hub", "ok", signed_in)


def as_table(findings: list[Finding]) -> str:
    """The report for people."""
    return console.table("", ["", "state", "detail"], [[f.what, f.state, f.detail] for f in findings])
