"""What is asked of a server, and how its answers are read: the two generating calls of the OpenAI protocol."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bnfctl.data.jsonl import without_surrogates

CHAT, COMPLETIONS = "/chat/completions", "/completions"
"""Below a base URL, which ends with /v1."""

VLLM_NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""vLLM fills in what a request leaves out from the model's generation config, which must not leak into ours."""


_TOO_LONG = re.compile(
    r"^413\b|context|max_(completion_)?tokens|token limit|maximum number of tokens|too long|too large|too many tokens",
    re.IGNORECASE,
)
_UNKNOWN = re.compile(r"unsupported|not supported|unrecognized|unknown|not permitted", re.IGNORECASE)
"""Of a refusal that is about a parameter as such: some servers know no max_tokens, whatever the length."""
_CONTENT_CODE = re.compile(
    r"content.?(filter|polic)|responsible.?ai.?polic|invalid_prompt|moderation|safety|prohibited.?content|data_?inspection",
    re.IGNORECASE,
)
"""What OpenAI, Azure, Google, Alibaba and those between call the refusal of a text, as the error's code or type."""
_CONTENT = re.compile(
    r"content.?(filter|polic|management)|moderation|safety|flagged|(usage|acceptable use) (guideline|polic)"
    r"|content exists risk|inappropriate content|(sensitive|unsafe|prohibited) content",
    re.IGNORECASE,
)
"""The same in words, for servers that give no code of their own."""
_NOT_CONTENT = re.compile(r"unsupported|not supported|unrecognized|unknown|\baccount|\borgani[sz]ation", re.IGNORECASE)
"""A parameter with such a name, or a client that is no longer served: the same for every prompt."""
_CONTENT_MARK = " (the text is refused: "
LIMIT_NAMES = ("max_tokens", "max_completion_tokens")
"""What the most tokens of a response are called: by nearly all servers, and by models that take only the newer name."""


class MalformedError(Exception):
    """An answer without what was asked for; the request is tried again."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call; two with the same path and body are one call, made once."""

    tag: Any
    """Comes back with the answer."""
    path: str
    body: dict[str, Any]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    """What to keep of the answer (JSON); raises MalformedError."""
    may_refuse: bool = False
    """Hand out a refusal (400, 413, 422) as the answer {"refused": message} in place of an error."""

    @property
    def key(self) -> str:
        """What identifies the call, on whatever server and with whatever key: SHA-256 of path and body."""
        text = json.dumps([self.path, self.body], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Known:
    """In the place of a request: there is nothing to ask, the answer is here."""

    tag: Any
    answer: dict[str, Any]


def hashed_seed(*what: Any) -> int:
    """A 53-bit seed from what is asked: exact in JSON, the same in every run."""
    return int.from_bytes(hashlib.sha256(json.dumps(what).encode()).digest()[:7], "big") >> 3


def too_long(refusal: str) -> bool:
    """Whether a server refuses a request for its length (each engine has its own words for it)."""
    return _TOO_LONG.search(refusal) is not None and _UNKNOWN.search(refusal) is None


def with_code(message: str, error: Any) -> str:
    """A server's message, with the code that says that it refuses a text, if the error (JSON) has one."""
    inner = error.get("innererror") if isinstance(error, dict) else None
    parts = [part for part in (error, inner) if isinstance(part, dict)]
    codes = [part[name] for part in parts for name in ("code", "type") if isinstance(part.get(name), str)]
    code = next((code for code in codes if _CONTENT_CODE.search(code)), None)
    return message if code is None else f"{message}{_CONTENT_MARK}{code[:80]})"


def about_content(refusal: str) -> bool:
    """Whether a server refuses a request for what this prompt says: others it will take.  refusal: by `with_code`."""
    return _CONTENT_MARK in refusal or (_CONTENT.search(refusal) is not None and _NOT_CONTENT.search(refusal) is None)


def wants_new_limit(refusal: str) -> bool:
    """Whether a server refuses a request because its model does not know the first of LIMIT_NAMES."""
    return LIMIT_NAMES[0] in refusal and _UNKNOWN.search(refusal) is not None


def read_chat(answer: dict[str, Any]) -> dict[str, Any]:
    """{"choices": [{"text", "finish"}], "usage"}; a reasoning text that the server split off goes back in front."""
    return _read(answer, _chat_choice)


def read_completion(answer: dict[str, Any]) -> dict[str, Any]:
    """{"choices": [{"text", "finish"}], "usage"}, or with "ids" in the place of "text" where the server sent them."""
    return _read(answer, _completion_choice)


def _read(answer: dict[str, Any], read_choice: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices:
        raise MalformedError(f"an answer without choices{_error_in(answer)}")
    if not all(isinstance(choice, dict) for choice in choices):
        raise MalformedError("an answer whose choices are no objects")
    places = [choice.get("index") for choice in choices]
    if sorted(places, key=str) == sorted(range(len(choices)), key=str):
        choices = sorted(choices, key=lambda choice: int(choice["index"]))
    usage = answer.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    kept = {name: counts[name] for name in ("prompt_tokens", "completion_tokens") if isinstance(counts.get(name), int)}
    return {"choices": [read_choice(choice) for choice in choices], "usage": kept}


def _chat_choice(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message")
    if not isinstance(message, dict):
        raise MalformedError("a choice without a message")
    content = message.get("content")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(content, str | None):
        raise MalformedError("a message whose content is no text")
    text = content or ""
    if isinstance(reasoning, str):  # None as the content: it was cut off while thinking
        text = f"<think>{reasoning}" + ("" if content is None else f"</think>{content}")
    return {"text": without_surrogates(text), "finish": _finish(choice)}


def _completion_choice(choice: dict[str, Any]) -> dict[str, Any]:
    ids, text = choice.get("token_ids"), choice.get("text")
    if isinstance(ids, list) and all(type(number) is int and 0 <= number < 1 << 31 for number in ids):
        return {"ids": ids, "finish": _finish(choice)}
    if not isinstance(text, str):
        raise MalformedError("a choice without a text")
    return {"text": without_surrogates(text), "finish": _finish(choice)}


def _finish(choice: dict[str, Any]) -> str | None:
    reason = choice.get("finish_reason")
    if reason == "abort":  # vLLM's word for what it was doing when it was stopped
        raise MalformedError("a response that the server did not finish")
    return reason if isinstance(reason, str) else None


def _error_in(answer: dict[str, Any]) -> str:
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return f": {str(message)[:300]}" if message else ""
