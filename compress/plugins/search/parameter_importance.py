"""How much each choice matters: an analysis of variance of what a surrogate makes of the recipes trained in full."""

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
"""Recipes that are needed: so many, and so many more than choices that were tried with two values."""
_FORETOLD = 0.3
"""The share of the variance of recipes that are left out that the surrogate has to foretell."""
_MOST = 20_000


@dataclass(frozen=True)
class ParameterImportance:
    """``shares`` of the variance that each choice explains alone; None of one that was tried with one value.

    None at all where too little is known, and ``note`` says what is missing.
    """

    shares: tuple[float | None, ...] | None
    note: str


def importance(parameters: Sequence[SearchParameter], points: Sequence[Point], values: Floats) -> ParameterImportance:
    """What every choice alone explains of the variance of ``values`` [n] over the whole space, by those at ``points``.

    Functional analysis of variance (Hutter, Hoos and Leyton-Brown 2014, section 3), of a Gaussian process's mean in
    place of a forest's. Nothing is said where it cannot foretell recipes that it is fitted without (Rasmussen and
    Williams 2006, section 5.4.2).
    """
    varied = [place for place in range(len(parameters)) if len({point[place] for point in points}) > 1]
    needed = max(_FEWEST, len(varied) + _SPARE)
    if len(points) < needed:
        return ParameterImportance(
            None, f"too few to say: {len(points)} recipes were trained in full, {needed} are needed"
        )
    if not varied or float(np.ptp(values)) < 1e-12:
        return ParameterImportance(None, "nothing to say: every recipe that was trained in full came to the same")
    ranks = [np.array(parameter.ranks()) for parameter in parameters]
    known = np.stack([ranks[place][[point[place] for point in points]] for place in varied], axis=1)
    surrogate = Surrogate.fit(known, values, np.full(len(values), 1e-3 * float(values.std())))
    missed = surrogate.leave_one_out_errors()
    foretold = 1 - float((missed**2).sum() / ((values - values.mean()) ** 2).sum())
    if foretold < _FORETOLD:
        return ParameterImportance(
            None,
            f"too few to say: of {len(points)} recipes, each foretold by the others, {max(foretold, 0):.0%} of the "
            f"variance is explained, {_FORETOLD:.0%} are needed",
        )
    grid = _grid([len(parameters[place].values) for place in varied])
    means = surrogate.mean(np.stack([ranks[place][grid[:, at]] for at, place in enumerate(varied)], axis=1))
    whole = float(means.var())
    shares: list[float | None] = [None] * len(parameters)
    for at, place in enumerate(varied):
        counts = np.bincount(grid[:, at])
        alone = np.bincount(grid[:, at], weights=means)[counts > 0] / counts[counts > 0]
        weights = counts[counts > 0] / len(grid)
        shares[place] = float((weights * (alone - means.mean()) ** 2).sum()) / whole if whole else 0.0
    rest = max(1 - sum(share for share in shares if share is not None), 0.0)
    return ParameterImportance(
        tuple(shares),
        f"by {len(points)} recipes, of which each is foretold by the others to {foretold:.0%} of the variance; "
        f"{rest:.0%} is in what choices do together",
    )


def _grid(sizes: Sequence[int]) -> np.ndarray:
    """Every place of every choice with every other's, [n, choices]; of very many a sample."""
    if math.prod(sizes) <= _MOST:
        return np.array(list(itertools.product(*map(range, sizes))))
    return np.random.default_rng(0).integers(0, sizes, (_MOST, len(sizes)))
