"""What the servers serve: the model's name there, whether it is vLLM, how long its context is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfctl import console
from bnfctl.client.endpoint import Client
from bnfctl.client.servers import Backoff, RefusedError
from bnfctl.config import EvalConfig, GenerateConfig, ScoreConfig
from bnfctl.errors import BnfctlError, UsageError, nearest

_TRIES = 4
_PROBE = "Hello, world! 12345 {x: [1.5, -2]}\n\tdef f(y):  return 'ä' + \"你好\"  # 😀"


@dataclass(frozen=True)
class Served:
    """One model, the same on all servers."""

    name: str
    vllm: bool
    """Whether all servers are vLLM, which takes and returns token ids."""
    context: int | None
    """Tokens of prompt + response, where the servers say."""
    version: str
    """The engine, for provenance."""


def connect(
    config: GenerateConfig | ScoreConfig | EvalConfig, answers: Path | None = None, backoff: Backoff | None = None
) -> Client:
    """A client for the servers of a config; UsageError for a URL or a key that cannot be used."""
    return Client(
        config.server, concurrency=config.concurrency, timeout=config.timeout, retries=config.retries,
        api_key_env=config.api_key_env, answers=answers, backoff=backoff,
        max_calls=config.max_calls if isinstance(config, EvalConfig) else None,
    )  # fmt: skip


def name_for(config: GenerateConfig | ScoreConfig | EvalConfig) -> str:
    """The model that a config means: the one it names, or the only one that its servers have.  Raises as `served`."""
    client = connect(config)
    return config.served_model or served(client, None).name


def served(client: Client, asked: str | None) -> Served:
    """The model called `asked`, or the only one that the servers have.

    A server that does not answer is left out with a warning, as long as another one does.  Raises BnfctlError when
    none does, UsageError when there is no such model, or more than one to choose from.
    """
    found = _models(client)
    names = {url: [str(model.get("id")) for model in models] for url, models in found.items()}
    listed = {url: ids for url, ids in names.items() if ids}
    if asked is None:
        shared = [name for name in next(iter(listed.values()), []) if all(name in ids for ids in listed.values())]
        if len(shared) != 1 or len(listed) < len(names):
            have = "; ".join(f"{url}: {', '.join(ids[:8]) or 'none listed'}" for url, ids in names.items())
            raise UsageError(
                f"which model? The servers have {have}", where="--served-model", hint="--served-model NAME"
            )
        asked = shared[0]
    for url, ids in listed.items():
        if asked not in ids:
            raise UsageError(
                f"the server has no model '{asked}'{nearest(asked, ids)}", where=url,
                hint=f"--served-model {ids[0]}" if len(ids) == 1 else f"it has {', '.join(ids[:20])}",
            )  # fmt: skip
    mine = [next((model for model in models if model.get("id") == asked), {}) for models in found.values()]
    vllm = all(model.get("owned_by") == "vllm" for model in mine)
    contexts = [model["max_model_len"] for model in mine if isinstance(model.get("max_model_len"), int)]
    return Served(asked, vllm, min(contexts, default=None), _version(client, list(found), asked, vllm))


def check_tokenizer(client: Client, model: Served, tokenizer: Any) -> None:
    """UsageError when a vLLM server turns a text into other ids than `tokenizer`: it serves another model."""
    ids = list(tokenizer.encode(_PROBE, add_special_tokens=False))
    for url in client.urls:
        body = {"model": model.name, "prompt": _PROBE, "add_special_tokens": False}
        try:
            answer = client.fetch(_root(url) + "/tokenize", body)
        except BnfctlError:
            continue  # a proxy that lets only /v1 through, or a server that is away
        if answer is not None and isinstance(answer.get("tokens"), list) and answer["tokens"] != ids:
            raise UsageError(
                f"{model.name} has another tokenizer than --model", where=url,
                hint="give the model that the server runs: --model FOLDER; or leave --model out and keep text only",
            )  # fmt: skip


def _models(client: Client) -> dict[str, list[dict[str, Any]]]:
    """URL -> its models (none where it lists none), of all servers that answer."""
    found: dict[str, list[dict[str, Any]]] = {}
    away: list[BnfctlError] = []
    for url in client.urls:
        try:
            answer = client.fetch(url + "/models", tries=_TRIES)
        except RefusedError:
            raise
        except BnfctlError as error:
            away.append(error)
            continue
        data = (answer or {}).get("data")
        found[url] = [model for model in data if isinstance(model, dict)] if isinstance(data, list) else []
    if not found:
        raise away[0]
    for missing in away:
        console.say(f"{missing.where}: {missing.what}; going on with the other servers")
    return found


def _version(client: Client, urls: list[str], name: str, vllm: bool) -> str:
    if not vllm:
        return f"server {name}"
    versions = set()
    for url in urls:
        try:
            answer = client.fetch(_root(url) + "/version")
        except BnfctlError:
            answer = None
        if answer is not None and isinstance(answer.get("version"), str):
            versions.add(answer["version"])
    return f"server {name}, vllm {' and '.join(sorted(versions))}" if versions else f"server {name}, vllm"


def _root(url: str) -> str:
    """vLLM's own paths lie beside /v1."""
    return url.removesuffix("/v1")
