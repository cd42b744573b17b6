"""A run's report as a run of MLflow."""

from __future__ import annotations

from pathlib import Path

from compress.report.run_folder import RECIPE
from compress.report.tracking import TrackedRun
from compress.results.report import FINAL, Report


def tracked(report: Report, folder: Path) -> TrackedRun:
    """The final model's figures on each target, `accuracy/cpu`, with their intervals; the model by its folder."""
    rows = [row for row in report.measurements if row.model == FINAL]
    limits = {f"limit {limit.metric} {limit.limit}": limit.verdict or str(limit.passed) for limit in report.limits}
    return TrackedRun(
        name=f"{report.recipe} {report.started or ''}".strip(),
        metrics={f"{row.metric}/{row.target}": row.value for row in rows},
        spread={
            f"{row.metric}/{row.target}": (row.low, row.high)
            for row in rows
            if row.low is not None and row.high is not None
        },
        parameters={"recipe": report.recipe, "baseline": report.baseline, **limits},
        tags={"compress.folder": str(folder.resolve()), "compress.model": str((folder / "model").resolve())},
        files=tuple(path for path in (folder / RECIPE, folder / "report.html") if path.is_file()),
    )
