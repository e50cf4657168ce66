"""JSON Lines, with the line number in every complaint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bnfctl.errors import UsageError

_BOM = b"\xef\xbb\xbf"
_OF_AN_ARRAY = ": jq -c '.[]' turns a JSON array into such lines"


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) for every line that is not blank; UsageError names the first broken one."""
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            yield f"{path}:{number}", _object(line, f"{path}:{number}")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their newline; UsageError names the first line that is not UTF-8."""
    if not path.is_file():
        raise UsageError("no such file", where=str(path), hint="check the path")
    with open(path, "rb") as file:  # decoded line by line: a decoder that reads ahead names an earlier line
        for number, raw in enumerate(file, 1):
            try:
                yield (raw.removeprefix(_BOM) if number == 1 else raw).decode("utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"not UTF-8: {error.reason}", where=f"{path}:{number}", hint="convert the file to UTF-8"
                ) from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = without_surrogates(json.loads(line, object_pairs_hook=_unique))
    except ValueError as error:
        hint = "each line is one JSON object" + (_OF_AN_ARRAY if line.strip() in ("[", "{") else "")
        raise UsageError(f"broken JSON: {error}", where=where, hint=hint) from None
    except RecursionError:
        raise UsageError("JSON nested too deeply", where=where, hint="each line is one flat JSON object") from None
    if not isinstance(value, dict):
        hint = 'each line is {"prompt": ...}' + (_OF_AN_ARRAY if isinstance(value, list) else "")
        raise UsageError(f"expected a JSON object, found {type(value).__name__}", where=where, hint=hint)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different; json by itself keeps the last of equal ones and says nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' is there twice")
    return found


def without_surrogates(value: Any) -> Any:
    """Texts, also inside lists and objects, with lone surrogates replaced: JSON can spell half an emoji, UTF-8 cannot."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {without_surrogates(name): without_surrogates(item) for name, item in value.items()}
    return value
