"""Which model is meant, pinned: a hub commit, a folder's content, a train artifact, or the lab's.

Imports no torch, so that keys and dry runs cost nothing.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from bnfctl import hub
from bnfctl.artifact import Artifact, Pinned, Store
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.tables import MODELS, load

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spm.model", "vocab.json", "vocab.txt")


def pin_model(ref: str, store: Store, where: str = "--model") -> Pinned:
    """The model behind `ref`; UsageError where no reading of it fits.

    Tried in order: a name of the package (lab), a train artifact, a folder, a hub id.
    """
    if ref in MODELS:
        folder = Path(load(MODELS, ref, "model"))
        return Pinned("lab", ref, store.digests.folder(folder), str(folder))
    artifact = store.search(ref)
    if artifact is not None:
        store.find(ref, "train", where)
        _check_artifact(artifact, store)
        return artifact.pinned()
    folder = Path(ref).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return Pinned("folder", str(folder.absolute()), store.digests.folder(folder), str(folder.absolute()))
    if hub.looks_like_hub(ref) and not folder.parent.is_dir():
        commit, why = hub.commit_of(ref, "model")
        name, _ = hub.split_revision(ref)
        return Pinned("hub-model", f"{name}@{commit}" if commit else ref, commit, None, why or None)
    raise UsageError(
        f"no model '{ref}'",
        where=where,
        hint="a hub id (owner/name), a folder, a train artifact (bnfctl ls train) or lab",
    )


def model_dir(pinned: Pinned) -> Path:
    """The local folder of a pinned model; downloads a hub model that the cache lacks."""
    if pinned.kind == "hub-model":
        return hub.download_model(pinned.ref)
    assert pinned.path is not None
    return Path(pinned.path) / "model" if pinned.kind == "artifact" else Path(pinned.path)


def safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets}; UsageError for a file that is none (a Git LFS pointer, say)."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size < file.stat().st_size:
            with contextlib.suppress(ValueError):
                header: dict[str, dict[str, Any]] = json.loads(opened.read(size))
                header.pop("__metadata__", None)
                return header
    raise UsageError("not a safetensors file", where=str(file), hint="fetch the model again (git lfs pull?)")


def stored_tensors(folder: Path) -> dict[str, dict[str, Any]]:
    """`safetensors_header` of all *.safetensors of a folder; UsageError where there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError("no *.safetensors in this folder", where=str(folder), hint="fetch the model again")
    return {name: entry for file in files for name, entry in safetensors_header(file).items()}


def _check_artifact(artifact: Artifact, store: Store) -> None:
    """A flipped byte in a trained model must not be sampled from; hashed once, then remembered."""
    if not (artifact.path / "model" / "config.json").is_file():
        hint = "train again with --lora-save merged; peft and vLLM --enable-lora take base and adapter as they are"
        raise UsageError(f"{artifact.ref} holds a LoRA adapter alone", where=str(artifact.path), hint=hint)
    for entry in artifact.manifest.files:
        file = artifact.path / entry["path"]
        if not file.is_file() or store.digests.file(file) != entry["sha256"]:
            state = "changed" if file.is_file() else "missing"
            hint = f"bnfctl verify {artifact.ref}; then bnfctl rm {artifact.ref} --force and make it again"
            raise BnfctlError(f"corrupted artifact: {entry['path']} is {state}", where=str(artifact.path), hint=hint)


def _check_folder(folder: Path) -> None:
    where = str(folder)
    if not (folder / "config.json").is_file():
        raise UsageError("a model folder needs config.json", where=where, hint="give the folder that has it")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"broken JSON: {error}", where=f"{where}/config.json", hint="fetch the model again") from None
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UsageError(
            "model folder without tokenizer", where=where, hint="save it there: tokenizer.save_pretrained(folder)"
        )
