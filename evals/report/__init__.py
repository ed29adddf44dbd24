"""The report of an evaluation: `report.md`, and `report.html` with charts that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerlens.evals.report import markdown, page
from steerlens.evals.report.view import Report, ReportError

from steerlens import files

__all__ = ["ReportError", "write"]


def write(folder: Path, summary: Mapping[str, Any]) -> list[Path]:
    """Write `report.md` and `report.html` into the folder, from what `summary.json` holds; both are written whole.

    Returns:
        The two files.

    Raises:
        ReportError: if the summary is of another schema or lacks what a report shows; nothing is written.
        FileNotFoundError, IsADirectoryError: if a file cannot be there; nothing is written.
    """
    report = Report(summary)
    contents = {folder / "report.md": markdown.render(report), folder / "report.html": page.render(report)}
    for file in contents:
        files.check(file)
    for file, content in contents.items():
        files.write(file, content)
    return list(contents)
