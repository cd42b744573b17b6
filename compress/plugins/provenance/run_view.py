"""A finished run as its papers tell of it: recipe, report, lock, and the files that ship with their digests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.pipeline.licences import carried, find_licences, objections
from compress.recipe.loading import read_recipe
from compress.recipe.recipe import Recipe
from compress.report.run_folder import LOCK, MODEL, RECIPE, find_report, shipped_files
from compress.results.measurement import Measurement
from compress.results.metrics import card_metrics
from compress.results.report import FINAL, LicenceRecord, Report, load_report
from compress.utils.digests import digest_file
from compress.utils.errors import InputError

SBOM = "bom.cdx.json"


@dataclass(frozen=True)
class RunView:
    """A run whose report is written."""

    recipe: Recipe
    report: Report
    lock: Mapping[str, Any]
    folder: Path

    @cached_property
    def licences(self) -> tuple[LicenceRecord, ...]:
        """As the run recorded them; of one of an older version, as its sources say them now."""
        return self.report.licences or find_licences(self.recipe, self.folder)

    @property
    def licence(self) -> str:
        """Of the weights that ship."""
        return carried(self.licences)

    @property
    def licence_remarks(self) -> list[str]:
        """What whoever passes the model on has to know of licences."""
        return [one.words for one in objections(self.licences, self.recipe)]

    @property
    def notes(self) -> list[str]:
        """What the report notes besides."""
        return [note for note in self.report.notes if note not in self.licence_remarks]

    @property
    def metrics(self) -> list[Measurement]:
        """What the final model was measured to be, on each target."""
        shown = card_metrics()
        return [row for row in self.report.measurements if row.model == FINAL and row.metric in shown]

    @cached_property
    def files(self) -> dict[str, str]:
        """Path below the run's folder -> SHA-256, of every file that ships."""
        return {name: digest_file(self.folder / name) for name in shipped_files(self.folder)}

    @property
    def packages(self) -> dict[str, str]:
        """Name -> version of what stages called and the run was made with."""
        return {**self.report.environment.get("packages", {}), **self.lock.get("packages", {})}


def read_run(run: Path) -> RunView:
    """The run in a folder, or a recipe's latest one. Raises `InputError` where it is not all there."""
    report = find_report(run)
    folder = report.parent.resolve()
    for name in (RECIPE, LOCK, MODEL):
        if not (folder / name).exists():
            raise InputError(
                f"The run has no {name}.", where=str(folder), expected="the whole folder that `compress run` wrote"
            )
    return RunView(read_recipe(folder / RECIPE), load_report(report), read_lock(folder / LOCK), folder)


def read_lock(path: Path) -> dict[str, Any]:
    """What `lock.json` holds. Raises `InputError`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"The run's lock cannot be read: {error}", where=str(path)) from None
    return found if isinstance(found, dict) else {}


def plain_name(reference: str) -> str:
    """A reference without the folders of this machine."""
    return Path(reference).name if Path(reference).is_absolute() else reference
