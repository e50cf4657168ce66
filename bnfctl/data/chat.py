"""Chat text to token ids, the one way for sampling, scoring and training: render, then encode.

A template is always rendered to text and encoded with `add_special_tokens=False`, because many templates write BOS
themselves and their tokenizers would add it a second time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from bnfctl.data.jsonl import without_surrogates
from bnfctl.errors import UsageError

_VOCABULARY_FILES = (
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt",
    "added_tokens.json", "tekken.json", "*.tiktoken",
)  # fmt: skip
"""What decides ids in a folder that has no tokenizer.json."""

_TEMPLATE_FLAG = "--chat-template-kwargs"
_WORDS = {"true": True, "false": False, "none": None, "null": None}
_NOT_FOR_TEMPLATES = (
    "conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "chat_template",
)  # fmt: skip
"""Arguments of `apply_chat_template` itself (chat_template: the model's own is part of the key, another would not be)."""


def load_tokenizer(path: Path, trust_remote_code: bool) -> Any:
    """The tokenizer of a model folder; UsageError when there is none, or when it has no chat template."""
    if not (path / "tokenizer.json").is_file() and not _vocabulary_files(path):
        raise UsageError("no tokenizer in this folder", where=str(path), hint="copy the tokenizer's files there")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the libraries below raise plain Exception for a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"cannot load the tokenizer: {reason}",
            where=str(path),
            hint="check tokenizer.json and tokenizer_config.json",
        ) from error
    if not tokenizer.chat_template:
        raise UsageError(
            "the tokenizer has no chat template",
            where=str(path),
            hint="take an instruct model, or add chat_template.jinja to the folder",
        )
    return tokenizer


