"""Warm start: earlier searches and shipped recipes decide where a search looks first.

They never count as outcomes: every recipe is measured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
from pydantic_core import to_jsonable_python

from compress.plugins.search.observations import LEDGER_FILE, Ledger, PastTrial
from compress.plugins.search.outcome import Goal, limit_name
from compress.plugins.search.space import (
    LEFT_OUT,
    Point,
    SearchParameter,
    SearchSpace,
    StageFields,
    field_path,
    get_value,
    magnitude,
    set_value,
)
from compress.plugins.search.surrogate import Floats, Surrogate
from compress.recipe.document import read_document
from compress.recipe.recipe import stage_labels
from compress.utils.errors import CompressError

_SEARCHES, _TRIALS = 5, 200
"""Number of the newest searches that are read, and of their trials."""
SHIPPED_RECIPE_DEVIATION = 0.02
"""Standard deviation of a shipped recipe's assumed margin, as a share of the bound."""
DISCREPANCY = 0.02
"""Standard deviation between searches, and smallest one between recipes, since the first recipes may be alike."""
_FEWEST, _SHARES = 3, (1.0, 0.5, 0.0)
_TRUST = 3.0
"""Logarithm of the prior odds that earlier searches predict this one."""
HALF_WIDTHS_PER_DEVIATION = 2.56
"""Half-widths of a one-sided 90% interval in a standard deviation.

The number is doubled, since half of the error is common to all recipes.
"""


def find_past_trials(space: SearchSpace, goal: Goal, artifacts: Path, recipes: Path) -> tuple[PastTrial, ...]:
    """Return trials of earlier searches of the same task, newest first, and the shipped recipes of a folder.

    Files that cannot be read are skipped.

    Args:
        space: Space of the present search.
        goal: Goal of the present search.
        artifacts: Folder with earlier searches.
        recipes: Folder with recipes.
    """
    trials: list[PastTrial] = []
    ledgers = [path for path in artifacts.glob(f"searches/*/*/{LEDGER_FILE}") if not path.parent.is_symlink()]
    searches = 0
    # Folder names begin with the time, so the newest search comes first.
    for path in sorted(ledgers, key=lambda path: (path.parent.name, str(path)), reverse=True):
        ledger_trials = _of_ledger(path, space, goal)[: _TRIALS - len(trials)]
        searches += bool(ledger_trials)
        trials += ledger_trials
        if searches == _SEARCHES:
            break
    for path in sorted(recipes.glob("*.yaml")):
        trials += _of_recipe(path, space)
    return tuple(trials)


def _of_ledger(path: Path, space: SearchSpace, goal: Goal) -> list[PastTrial]:
    try:
        header, entries = Ledger(path.parent).read(repair=False)
    except (CompressError, OSError):
        return []
    if header.recipe.get("task") != space.base.task:
        return []
    trials = []
    for entry in entries:
        # Index 0 is the recipe as it stood. Only the other choices change its stages.
        pairs = zip(header.knobs, entry.point, strict=True)
        chosen = {name: values[index] for (name, values), index in pairs if index}
        point = _point(space, _changed(header.recipe.get("stages", []), chosen))
        measured = goal.margins(entry.outcome).items()
        quality = set(map(limit_name, goal.quality_limits))
        margins = {
            name: (room.value, room.value - room.low) for name, room in measured if room is not None and name in quality
        }
        if point is not None and entry.outcome.error is None and margins:
            share, source = header.rungs[entry.rung], f"the search {path.parent.parent.name}"
            trials.append(PastTrial(point=point, share=share, rooms=margins, source=source))
    return trials


def _of_recipe(path: Path, space: SearchSpace) -> list[PastTrial]:
    try:
        values = read_document(path).values
    except CompressError:
        return []
    if not isinstance(values, Mapping) or values.get("task") != space.base.task:
        return []
    # A stage is its kind, or a mapping from its kind to its fields.
    items = (item if isinstance(item, Mapping) else {str(item): {}} for item in values.get("stages") or [])
    pairs = (pair for item in items for pair in item.items())
    point = _point(space, [{"kind": kind, **(fields if isinstance(fields, Mapping) else {})} for kind, fields in pairs])
    if point is None or not any(point):
        return []
    return [PastTrial(point=point, share=1.0, rooms={}, source=f"the recipe {path.stem}")]


def _changed(stages: Sequence[StageFields], chosen: Mapping[str, object]) -> list[StageFields]:
    """Return the stages of an earlier search with the choices of one of its trials."""
    changed = [deepcopy(dict(stage)) for stage in stages]
    kinds = [str(stage.get("kind")) for stage in stages]
    for name, value in chosen.items():
        tokens = name.split(".")
        if tokens[0] == "stages" and len(tokens) > 2:
            index = int(tokens[1])
            set_value(changed[index], field_path(name, kinds[index]), value)
    left_out = [name for name, value in chosen.items() if value == LEFT_OUT]
    return [stage for stage, label in zip(changed, stage_labels(kinds), strict=True) if label not in left_out]


