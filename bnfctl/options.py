"""One frozen dataclass per stage: its fields become flags, YAML keys and the cache key.

YAML is read as text and decoded by the declared type, so `5e-7` is a number and `no` stays a word where a
word is asked for (YAML 1.1 would give the string "5e-7" and False).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from bnfctl.errors import UsageError, nearest

C = TypeVar("C")
_NULLS = {"", "null", "none", "~"}
_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}


def opt(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    key: bool = True,
    choices: Callable[[], list[str]] | tuple[str, ...] | None = None,
    input: str | None = None,
    positional: bool = False,
    since_default: bool = False,
    prefixes: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A config field.

    key: False only for what cannot change the content (the help says why); everything else is in the key.
    choices: the allowed words, or a function that lists them (a table of names).
    prefixes: beginnings of further values that `choices` can't list.
    input: "model", "data", "file" or the stage whose artifact it names; its digest enters the key, not its spelling.
    since_default: a field added later; at its default it stays out of the key, so old artifacts keep theirs.
    low, high: the inclusive range of a number.
    """
    metadata = {
        "help": help, "key": key, "choices": choices, "input": input, "positional": positional,
        "since_default": since_default, "prefixes": prefixes, "low": low, "high": high,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def fields(config: Any) -> tuple[dataclasses.Field[Any], ...]:
    """The dataclass fields of a config class or instance."""
    return dataclasses.fields(config)


def allowed(field: dataclasses.Field[Any]) -> list[str] | None:
    """The words a field accepts, or None where it is free."""
    choices = field.metadata["choices"]
    return list(choices() if callable(choices) else choices) if choices is not None else None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The evaluated annotations of a class; once, since they cost a tenth of a second for all stages."""
    return typing.get_type_hints(cls)


def base_type(cls: type, name: str) -> tuple[type, bool, bool]:
    """(scalar type, is it optional, is it a list) of a field, from its annotation."""
    hint = _hints(cls)[name]
    optional = False
    if isinstance(hint, types.UnionType):
        optional = True
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], optional, True
    return hint, optional, False


def decode(cls: type, name: str, raw: Any, where: str) -> Any:
    """One value, from text (flag, YAML) or JSON, as the field's declared type; UsageError says where."""
    kind, optional, many = base_type(cls, name)
    if raw is None or (optional and isinstance(raw, str) and raw.strip().lower() in _NULLS):
        if optional:
            return None
        raise UsageError(f"{name} needs a value", where=where, hint=f"leave {name} out for its default")
    field = next(f for f in fields(cls) if f.name == name)
    if many:
        if isinstance(raw, str):
            raw = [part.strip() for part in raw.split(",") if part.strip()]
        return tuple(_check(field, _scalar(kind, name, part, where), where) for part in raw)
    return _check(field, _scalar(kind, name, raw, where), where)


def _scalar(kind: type, name: str, raw: Any, where: str) -> Any:
    if kind is bool:
        word = str(raw).strip().lower()
        if word in _TRUE | _FALSE:
            return word in _TRUE
        raise UsageError(f"{name} is true or false, not {raw!r}", where=where, hint="true or false")
    if isinstance(raw, (dict, list, tuple)):
        raise UsageError(f"{name} takes one value, not {type(raw).__name__}", where=where, hint=f"{name}: VALUE")
    if kind is str:
        return str(raw)
    try:
        value = float(raw)
        if kind is float and math.isfinite(value):
            return value
        if kind is int and value == int(value):
            return int(value) if abs(value) < 2**53 else int(raw)
    except (ValueError, OverflowError):
        pass
    wanted, example = ("a whole number", "5") if kind is int else ("a number", "0.5 or 5e-7")
    raise UsageError(f"{name} is {wanted}, not {raw!r}", where=where, hint=f"e.g. {example}")


def _check(field: dataclasses.Field[Any], value: Any, where: str) -> Any:
    words = allowed(field)
    if words is not None and value not in words and not str(value).startswith(field.metadata["prefixes"]):
        raise UsageError(
            f"unknown {field.name.replace('_', ' ')} '{value}'{nearest(value, words)}",
            where=where,
            hint=f"one of: {', '.join([*words, *(f'{prefix}...' for prefix in field.metadata['prefixes'])])}",
        )
    low, high = field.metadata["low"], field.metadata["high"]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        below, above = low is not None and value < low, high is not None and value > high
        if below or above or value != value:
            span = f"from {low} to {high}" if high is not None else f"at least {low}"
            raise UsageError(f"{field.name} is {value}; it must be {span}", where=where, hint=field.metadata["help"])
    return value


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def refuse(config: Any, names: Iterable[str], why: str, hint: str | None = None) -> None:
    """UsageError for the first of these fields that is not at its default: it would change the key, and nothing else."""
    defaults = {field.name: field.default for field in fields(config)}
    for name in names:
        if getattr(config, name) != defaults[name]:
            flag = flag_name(name)
            raise UsageError(f"{flag} {why}", where=flag, hint=hint or f"leave {flag} out")


def check_keys(cls: type, raw: Mapping[str, Any], where: str) -> None:
    """Refuse a key that the config does not have, naming the nearest one."""
    known = [field.name for field in fields(cls)]
    for name in raw:
        if name not in known:
            raise UsageError(
                f"unknown key '{name}'{nearest(str(name), known)}", where=where, hint=f"known keys: {', '.join(known)}"
            )


def read_yaml(path: Path) -> Any:
    """A YAML file with every scalar as text; UsageError names the file and line of a syntax error."""
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except FileNotFoundError:
        raise UsageError("no such file", where=str(path), hint="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"not valid YAML: {reason}", where=f"{path}{line}", hint="mend that line") from None


def resolve(
    cls: type[C],
    flags: Mapping[str, Any],
    file: Path | None = None,
    recipe: Callable[[Mapping[str, Any]], tuple[str, Mapping[str, Any]]] | None = None,
) -> tuple[C, dict[str, str]]:
    """A config from flags > file > recipe > defaults, and for each field where its value came from.

    recipe: given the values so far, (its name, the values it proposes).
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if file is not None:
        raw = read_yaml(file) or {}
        if not isinstance(raw, Mapping):
            raise UsageError(
                "expected `name: value` lines", where=str(file), hint="one line for each field, e.g. seed: 1"
            )
        check_keys(cls, raw, str(file))
        for name, value in raw.items():
            values[name], origin[name] = decode(cls, name, value, f"{file}: {name}"), str(file)
    check_keys(cls, flags, "flags")
    for name, value in flags.items():
        if value is not None:
            values[name], origin[name] = decode(cls, name, value, flag_name(name)), flag_name(name)
    if recipe is not None:
        title, proposed = recipe(values)
        for name, value in proposed.items():
            if name not in values:
                values[name], origin[name] = decode(cls, name, value, title), title
    for field in fields(cls):
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                flag = field.name.upper() if field.metadata["positional"] else flag_name(field.name)
                words = allowed(field)
                hint = field.metadata["help"] + (f" One of: {', '.join(words)}." if words else "")
                raise UsageError(f"{field.name} is missing", where=flag, hint=hint)
            values[field.name], origin[field.name] = field.default, "default"
    return cls(**values), origin


def as_json(config: Any) -> dict[str, Any]:
    """Every field, JSON-ready: what a child process and config.json get."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(cls: type[C], raw: Mapping[str, Any]) -> C:
    """The config again, from what `as_json` gave."""
    return cls(**{name: decode(cls, name, value, flag_name(name)) for name, value in raw.items()})


def key_fields(config: Any) -> dict[str, Any]:
    """The fields that the cache key covers: not the inputs (their digests are), not `key=False`."""
    kept = {}
    for field in fields(config):
        value = getattr(config, field.name)
        meta = field.metadata
        if meta["input"] or not meta["key"] or (meta["since_default"] and value == field.default):
            continue
        kept[field.name] = value
    return kept


def canonical(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, UTF-8, no NaN; equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()