def tokenizer_digest(path: Path) -> str:
    """SHA-256 of what the token ids of a model folder mean; imports no transformers.

    From tokenizer.json: vocabulary, merges and added tokens.  Padding and truncation are state of the last call, and
    transformers rewrites normalizer, pre-tokenizer and post-processor by the tokenizer's class when it saves, so a
    copy that went through `save_pretrained` has the same digest.  Raises UsageError for a folder without tokenizer.
    """
    file = path / "tokenizer.json"
    if file.is_file():
        spec = _read_json(file)
        model = spec.get("model") or {}
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges") or ()]
        vocabulary = model.get("vocab") or {}
        tokens = {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}
        if isinstance(vocabulary, dict):  # whether a special token is in the vocabulary too depends on who saved it
            vocabulary = {**vocabulary, **tokens}
        what = {"type": model.get("type"), "vocab": vocabulary, "merges": merges, "added": tokens}
        # ASCII escapes: a vocabulary may hold what UTF-8 cannot
        return hashlib.sha256(json.dumps(what, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    files = _vocabulary_files(path)
    if not files:
        raise UsageError("no tokenizer in this folder", where=str(path), hint="copy the tokenizer's files there")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def context_length(path: Path) -> int | None:
    """The most tokens (prompt + response) the model in `path` has positions for; None where config.json is silent."""
    config = read_config(path)
    for part in (config, config.get("text_config") or {}):
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
            if isinstance(part.get(name), int) and part[name] > 0:
                return int(part[name])
    return None


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model folder; UsageError when there is none."""
    if not (path / "config.json").is_file():
        raise UsageError("no config.json in this folder", where=str(path), hint="give the folder of a model")
    return _read_json(path / "config.json")


def stop_ids(path: Path, tokenizer: Any) -> list[int]:
    """The ids that end a turn: all eos ids of generation_config.json (else of config.json), and the tokenizer's."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            config = _read_json(path / name)
            eos = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
            found.update([eos] if isinstance(eos, int) else eos or ())
            break
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return sorted(found)


def template_kwargs(pairs: Iterable[str]) -> dict[str, Any]:
    """The chat template's arguments from `name=value` texts: JSON where the value is JSON, else text.

    True, False and None are what Python means by them too: a template would take the text "False" for true.
    UsageError for a pair without a name, for a name given twice, and for what this package sets itself.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not name.isidentifier():
            hint = "enable_thinking=false; a value with commas goes into a --config file, as an item of a list"
            raise UsageError(f"'{pair}' is not name=value", where=_TEMPLATE_FLAG, hint=hint)
        if name in _NOT_FOR_TEMPLATES:
            raise UsageError(f"'{name}' is set by bnfctl", where=_TEMPLATE_FLAG, hint=f"leave {name} out")
        if name in found:
            raise UsageError(f"'{name}' is there twice", where=_TEMPLATE_FLAG, hint=f"give {name} one value")
        try:
            found[name] = _WORDS[text.lower()] if text.lower() in _WORDS else json.loads(text, parse_constant=str)
        except (ValueError, RecursionError):
            found[name] = text
    return found


def render_prompt(tokenizer: Any, messages: Iterable[Mapping[str, str]], /, **template_kwargs: Any) -> list[int]:
    """The prompt's ids by the chat template, up to where the response begins, with exactly one BOS in front.

    Raises UsageError when the template refuses the messages (some know no system turn).
    """
    return _encode_rendered(tokenizer, _render(tokenizer, messages, True, **template_kwargs))


def render_conversation(tokenizer: Any, messages: Iterable[Mapping[str, str]], /, **template_kwargs: Any) -> list[int]:
    """The ids of finished turns, without the generation prompt: what a reward model reads; one BOS."""
    return _encode_rendered(tokenizer, _render(tokenizer, messages, False, **template_kwargs))


def response_ids(
    tokenizer: Any, messages: Iterable[Mapping[str, str]], text: str, stops: Sequence[int], /, **template_kwargs: Any
) -> tuple[list[int], bool]:
    """(trained ids, did the turn end) of a response that exists as text only.

    The prompt, and the prompt with the assistant's turn, are rendered; what follows the rendered prompt is tokenized
    on its own, which is the boundary that sampling has, and ends at its first stop id, which counts.  A stop token
    written out in the text ends the turn there too, as it would when sampled; any other special token written out in
    the text is tokenized as the plain characters it is, so that a text cannot forge turns.

    Raises UsageError when the template changes the prompt once a response follows it.
    """
    turns, text = list(messages), without_surrogates(text)
    prompt = _render(tokenizer, turns, True, **template_kwargs)
    full = _render(tokenizer, [*turns, {"role": "assistant", "content": text}], False, **template_kwargs)
    if not full.startswith(prompt):
        raise UsageError(
            "the chat template renders the prompt differently once a response follows, so the response has no start",
            where="chat template",
            hint="use a template whose rendered prompt is the beginning of the rendered conversation",
        )
    tail = full[len(prompt) :]
    written = text if tail.startswith(text) else text.strip()  # many templates trim the response
    special = _special_tokens(tokenizer)
    if not (tail.startswith(written) and any(token in written for token in special)):
        return _until_stop(_encode_tail(tokenizer, tail), stops)
    cuts = [written.find(token) for token, number in special.items() if number in stops and token in written]
    if cuts:  # from here on the template's own end of turn is of no use: the text brought one
        end = min(cuts)
        plain = _encode_tail(tokenizer, written[:end], split_special_tokens=True)
        return _until_stop(plain + _encode(tokenizer, written[end:]), stops)
    plain = _encode_tail(tokenizer, written, split_special_tokens=True)
    rest, ended = _until_stop(_encode(tokenizer, tail[len(written) :]), stops)
    return plain + rest, ended


def _until_stop(ids: list[int], stops: Sequence[int]) -> tuple[list[int], bool]:
    end = next((position for position, number in enumerate(ids) if number in stops), None)
    return (ids, False) if end is None else (ids[: end + 1], True)


def _render(tokenizer: Any, messages: Iterable[Mapping[str, str]], prompt: bool, /, **template_kwargs: Any) -> str:
    import jinja2

    turns = [{**message, "content": without_surrogates(message["content"])} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **template_kwargs)
    except jinja2.TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UsageError(
            f"the chat template refuses turns of {roles}: {error}",
            where="chat template",
            hint="remove the system turn, or let user and assistant alternate",
        ) from error
    return str(text)


def _encode_rendered(tokenizer: Any, text: str) -> list[int]:
    ids, bos = _encode(tokenizer, text), tokenizer.bos_token_id
    if bos is None:
        return ids
    if ids[:1] != [bos] and tokenizer.encode("a")[:1] == [bos]:
        return [bos, *ids]
    while ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def _encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, **options)) if text else []


def _encode_tail(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The ids of text that continues other text.

    Tokenizers of the SentencePiece kind put a space in front of whatever they are given (Llama 2, Mistral 7B), which
    a response in mid-text does not have; behind a newline, which merges with nothing there, they do not.
    """
    if text and _adds_space(tokenizer):
        anchor, ids = _encode(tokenizer, "\n"), _encode(tokenizer, "\n" + text, **options)
        if ids[: len(anchor)] == anchor:
            return ids[len(anchor) :]
    return _encode(tokenizer, text, **options)


@lru_cache(maxsize=4)
def _adds_space(tokenizer: Any) -> bool:
    return _encode(tokenizer, "\nx")[-1:] != _encode(tokenizer, "x")


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Every special token as text, with its id (Llama 3 has 256 of them: too many to collect for each response)."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)), **added}


def _vocabulary_files(path: Path) -> list[Path]:
    return sorted(file for pattern in _VOCABULARY_FILES for file in path.glob(pattern) if file.is_file())


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"broken JSON: {error}", where=str(file), hint="fetch the model again") from None
    if not isinstance(value, dict):
        what = f"expected a JSON object, found {type(value).__name__}"
        raise UsageError(what, where=str(file), hint="fetch the model again")
    return value
