"""What training moved (paper, section 5.3), as numbers: the means of the shift analysis with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bnfctl.artifact import Artifact
from bnfctl.report.evidence import SHIFTS
from bnfctl.report.sources import Run, Sources
from bnfctl.report.table import DASH, Cell, Table, number
from bnfctl.tasks.seeds import mean_over_seeds
from bnfctl.tasks.statistics import Estimate

_COLUMNS = (
    ("ll_sum", "Log-likelihood, sum", 2), ("ll_mean", "Log-likelihood, per token", 4), ("z2_sum", "|Logit| (Z2), sum", 2),
    ("z2_mean", "|Logit| (Z2), per token", 4), ("z1_mean", "Logit (Z1) per token", 4), ("z3_mean", "Z3 per token", 4),
    ("z4_mean", "Z4 per token", 4), ("gini", "Gini", 3), ("gini_corrected", "Gini, corrected", 3),
)  # fmt: skip
CAPTION = (
    "Policy against reference on greedy responses: mean over the responses and its 95 % interval, prompts as clusters. "
    "Log-likelihood: log-probability of the response's tokens under the policy minus that under the reference, in nats. Z1 to "
    "Z4: four readings of the logit shift: signed and absolute of the response's tokens, mean absolute over the vocabulary, and "
    "the same after taking out the mean. Gini: how unevenly a response's absolute logit shifts are spread over its tokens; "
    "corrected for its length. Correlation: Pearson's, of Z2 with the log-likelihood shift, both per token."
)


def shifts(sources: Sources) -> Table | None:
    """A row for each method that was measured; None where none was."""
    rows: list[tuple[Cell, ...]] = []
    warnings: list[str] = []
    several = len(sources.bases) > 1
    for base in sources.bases:
        setups: dict[str, list[str]] = {}
        for method in sources.of_base(base):
            found = [(run, measured[0]) for run in method.runs if (measured := _measured(run))]
            for run, artifact in found:
                setups.setdefault(_setup(artifact), []).append(f"{run.title} ({artifact.ref})")
            if found:
                first = (Cell(base),) if several else ()
                rows.append((*first, Cell(method.label), *_cells(found)))
        if len(setups) > 1:
            each = "; ".join(f"{setup}: {', '.join(who)}" for setup, who in setups.items())
            warnings.append(f"measured in different ways, so these shifts do not compare: {each}")
    if not rows:
        return None
    columns = (*(("Base",) if several else ()), "Method", "Responses", "Tokens", "Cut (%)",
               *(name for _, name, _ in _COLUMNS), "Gini, pooled", "Correlation")  # fmt: skip
    return Table("shifts", "Shifts", CAPTION, columns, tuple(rows), tuple(warnings))


def _measured(run: Run) -> list[Artifact]:
    """The evals that measured the run's shifts."""
    tables = ((artifact, artifact.manifest.summary["tasks"].get(SHIFTS)) for artifact in run.evals)
    return [artifact for artifact, table in tables if table and run.name_in(artifact) in table["models"]]


def _setup(artifact: Artifact) -> str:
    """What two measurements must share to compare: the reference, who wrote the responses, and the prompts."""
    table = artifact.manifest.summary["tasks"][SHIFTS]
    prompts = artifact.manifest.inputs.get("shift_prompts")
    parts = [f"reference {table.get('reference')}", f"responses of the {table.get('responses')}"]
    return ", ".join(parts + ([f"prompts {prompts['ref']}"] if prompts else []))


def _cells(found: Sequence[tuple[Run, Artifact]]) -> list[Cell]:
    title = "; ".join(artifact.ref for _, artifact in found)
    figures = [artifact.manifest.summary["tasks"][SHIFTS]["models"][run.name_in(artifact)] for run, artifact in found]
    first = figures[0]
    tokens = sum(one["tokens"] for one in figures) / len(figures)
    cut = [one["cut"] for one in figures if one.get("cut") is not None]
    pearson = [one["correlation"]["mean"]["pearson"] for one in figures]
    known = [value for value in pearson if value is not None]
    return [
        number(first["n"], 0, title), number(tokens, 1, title),
        number(100 * sum(cut) / len(cut), 1, f"ended by max_tokens; {title}") if cut else Cell(DASH, title="nobody knows"),
        *(_cell([one[name] for one in figures], decimals, title) for name, _, decimals in _COLUMNS),
        number(sum(one["gini_pooled"] for one in figures) / len(figures), 3, title),
        number(sum(known) / len(known) if known else None, 3, title),
    ]  # fmt: skip


def _cell(each: Sequence[Mapping[str, float]], decimals: int, title: str) -> Cell:
    if len(each) == 1:
        one = each[0]
        return Cell(f"{one['mean']:.{decimals}f}", one["mean"], one["low"], one["high"], title=title)
    found, spread = mean_over_seeds([Estimate(0, one["mean"], one["low"], one["high"]) for one in each])
    return Cell(f"{found.mean:.{decimals}f}", found.mean, found.low, found.high, title=title, sd=spread.sd)
