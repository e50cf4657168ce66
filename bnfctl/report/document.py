"""The report before it is written: tables, warnings and the lineage of every number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bnfctl.evaluation.figures import MOST
from bnfctl.report.differences import against_base, between
from bnfctl.report.evidence import Evidence
from bnfctl.report.judges import agreement, judges
from bnfctl.report.lengths import lengths
from bnfctl.report.lineage import lineage
from bnfctl.report.made import builds, training
from bnfctl.report.measures import measures_of
from bnfctl.report.shifted import shifts
from bnfctl.report.sources import Method, Sources
from bnfctl.report.standing import by_ratio, relabelled, standing
from bnfctl.report.table import Table, printable
from bnfctl.tasks.statistics import DRAWS

_RATIOS = (
    "The share of the pairs that keep both of their responses; of the others one, drawn at random, is left out. Everything "
    "else is the same."
)


@dataclass(frozen=True, eq=False)
class Document:
    """What `page.html` and `report.md` show."""

    title: str
    sources: Sources
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()
    """About the report as a whole: what was left out, and why."""
    lineage: tuple[dict[str, Any], ...] = field(default=())
    """One per artifact, inputs before what was made from them: ref, name, stage, key, digest, config (what differs from
    the defaults), inputs ({name: {kind, ref, digest}}), provenance, command (a line for a shell, or None)."""


def document_of(sources: Sources, title: str | None = None, draws: int = DRAWS) -> Document:
    """Every table that the sources have something for.  draws: resamples of the intervals."""
    evidence = Evidence(sources, draws)
    per_base = [table for base in sources.bases for table in _of_base(base, sources, evidence)]
    made = (training(sources), builds(sources), shifts(sources), judges(evidence), agreement(evidence))
    tables = (*per_base, *(table for table in made if table is not None))
    bases = ", ".join(filter(None, sources.bases))
    notes = [*sources.missing]
    many = [base for base in sources.bases if sum(not method.is_base for method in sources.of_base(base)) > MOST]
    if many:
        notes.append(
            f"More than {MOST} methods are not compared two by two: too many tests to read and to correct for."
        )
    if not sources.evals:
        notes.append("No evaluation is here, so nothing is ranked: give eval artifacts to compare models.")
    return Document(
        printable(title or (f"Report on {bases}" if bases else "Report")),
        sources,
        tables,
        tuple(notes),
        lineage(sources),
    )


def _of_base(base: str, sources: Sources, evidence: Evidence) -> Iterator[Table]:
    methods = sources.of_base(base)
    end, of = _named(base, sources)
    measures, warnings = measures_of(evidence, [run for method in methods for run in method.runs])
    evaluated = [method for method in methods if any(run.evals for run in method.runs)]
    if not evaluated:
        return
    if measures:
        yield standing(f"main{end}", f"Main results{of}", evaluated, measures, warnings)
    made = (
        against_base(f"against-base{end}", f"Differences from the base{of}", evaluated, measures),
        between(f"between{end}", f"Differences between methods{of}", evaluated, measures),
        lengths(f"lengths{end}", f"Average length of the responses{of}", evaluated, evidence),
    )
    yield from (table for table in made if table is not None)
    for number, family in enumerate(by_ratio(evaluated), 1):
        yield from _ratios(f"pairing{end}{f'-{number}' if number > 1 else ''}", of, evaluated, family, evidence)


def _ratios(name: str, of: str, methods: list[Method], family: list[Method], evidence: Evidence) -> Iterator[Table]:
    """Table 6 of the paper: the base, then the same method on data of more and more pairs."""
    rows = [*(method for method in methods if method.is_base), *family]
    measures, warnings = measures_of(evidence, [run for method in rows for run in method.runs])
    if measures:
        labels = [row.label if row.is_base else f"{row.runs[0].pairing_ratio:.0%}" for row in rows]
        loss = family[0].label.partition(" (")[0]
        shown = [relabelled(row, label) for row, label in zip(rows, labels, strict=True)]
        title = f"Pairing ratios, {loss}{of}"
        yield standing(name, title, shown, measures, warnings, "Pairing ratio", about=_RATIOS)


def _named(base: str, sources: Sources) -> tuple[str, str]:
    """(end of the tables' ids, of their titles): none where there is one base only."""
    if len(sources.bases) == 1:
        return "", ""
    slugs = [re.sub(r"[^a-z0-9]+", "-", one.lower())[:60].strip("-") or "others" for one in sources.bases]
    number = sources.bases.index(base)
    slug = slugs[number] if len(set(slugs)) == len(slugs) else f"{slugs[number]}-{number + 1}"
    return f"-{slug}", f": {base or 'other models'}"
