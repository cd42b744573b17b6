"""Importance of search parameters: analysis of variance of a Gaussian process fitted to recipes trained in
full.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress.plugins.search.parameters import SearchParameter
from compress.plugins.search.space import Point
from compress.plugins.search.surrogate import Floats, Surrogate

_FEWEST, _SPARE = 6, 2
"""Least number of recipes, and least excess over the number of parameters that were tried with two values."""
_FORETOLD = 0.3
"""Least share of the variance of left-out recipes that the process has to predict."""
_MOST = 20_000


@dataclass(frozen=True)
class ParameterImportance:
    """Share of the variance that each parameter explains alone; None for one that was tried with one value.

    ``shares`` is None where too few recipes are known, and ``note`` states the reason.
    """

    shares: tuple[float | None, ...] | None
    note: str


def analyze_importance(
    parameters: Sequence[SearchParameter], points: Sequence[Point], values: Floats
) -> ParameterImportance:
    """Return the share of the variance of the values over the whole space that each parameter explains alone.

    This is a functional analysis of variance (Hutter, Hoos and Leyton-Brown 2014, section 3) of the mean of a
    Gaussian process instead of a forest. There is no result where the process cannot predict left-out recipes
    (Rasmussen and Williams 2006, section 5.4.2).
    """
    varied = [column for column in range(len(parameters)) if len({point[column] for point in points}) > 1]
    needed = max(_FEWEST, len(varied) + _SPARE)
    if len(points) < needed:
        return ParameterImportance(
            None, f"too few to say: {len(points)} recipes were trained in full, {needed} are needed"
        )
    if not varied or float(np.ptp(values)) < 1e-12:
        return ParameterImportance(None, "nothing to say: every recipe that was trained in full came to the same")
    ranks = [np.array(parameter.ranks()) for parameter in parameters]
    coordinates = np.stack([ranks[column][[point[column] for point in points]] for column in varied], axis=1)
    surrogate = Surrogate.fit(coordinates, values, np.full(len(values), 1e-3 * float(values.std())))
    errors = surrogate.leave_one_out_errors()
    predicted_share = 1 - float((errors**2).sum() / ((values - values.mean()) ** 2).sum())
    if predicted_share < _FORETOLD:
        return ParameterImportance(
            None,
            f"too few to say: of {len(points)} recipes, each foretold by the others, {max(predicted_share, 0):.0%} of "
            f"the variance is explained, {_FORETOLD:.0%} are needed",
        )
    # Average the predicted values over all other parameters to get the effect of each alone.
    grid = _grid([len(parameters[column].values) for column in varied])
    means = surrogate.mean(np.stack([ranks[column][grid[:, at]] for at, column in enumerate(varied)], axis=1))
    whole = float(means.var())
    shares: list[float | None] = [None] * len(parameters)
    for at, column in enumerate(varied):
        counts = np.bincount(grid[:, at])
        marginal_means = np.bincount(grid[:, at], weights=means)[counts > 0] / counts[counts > 0]
        weights = counts[counts > 0] / len(grid)
        shares[column] = float((weights * (marginal_means - means.mean()) ** 2).sum()) / whole if whole else 0.0
    interaction = max(1 - sum(share for share in shares if share is not None), 0.0)
    return ParameterImportance(
        tuple(shares),
        f"by {len(points)} recipes, of which each is foretold by the others to {predicted_share:.0%} of the variance; "
        f"{interaction:.0%} is in what choices do together",
    )


def _grid(sizes: Sequence[int]) -> np.ndarray:
    """Return every combination of indices [n, parameters]; of very many a sample."""
    if math.prod(sizes) <= _MOST:
        return np.array(list(itertools.product(*map(range, sizes))))
    return np.random.default_rng(0).integers(0, sizes, (_MOST, len(sizes)))
