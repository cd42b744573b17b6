"""What the stages of a recipe ask of its starting model before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from compress.stages.base import Stage
from compress.stages.protocols import ChangesWidths, ChecksModel, ChecksWidths


def check_stages(stages: Iterable[Stage[Any, Any]], start: Path) -> None:
    """Check that every stage can be applied to the model in a folder. Raises a `CompressError`."""
    for check in model_checks(stages):
        check.ask(start)


@dataclass(frozen=True)
class ModelCheck:
    """Check of the last of ``stages`` on the starting model, or on its sizes after the stages before it."""

    stages: tuple[Stage[Any, Any], ...]
    of_widths: bool

    def ask(self, start: Path) -> None:
        """Run the check on the model in a folder. Raises a `CompressError`."""
        *before, stage = self.stages
        if self.of_widths:
            if isinstance(stage, ChecksWidths):
                stage.check_widths(start, before)
        elif isinstance(stage, ChecksModel):
            stage.check_model(start)


def model_checks(stages: Iterable[Stage[Any, Any]]) -> Iterator[ModelCheck]:
    """Yield the checks of each stage, up to one that continues with another model.

    Of those before it are told that cut widths, or leave an importance matrix.
    """
    told: list[Stage[Any, Any]] = []
    for stage in takewhile(lambda stage: not stage.references(), stages):
        yield ModelCheck((stage,), of_widths=False)
        yield ModelCheck((*told, stage), of_widths=True)
        if stage.output_spec().imatrix_beside or isinstance(stage, ChangesWidths):
            told.append(stage)