def _point(space: SearchSpace, stages: Sequence[StageFields]) -> Point | None:
    """Return the point with the most similar stages; None where half of the choices or more have no counterpart."""
    stages_by_kind: dict[str, list[StageFields]] = {}
    for stage in stages:
        stages_by_kind.setdefault(str(stage.get("kind")), []).append(stage)
    indices: list[int | None] = []
    for parameter in space.parameters:
        kinds = [stage.kind for stage in space.base.stages]
        kind = kinds[parameter.stage_index]
        # The n-th stage of a kind corresponds to the n-th stage of that kind in the other recipe.
        earlier = kinds[: parameter.stage_index].count(kind)
        counterpart = stages_by_kind.get(kind, [])[earlier : earlier + 1]
        if parameter.is_optional_stage:
            indices.append(0 if counterpart else 1)
        else:
            path = field_path(parameter.name, kind)
            indices.append(_nearest(parameter, get_value(counterpart[0], path)) if counterpart else None)
    if 2 * sum(index is not None for index in indices) <= len(indices):
        return None
    return space.canonicalize([index or 0 for index in indices])


def _nearest(parameter: SearchParameter, value: object) -> int | None:
    """Return the index of the same value or, for numbers and lengths of lists, of the nearest one."""
    plain = to_jsonable_python(value)
    if plain in parameter.values:
        return parameter.values.index(plain)
    # Values without an order have a counterpart only if they are equal.
    size, sizes = magnitude(plain), [magnitude(item) for item in parameter.values]
    if size is None or None in sizes:
        return None
    return min(range(len(sizes)), key=lambda index: abs((sizes[index] or 0.0) - size))


class TransferPrior:
    """Gaussian process of each limit's margin, fitted to past trials."""

    def __init__(self, past: Sequence[PastTrial], features: Callable[[Point, float], list[float]]) -> None:
        self._past, self._features = past, features
        self._processes: dict[str, Surrogate | None] = {}

    def get(self, limit: str) -> Surrogate | None:
        """Return the process of a limit; None with too few past trials.

        Shipped recipes are assumed to just meet every limit.
        """
        if limit not in self._processes:
            self._processes[limit] = None
            rows = [trial for trial in self._past if limit in trial.rooms or not trial.rooms]
            if len(rows) >= _FEWEST:
                default = 0.0, HALF_WIDTHS_PER_DEVIATION * SHIPPED_RECIPE_DEVIATION
                margins = [trial.rooms.get(limit, default) for trial in rows]
                features = np.array([self._features(trial.point, trial.share) for trial in rows])
                values, halves = (np.array(column) for column in zip(*margins, strict=True))
                deviations = np.maximum(halves / HALF_WIDTHS_PER_DEVIATION, 1e-3)
                self._processes[limit] = Surrogate.fit(features, values, deviations)
        return self._processes[limit]

    def chances(self, limit: str, features: Floats, bound: float) -> Floats | None:
        """Return the probability [m] of a margin of at least ``bound``; None with too few past trials."""
        process = self.get(limit)
        if process is None:
            return None
        return process.probability_at_least(features, np.full(len(features), bound), DISCREPANCY)


def fit_with_prior(
    prior: Surrogate | None, features: Floats, values: Floats, deviations: Floats, lesser: Sequence[bool]
) -> tuple[Surrogate, float]:
    """Fit what remains of the values after a share of the prior's mean is subtracted.

    The share is 1, a half or 0, whichever gives the highest likelihood, so that a misleading prior is dropped
    as soon as values contradict it.

    Args:
        prior: Process fitted to past trials; None without one.
        features: Coordinates [n, d].
        values: Measured margins [n].
        deviations: Standard deviations [n].
        lesser: Features [d] that are assumed to matter less (`Surrogate.fit`).

    Returns:
        The process of the remainder, and the share of the prior.
    """
    best: tuple[float, Surrogate, float] | None = None
    # A larger share of the prior gets a bonus, which the likelihood of contradicting values outweighs.
    for share in (0.0,) if prior is None else _SHARES:
        expected = 0.0 if prior is None or not share else share * prior.mean(features)
        surrogate = Surrogate.fit(features, values - expected, deviations, DISCREPANCY, lesser)
        likelihood = surrogate.likelihood + _TRUST * share
        if best is None or likelihood > best[0]:
            best = likelihood, surrogate, share
    assert best is not None
    return best[1:]
