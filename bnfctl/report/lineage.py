"""Where every number comes from: each artifact with its key, digest and settings, and the command that makes it again."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bnfctl.artifact import Artifact
from bnfctl.config import CONFIGS
from bnfctl.options import base_type, fields, flag_name
from bnfctl.recipes import train_recipe
from bnfctl.report.sources import Sources
from bnfctl.report.table import DASH, Cell, Table

_PINNED = ("artifact", "hub-model", "hub-data")
"""Kinds of inputs whose `ref` says more than what was typed: an artifact's ref, a commit."""


def lineage(sources: Sources) -> tuple[dict[str, Any], ...]:
    """One entry per artifact, inputs before what was made from them; see `Document.lineage`."""
    return tuple(_entry(artifact, sources.names) for artifact in sources.artifacts)


def _entry(artifact: Artifact, names: Mapping[str, str]) -> dict[str, Any]:
    manifest = artifact.manifest
    inputs = {name: {part: raw[part] for part in ("kind", "ref", "digest")} for name, raw in manifest.inputs.items()}
    return {
        "ref": artifact.ref, "name": names.get(artifact.ref), "stage": manifest.stage, "key": manifest.key,
        "digest": manifest.digest, "config": changed(artifact), "inputs": inputs,
        "provenance": dict(manifest.provenance), "command": command(artifact),
    }  # fmt: skip


def changed(artifact: Artifact) -> dict[str, Any]:
    """The fields of its config that are not at their default, or at the recipe's; inputs by what they were pinned to."""
    config = artifact.manifest.config
    usual = _usual(artifact)
    found = {}
    for field in fields(CONFIGS[artifact.manifest.stage]):
        value = _pinned(artifact, field)
        if (field.name in config or field.name in artifact.manifest.inputs) and value != usual.get(field.name):
            found[field.name] = value
    return found


def _usual(artifact: Artifact) -> dict[str, Any]:
    """What each field is where nobody says otherwise; fields without a default are missing."""
    stage = artifact.manifest.stage
    usual = {
        field.name: list(field.default) if isinstance(field.default, tuple) else field.default
        for field in fields(CONFIGS[stage])
        if field.default is not dataclasses.MISSING
    }
    return {**usual, **(train_recipe(artifact.manifest.config)[1] if stage == "train" else {})}


def _pinned(artifact: Artifact, field: dataclasses.Field[Any]) -> Any:
    """The value of a field; an input as its ref where that says more."""
    value = artifact.manifest.config.get(field.name)
    if not field.metadata["input"]:
        return value
    inputs = artifact.manifest.inputs
    raw = inputs.get(field.name)
    if raw is not None and raw["kind"] in _PINNED:
        return raw["ref"]
    if isinstance(value, list):
        paths = {one["path"]: one["ref"] for one in inputs.values() if one["kind"] == "artifact"}
        return [paths.get(one, one) for one in value]
    return value


def command(artifact: Artifact) -> str | None:
    """The command line that makes it again; None where a value can't be written as a flag."""
    stage = artifact.manifest.stage
    cls = CONFIGS[stage]
    words, flags, values = ["bnfctl", stage], [], changed(artifact)
    for field in fields(cls):
        if field.name not in values:
            continue
        value, (kind, _, many) = values[field.name], base_type(cls, field.name)
        if field.metadata["positional"] and value is not None:
            words.append(str(value))
        elif many and any("," in str(one) for one in value):
            return None  # a comma is what parts the values of a list
        elif kind is bool:
            flags.append(flag_name(field.name) if value else f"--no-{flag_name(field.name)[2:]}")
        else:
            flags += [flag_name(field.name), _written(value)]
    return shlex.join([*words, *flags])


def _written(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return "none" if value is None else str(value)


def lineage_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """The lineage as a table, for Markdown and CSV."""
    rows = tuple(tuple(_cells(entry)) for entry in entries)
    caption = (
        "Key: what was asked (configuration and digests of the inputs). Digest: what was made. Settings: those that are not at "
        "their default."
    )
    columns = ("Artifact", "Name", "Key", "Digest", "Made from", "Settings", "Command")
    return Table("lineage", "Lineage", caption, columns, rows)


def _cells(entry: Mapping[str, Any]) -> Iterator[Cell]:
    made_from = (f"{name} {raw['ref']} ({str(raw['digest'])[:12]})" for name, raw in entry["inputs"].items())
    settings = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in entry["config"].items())
    for text in (
        entry["ref"], entry["name"] or DASH, entry["key"], entry["digest"], ", ".join(made_from), ", ".join(settings),
        entry["command"] or DASH,
    ):  # fmt: skip
        yield Cell(text)
