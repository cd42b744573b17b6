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
    """Ask every stage whether it can be applied to the model in a folder. Raises what `Stage.check_model` does."""
    for check in model_checks(stages):
        check.ask(start)


@dataclass(frozen=True)
class ModelCheck:
    """What the last of ``stages`` asks of the starting model, or of its widths as those before leave them."""

    stages: tuple[Stage[Any, Any], ...]
    of_widths: bool

    def ask(self, start: Path) -> None:
        """Ask it of the model in a folder. Raises what `Stage.check_model` does."""
        *before, stage = self.stages
        if self.of_widths:
            if isinstance(stage, ChecksWidths):
                stage.check_widths(start, before)
        elif isinstance(stage, ChecksModel):
            stage.check_model(start)


def model_checks(stages: Iterable[Stage[Any, Any]]) -> Iterator[ModelCheck]:
    """What each stage asks, up to one that goes on with another model.

    Of those before it are told that cut widths, or leave an importance matrix.
    """
    told: list[Stage[Any, Any]] = []
    for stage in takewhile(lambda stage: not stage.references(), stages):
        yield ModelCheck((stage,), of_widths=False)
        yield ModelCheck((*told, stage), of_widths=True)
        if stage.output_spec().imatrix_beside or isinstance(stage, ChangesWidths):
            told.append(stage)
