"""Finished run with what model card, bill of materials and provenance state about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.pipeline.licences import carried, find_licences, remarks_on
from compress.recipe.loading import read_recipe
from compress.recipe.recipe import Recipe
from compress.report.rows import approximate_mark
from compress.report.run_folder import LOCK, MODEL, RECIPE, find_report, shipped_files
from compress.results.metrics import card_metrics
from compress.results.report import FINAL, LicenceRecord, Measurement, Report, load_report
from compress.utils.errors import InputError
from compress.utils.read_limits import parse_json
from compress.utils.storage import digest_file

SBOM = "bom.cdx.json"
"""File name of the software bill of materials."""


@dataclass(frozen=True)
class RunView:
    """Run whose report is written, with its licences, metrics and shipped files."""

    recipe: Recipe
    report: Report
    lock: Mapping[str, Any]
    folder: Path

    @cached_property
    def licences(self) -> tuple[LicenceRecord, ...]:
        """Return the licences that the run recorded, or those of its sources if the report has none."""
        return self.report.licences or find_licences(self.recipe, self.folder)

    @property
    def licence(self) -> str:
        """Return the licence of the shipped weights."""
        return carried(self.licences)

    @property
    def licence_remarks(self) -> list[str]:
        """Return the duties of the licences for anyone who passes the model on."""
        return remarks_on(self.licences, self.recipe)

    @property
    def notes(self) -> list[str]:
        """Return the notes of the report that are not about licences."""
        return [note for note in self.report.notes if note not in self.licence_remarks]

    @property
    def metrics(self) -> list[Measurement]:
        """Return the measurements of the final model that a model card shows."""
        return card_rows(self.report)

    @cached_property
    def files(self) -> dict[str, str]:
        """Return the SHA-256 of every shipped file by its path below the run's folder."""
        return {name: digest_file(self.folder / name) for name in shipped_files(self.folder)}

    @property
    def packages(self) -> dict[str, str]:
        """Return the versions of the packages that stages called and that the run used, by name."""
        # The lock is more precise than the report, which lists the environment.
        return {**self.report.environment.get("packages", {}), **self.lock.get("packages", {})}


def card_rows(report: Report) -> list[Measurement]:
    """Return the measurements of the final model that a model card shows, without times of a machine too noisy."""
    shown = card_metrics()
    rows = [row for row in report.measurements if row.model == FINAL and row.metric in shown]
    return [row for row in rows if not approximate_mark(report, row)]


def read_run(run: Path) -> RunView:
    """Read the run in a folder, or the latest run of a recipe. Raises `InputError` if a file is missing."""
    report = find_report(run)
    folder = report.parent.resolve()
    for name in (RECIPE, LOCK, MODEL):
        if not (folder / name).exists():
            raise InputError(
                f"The run has no {name}.", where=str(folder), expected="the whole folder that `compress run` wrote"
            )
    return RunView(read_recipe(folder / RECIPE), load_report(report), read_lock(folder / LOCK), folder)


def read_lock(path: Path) -> dict[str, Any]:
    """Return the contents of a `lock.json`. Raises `InputError`."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"The run's lock cannot be read: {error}", where=str(path)) from None
    # A lock of an unknown form counts as empty.
    return content if isinstance(content, dict) else {}


def plain_name(reference: str) -> str:
    """Return a reference without the folders of this machine."""
    return Path(reference).name if Path(reference).is_absolute() else reference
