"""What a report is about: the artifacts given, those they were made from, and which of them are one method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bnfctl.artifact import Artifact, Store
from bnfctl.errors import UsageError

BASE = "Base"
"""The label of a base model itself."""
_EVAL_VERSION = 2
"""The first version of `eval` whose rows say which model they are of."""


@dataclass(frozen=True, eq=False)
class Run:
    """One model and what is known about it: a training of one seed, a base model, or a model of imported files."""

    ref: str
    """The train artifact's ref; for a model without one, its name.  No two runs of a report share it."""
    model: str
    """Its name in the rows and summaries of `evals`; see `name_in`."""
    label: str
    """ "BNF", "DPO beta=0.01", "Base", ...: that of its method."""
    seed: int | None
    """Of the training; None for a model without one."""
    base: str
    """The base model's name; "" where none is known."""
    train: Artifact | None
    evals: tuple[Artifact, ...]
    build: Artifact | None
    pairing_ratio: float | None
    """Of the build; None without one."""

    @property
    def title(self) -> str:
        """The label, and the seed where there is one."""
        return self.label if self.seed is None else f"{self.label}, seed {self.seed}"

    def name_in(self, artifact: Artifact) -> str:
        """Its name in the rows of an eval: one model may be called by two paths."""
        models: list[str] = artifact.manifest.summary["models"]
        return models[0] if len(models) == 1 else self.model


@dataclass(frozen=True, eq=False)
class Method:
    """Runs of the same base, loss, hyper-parameters and data; they differ by seed."""

    label: str
    base: str
    runs: tuple[Run, ...]

    @property
    def is_base(self) -> bool:
        """Whether this is the base model itself."""
        return self.label == BASE


@dataclass(frozen=True, eq=False)
class Sources:
    """Everything that the report reads."""

    methods: tuple[Method, ...]
    """Base by base, a base before what was trained from it; then models whose base nobody tells (`base` is "")."""
    evals: tuple[Artifact, ...]
    trains: tuple[Artifact, ...]
    builds: tuple[Artifact, ...]
    scores: tuple[Artifact, ...]
    generates: tuple[Artifact, ...]
    names: Mapping[str, str] = field(default_factory=dict)
    """Ref -> the name that the store has for it."""
    missing: tuple[str, ...] = ()
    """Lines about inputs that are gone, or were made again since."""

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """All, in the order of the stages."""
        return (*self.generates, *self.scores, *self.builds, *self.trains, *self.evals)

    @property
    def bases(self) -> tuple[str, ...]:
        """The names of the base models, in the order of `methods`."""
        return tuple(dict.fromkeys(method.base for method in self.methods))

    def of_base(self, base: str) -> tuple[Method, ...]:
        """The methods of one base."""
        return tuple(method for method in self.methods if method.base == base)


def collect(artifacts: Sequence[Artifact], store: Store) -> Sources:
    """The artifacts and all that they were made from, as methods and runs.

    UsageError for no artifacts, for nothing but references, and for evals of a version whose rows do not say which model
    they are of.
    """
    from bnfctl.report.methods import methods_of

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
