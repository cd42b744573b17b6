"""What the stages of a recipe ask of its starting model before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from compress.stage.stage import Stage


def check_stages(stages: Iterable[Stage[Any, Any]], start: Path) -> None:
    """Ask every stage whether it can be applied to the model in a folder. Raises what `Stage.check_model` does."""
    for _, check in model_checks(stages):
        check(start)


def model_checks(stages: Iterable[Stage[Any, Any]]) -> Iterator[tuple[Stage[Any, Any], Callable[[Path], None]]]:
    """Each stage with what it asks, up to one that goes on with another model.

    Called with the model's folder, a check raises what `Stage.check_model` does.
    """
    before: list[Stage[Any, Any]] = []
    for stage in takewhile(lambda stage: not stage.paths(), stages):
        yield stage, stage.check_model
        yield stage, partial(stage.check_widths, before=tuple(before))
        before.append(stage)
