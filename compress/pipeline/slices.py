"""The slices of a run: checked before its stages begin, and found once for all of its models."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compress.data.dataset import TEST
from compress.data.membership import Part, character_lengths, find_parts
from compress.data.slices import Unit
from compress.errors import DataError
from compress.evaluation.evaluate import encode_for
from compress.pipeline.road import Road
from compress.tasks.capability import READS_ROWS


def check_slices(road: Road) -> None:
    """Read what every slice reads, so that a wrong one ends the run now and not after training. Raises `DataError`."""
    if road.slices and READS_ROWS not in road.task.capabilities:
        raise DataError(
            f"There are no slices of running text, which {road.task.name} is judged on.",
            where="slices",
            mend="remove them from the recipe",
        )
    if READS_ROWS not in road.task.capabilities:
        return

    def lengths(unit: Unit) -> np.ndarray:
        """Tokens are not counted before there is a tokenizer."""
        return character_lengths(road.data, TEST) if unit == "characters" else np.ones(len(road.data.split(TEST)))

    find_parts(road.slices, road.data, TEST, lengths)


def slices_of(road: Road, baseline: Path) -> tuple[list[Part], list[str]]:
    """The parts of the test split, the same for every model, and notes on those without a row.

    Tokens are counted by the tokenizer of the artifact ``baseline``, cut at the recipe's `max_length`.
    """

    def lengths(unit: Unit) -> np.ndarray:
        if unit == "characters":
            return character_lengths(road.data, TEST)
        rows = road.data.split(TEST)
        return encode_for(baseline, road.task, rows, road.recipe.data.max_length).lengths()[: len(rows)]

    return find_parts(road.slices, road.data, TEST, lengths)
