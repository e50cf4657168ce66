"""One column of a table: a figure of several models, with intervals, and as a statistic that can be resampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bnfctl.report.evidence import Evidence, Result
from bnfctl.tasks.statistics import DRAWS, Array, Bootstrap, Estimate, Statistic


@dataclass(frozen=True, eq=False)
class Measure:
    """One figure of several runs, in the units that tables print (points, percent)."""

    task: str
    group: str
    """Heading over the column: the benchmark."""
    name: str
    estimates: Mapping[str, Estimate]
    """Run's ref -> figure; the statistic's columns are in this order."""
    statistic: Statistic | None
    """Counts of the clusters [b, C] -> figures [b, R]; None where the runs have no item in common."""
    clusters: int
    items: str
    """Measures of the same items share it: they are resampled together."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Run's ref -> the artifact and model that its figure is of."""
    why: Mapping[str, str] = field(default_factory=dict)
    """Run's ref -> why it has none."""
    decimals: int = 1
    grades: Array | None = None
    """[R, K] of tasks with one grade per item, in the same units; NaN where there is none."""
    interval: str = "bootstrap"
    """Of the estimates: wilson (for 0/1 grades), normal (for other grades) or bootstrap (by prompt)."""
    share: bool = False
    """In percent of something: no interval leaves [0, 100]."""
    counted: bool = True
    """In the average rank; a second form of a figure is not."""
    notes: tuple[str, ...] = ()
    draws: int = DRAWS
    """Resamples of what is made of it."""
    resampled: Bootstrap | None = None
    """Of judged figures, [draws, R] in the order of `estimates`: what their differences are made of."""

    @property
    def binary(self) -> bool:
        """Whether the grades are 0 or 1."""
        return self.interval == "wilson"

    @property
    def full_name(self) -> str:
        """The name where no heading stands over it."""
        return f"{self.group} {self.name}"


@dataclass(frozen=True, eq=False)
class Scene:
    """What one column's figures are made from: the results of a table's runs under one protocol."""

    evidence: Evidence
    task: str
    heading: str
    protocol: bytes
    results: dict[str, Result]
    """Run's ref -> result."""
    items: tuple[str, ...]
    """Those that all have."""

    @property
    def sources(self) -> dict[str, str]:
        return {ref: result.source for ref, result in self.results.items()}

    def pool(self) -> dict[str, Result]:
        """The results of every run of the report under the same protocol: whom pool-relative figures are relative to."""
        return self.evidence.protocols(self.task, self.evidence.runs)[self.protocol]
