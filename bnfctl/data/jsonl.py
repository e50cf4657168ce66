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
        raise UsageError(f"expected a JSON object, found {type(value).__name__}", where=where)
    return value
