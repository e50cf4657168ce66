"""Texts that go to a model and come from one: prompts with places to fill, and what a response says after its thinking."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from bnfctl.data.jsonl import without_surrogates

OPEN, CLOSE = "<think>", "</think>"


def fill(layout: str, values: Mapping[str, str]) -> str:
    """`layout` with {name} replaced for each name of `values`, in one pass: braces in a text stay what they are.

    {mark} becomes a code that depends on the texts, so that no text can forge where it ends.
    """
    texts = {name: without_surrogates(text) for name, text in values.items()}
    joined = "\0".join(f"{name}\0{text}" for name, text in sorted(texts.items()))
    texts["mark"] = hashlib.sha256(joined.encode()).hexdigest()[:10]
    names = "|".join(re.escape(name) for name in texts)
    return re.sub(rf"\{{({names})\}}", lambda place: texts[place[1]], layout)


def visible(text: str) -> str | None:
    """A response without its thinking: whole blocks, then all up to an end that no begin belongs to; as it is without.

    Some chat templates open the block in the prompt, so that a response holds only its end.  Where there are several
    such ends the last one counts, as in the chat templates of the models themselves (Qwen3, DeepSeek-R1), which keep
    what follows the last: a thought that mentions the tag must not be read as an answer.  A block that is left open
    takes all that follows it; None where nothing comes before it, since the response never got out of its thinking.
    """
    kept, at = [], 0
    while (begin := text.find(OPEN, at)) >= 0 and (end := text.find(CLOSE, begin)) >= 0:
        kept.append(text[at:begin])
        at = end + len(CLOSE)
    rest = "".join([*kept, text[at:]]).rpartition(CLOSE)[2]
    before, opened, _ = rest.partition(OPEN)
    if opened and not before.strip():
        return None
    return text if before == text else before.lstrip()


def said(text: str) -> str:
    """As `visible`, with nothing where the response was cut off in the middle of its thinking."""
    return visible(text) or ""
