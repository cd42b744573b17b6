"""Answers that are numbers, scores or an embedding, held against the expected ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Numbers = tuple[float, ...]
_SHOWN = 8
_LEAST_SPAN = 1e-3


def seven_figures(values: np.ndarray) -> Numbers:
    """[values] -> what a float32 holds of each."""
    return tuple(float(f"{value:.7g}") for value in values.tolist())


def span(found: Sequence[Numbers]) -> float:
    """From the smallest to the largest number of all."""
    return max(float(np.ptp(np.concatenate(found))), _LEAST_SPAN)


def apart(found: Numbers, known: Numbers) -> float:
    """The largest difference of a number; infinite where there are more of them, or fewer."""
    return float(np.max(np.abs(np.array(found) - np.array(known)))) if len(found) == len(known) else float("inf")


def shown(numbers: Numbers) -> str:
    """The first of them."""
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"{list(numbers[:_SHOWN])}{more}"
