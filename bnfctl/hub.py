"""Hub names to commits and to local folders: what was asked stays what is used, online or not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bnfctl.errors import UsageError

TIMEOUT = 10.0
"""Seconds for the one request that turns a branch into a commit."""


def split_revision(ref: str) -> tuple[str, str | None]:
    """("owner/name", "revision" or None) of `owner/name@revision`."""
    name, _, revision = ref.partition("@")
    return name, revision or None


def looks_like_hub(ref: str) -> bool:
    """owner/name, as the hub writes it, rather than a path."""
    name, _ = split_revision(ref)
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def commit_of(ref: str, kind: str) -> tuple[str | None, str]:
    """(commit, "") of a hub model or dataset, or (None, why not).  Offline, the local cache answers.

    kind: "model" or "dataset".
    """
    name, revision = split_revision(ref)
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("1", "true", "yes"):
        commit, why = _ask(name, revision, kind)
        if commit:
            return commit, ""
    else:
        why = "HF_HUB_OFFLINE is set"
    cached = _cached_commit(name, revision or "main", kind)
    if cached:
        return cached, ""
    return None, f"{why}, and the local cache has no copy of {ref}"


def _ask(name: str, revision: str | None, kind: str) -> tuple[str | None, str]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    try:
        info = api.repo_info(name, revision=revision, repo_type=kind, timeout=TIMEOUT)
        return info.sha, ""
    except GatedRepoError:
        return None, f"{name} is gated: accept its licence on the hub, then `hf auth login`"
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None, f"the hub has no {kind} {name}" + (f" at {revision}" if revision else "") + " that you may read"
    except Exception as error:  # the client's HTTP library has changed twice: whatever it raises, no answer came
        return None, f"the hub can't be reached ({type(error).__name__})"


def _cached_commit(name: str, revision: str, kind: str) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    if (folder / "snapshots" / revision).is_dir():
        return revision
    try:
        return (folder / "refs" / revision).read_text().strip()
    except OSError:
        return None


def download_model(pinned_ref: str) -> Path:
    """The local folder of `owner/name@commit`, fetched if the cache does not have it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    name, commit = split_revision(pinned_ref)
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken"]
    doubles = ["consolidated*", "original/*"]
    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns, ignore_patterns=doubles))
    except GatedRepoError:
        hint = "accept its licence on the hub, then `hf auth login`"
        raise UsageError(f"{name} is gated", where=pinned_ref, hint=hint) from None
    except Exception as error:  # every client error means the same to the user: it could not be fetched
        raise UsageError(
            f"could not fetch: {str(error).splitlines()[0]}",
            where=pinned_ref,
            hint="bnfctl doctor checks the hub access",
        ) from None


def model_config(ref: str) -> dict[str, Any] | None:
    """config.json of a hub model, from the cache or fetched alone; None where neither has it."""
    from huggingface_hub import hf_hub_download

    name, revision = split_revision(ref)
    try:
        file = hf_hub_download(name, "config.json", revision=revision, etag_timeout=TIMEOUT)
        found: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
        return found
    except Exception:  # whatever the client raises, there is no config to look at
        return None
