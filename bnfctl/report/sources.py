"""What a report is about: models and their runs, the methods that they are runs of, and the artifacts behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bnfctl.artifact import Artifact

BASE = "Base"
"""The label of a base model itself."""


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
