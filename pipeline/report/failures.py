"""The inputs that a run could not take, as a section of its page."""

from __future__ import annotations

from pathlib import Path

from pipeline.report.page import Page
from pipeline.report.run_files import read_csv

__all__ = ["add_failures"]


def add_failures(page: Page, folder: Path) -> None:
    """Add the rows of `failures.csv`: path, stage, code, message; nothing where there are none."""
    failures = read_csv(folder / "failures.csv")
    if not failures:
        return
    page.section("Rejected inputs")
    inputs = "1 input was" if len(failures) == 1 else f"{len(failures)} inputs were"
    page.warning(f"{inputs} not processed; the others were. The list is failures.csv.")
    page.table(failures)
