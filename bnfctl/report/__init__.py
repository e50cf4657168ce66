"""report: one page, tables and figures of everything that a set of artifacts says."""

from __future__ import annotations

from bnfctl.report.writing import Written, write

__all__ = ["Written", "write"]
