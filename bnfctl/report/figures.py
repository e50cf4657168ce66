"""The figures of a report: shifts (3a to 3f and 4 of the paper), training curves, and what the builds are like.

Nothing here is written to disk; matplotlib is loaded when the first panel is drawn.
"""

from __future__ import annotations

from bnfctl.report import figures_builds, figures_shifts, figures_training
from bnfctl.report.figures_svg import Figure
from bnfctl.report.sources import Sources

__all__ = ["Figure", "figures"]


def figures(sources: Sources) -> list[Figure]:
    """All that the artifacts have data for, in the page's order; equal artifacts give equal bytes.

    Raises BnfctlError where an artifact's files are not what its manifest says.
    """
    return [*figures_shifts.figures(sources), *figures_training.figures(sources), *figures_builds.figures(sources)]
