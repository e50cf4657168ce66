"""Collects what a report is about: the artifacts given and those that they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bnfctl.artifact import Artifact, Store
from bnfctl.errors import UsageError
from bnfctl.report.methods import methods_of
from bnfctl.report.sources import Sources

_EVAL_VERSION = 2
"""The first version of `eval` whose rows say which model they are of."""


def collect(artifacts: Sequence[Artifact], store: Store) -> Sources:
    """The artifacts and all that they were made from, as methods and runs.

    UsageError for no artifacts, for nothing but references, and for evals of a version whose rows do not say which model
    they are of.
    """
    if not artifacts:
        raise UsageError("nothing to report on", where="ARTIFACT", hint="bnfctl ls lists what there is")
    missing: list[str] = []
    found: dict[str, Artifact] = {}
    for artifact in artifacts:
        for one in _upstream(artifact, store, missing, set(found)):
            found.setdefault(one.ref, one)
    stages: dict[str, list[Artifact]] = {}
    for one in found.values():
        stages.setdefault(one.manifest.stage, []).append(one)
    if set(stages) == {"reference"}:
        what = f"{artifacts[0].ref} holds log-probabilities of a reference, which no report shows"
        raise UsageError(what, where="ARTIFACT", hint="the training that used it, or evals: bnfctl ls lists them")
    evals, trains, builds = (tuple(stages.get(stage, ())) for stage in ("eval", "train", "build"))
    for one in evals:
        _check_version(one)
    names = {ref: name for name, ref in sorted(store.names().items(), reverse=True)}
    return Sources(
        tuple(methods_of(trains, evals, {one.ref: one for one in builds}, names)),
        evals, trains, builds, tuple(stages.get("score", ())), tuple(stages.get("generate", ())), names,
        tuple(dict.fromkeys(missing)),
    )  # fmt: skip


def _upstream(artifact: Artifact, store: Store, missing: list[str], known: set[str]) -> Iterator[Artifact]:
    """What an artifact was made from, inputs first, and the artifact itself; each once."""
    if artifact.ref in known:
        return
    known.add(artifact.ref)
    for name, raw in artifact.manifest.inputs.items():
        if raw["kind"] != "artifact":
            continue
        try:
            path = artifact.input_path(name)
            parent = Artifact(path) if path.exists() else store.search(raw["ref"])
        except UsageError as error:
            missing.append(f"{raw['ref']}, of which {artifact.ref} was made, cannot be read: {error.what}")
            continue
        if parent is None:
            missing.append(f"{raw['ref']}, of which {artifact.ref} was made, is gone")
        elif parent.manifest.digest != raw["digest"]:
            missing.append(f"{raw['ref']} was made again, with another content, since {artifact.ref} was made of it")
        else:
            yield from _upstream(parent, store, missing, known)
    yield artifact


def _check_version(artifact: Artifact) -> None:
    if artifact.manifest.stage_version < _EVAL_VERSION or "models" not in artifact.manifest.summary:
        config = artifact.manifest.config
        hint = f"bnfctl eval {config.get('model')} --tasks {','.join(config.get('tasks', ()))}"
        raise UsageError(f"{artifact.ref} was made by an older version: run it again", where=artifact.ref, hint=hint)
