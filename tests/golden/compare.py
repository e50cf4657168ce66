"""Golden files: the rows that a version of a stage gives; rows may change only when the version does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
ROW = 600
"""Characters of a line; longer values are spread over several."""


def compare(path: Path, version: int | str, rows: Any, update: bool) -> None:
    """Fail where rows or version differ from the file; `update` rewrites it, but not for a version it knows."""
    found = {"version": version, "rows": json.loads(json.dumps(rows))}
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if known == found:
        return
    if known is not None and known["version"] == version:
        pytest.fail(
            f"{path.name}: the rows changed and the version did not: {_first_change(known['rows'], found['rows'])}"
        )
    if not update:
        stored = "none" if known is None else known["version"]
        pytest.fail(f"{path.name}: stored version {stored}, here {version}: pytest --update-golden writes the new rows")
    path.write_text(_text(found) + "\n", encoding="utf-8")


def _text(value: Any, indent: str = "") -> str:
    """JSON in which a row is one line, so that a diff shows which rows changed."""
    line = json.dumps(value, sort_keys=True, ensure_ascii=False)
    if len(line) <= ROW or not isinstance(value, (list, dict)):
        return line
    inner = f"{indent} "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _text(part, inner) for part in value) + f"\n{indent}]"
    fields = (f"{inner}{json.dumps(name)}: {_text(value[name], inner)}" for name in sorted(value))
    return "{\n" + ",\n".join(fields) + f"\n{indent}}}"


def _first_change(old: Any, new: Any) -> str:
    if type(old) is not type(new) or not isinstance(old, (list, dict)):
        return f"{old!r} -> {new!r}"
    if len(old) != len(new):
        return f"{len(old)} -> {len(new)} rows or fields"
    pairs = zip(old, new, strict=True) if isinstance(old, list) else ((old.get(name), new[name]) for name in new)
    return next(_first_change(before, after) for before, after in pairs if before != after)
