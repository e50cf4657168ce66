"""report: one page, tables and figures of everything that a set of artifacts says."""

from __future__ import annotations

from bnfctl.report.writing import Written, check_folder, write

__all__ = ["Written", "check_folder", "write"]
