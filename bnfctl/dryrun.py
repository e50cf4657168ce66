"""--dry-run: the resolved config, where each value comes from, the key, and why the artifact is not there yet."""

from __future__ import annotations

import json
from typing import Any

from bnfctl import stages
from bnfctl.artifact import Pinned, Plan, Store
from bnfctl.options import as_json, key_fields


def describe(plan: Plan, origin: dict[str, str], store: Store, force: bool) -> dict[str, Any]:
    """The resolved config, the key, and whether the artifact is there; if not, how the nearest one differs."""
    unresolved = {name: pinned.why for name, pinned in plan.inputs.items() if pinned.digest is None}
    found = None if unresolved or force else store.get(plan.stage, plan.key)
    verdict = f"cached {found.ref}" if found else "to be made"
    document = {
        "stage": plan.stage,
        "config": as_json(plan.config),
        "from": {name: source for name, source in origin.items() if source != "default"},
        "inputs": {name: _input_line(pinned) for name, pinned in plan.inputs.items()},
        "notes": list(plan.notes),
        "unresolved": unresolved,
        "key": None if unresolved else plan.key,
        "verdict": verdict,
        "why": [] if found else _differences(plan, store),
    }
    module = stages.module(plan.stage)
    ahead = {"memory": "estimate", "judge": "judging"}
    return document | {
        name: getattr(module, told)(plan, store) for name, told in ahead.items() if hasattr(module, told)
    }


def _input_line(pinned: Pinned) -> str:
    return f"{pinned.ref}  {(pinned.digest or 'not resolved')[:12]}"


def _differences(plan: Plan, store: Store) -> list[str]:
    """`loss: dpo -> bnf`: how the most similar artifact of the stage differs from this plan."""
    wanted = {
        **key_fields(plan.config),
        **plan.versions,
        **{name: pinned.digest for name, pinned in plan.inputs.items()},
    }
    nearest: list[str] | None = None
    for artifact in store.artifacts(plan.stage):
        manifest = artifact.manifest
        had = {**manifest.config, **manifest.versions, **{name: raw["digest"] for name, raw in manifest.inputs.items()}}
        normal = json.loads(json.dumps(wanted))
        changed = [f"{name}: {had.get(name)} -> {value}" for name, value in normal.items() if had.get(name) != value]
        if manifest.stage_version != plan.version:
            changed.append(f"stage version: {manifest.stage_version} -> {plan.version}")
        if changed and (nearest is None or len(changed) < len(nearest)):
            nearest = changed
    return nearest if nearest is not None else [f"no {plan.stage} artifact yet"]


def as_text(document: dict[str, Any]) -> str:
    lines = [f"{document['stage']}: {document['verdict']}"]
    lines += [f"  {name}: {value}" + _source(document, name) for name, value in document["config"].items()]
    lines += [f"  input {name}: {line}" for name, line in document["inputs"].items()]
    lines += [f"  note: {note}" for note in document["notes"]]
    lines += [f"  not resolved: {name}: {why}" for name, why in document["unresolved"].items()]
    lines += [f"  why: {why}" for why in document["why"]]
    lines += [f"  {name}: {line}" for name in ("memory", "judge") for line in document.get(name, ())]
    lines.append(f"  key: {document['key'] or 'known when every input is resolved'}")
    return "\n".join(lines)


def _source(document: dict[str, Any], name: str) -> str:
    source = document["from"].get(name)
    return f"  ({source})" if source else ""
