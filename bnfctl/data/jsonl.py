"""JSON Lines, with the line number in every complaint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bnfctl.errors import UsageError


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) for every line that is not blank; UsageError names the first broken one."""
    if not path.is_file():
        raise UsageError("no such file", where=str(path), hint="check the path")
    with open(path, encoding="utf-8-sig", errors="strict") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _object(line, f"{path}:{number}")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"not UTF-8: {error.reason}", where=f"{path}:{number + 1}", hint="convert the file to UTF-8"
            ) from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UsageError(f"broken JSON: {error}", where=where, hint="each line is one JSON object") from None
    if not isinstance(value, dict):
        raise UsageError(
            f"expected a JSON object, found {type(value).__name__}", where=where, hint='each line is {"prompt": ...}'
        )
    return dict(without_surrogates(value))


def without_surrogates(value: Any) -> Any:
    """Texts, also inside lists and objects, with lone surrogates replaced: JSON can spell half an emoji, UTF-8 cannot."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]
    return {name: without_surrogates(item) for name, item in value.items()} if isinstance(value, dict) else value
