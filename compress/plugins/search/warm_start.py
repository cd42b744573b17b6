"""What earlier searches came to, and what shipped recipes do, at the points of this space: where to look first.

None of it counts as an outcome: whether a recipe keeps its limits is always measured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_jsonable_python

from compress.plugins.search.goal import Goal, limit_name
from compress.plugins.search.ledger import LEDGER_FILE
from compress.plugins.search.ledger import Ledger, PastTrial
from compress.plugins.search.outcome import constraint_margin
from compress.plugins.search.parameters import LEFT_OUT, SearchParameter, field_path, get_value, set_value
from compress.plugins.search.space import Point, SearchSpace
from compress.plugins.search.surrogate import Floats, Surrogate
from compress.recipe.document import read_document
from compress.recipe.recipe import stage_labels
from compress.utils.errors import CompressError

_SEARCHES, _TRIALS = 5, 200
"""The newest searches that are looked at, and the most trials that are remembered of them."""
SUPPOSED = 0.02
"""How far from its limit a shipped recipe may be in this space, one standard deviation, as a share of the bound."""
DISCREPANCY = 0.02
"""By how much another search may have come to something else, the same way, or recipes differ of which few are known:
those tried first may all be much alike."""
_FEWEST, _SHARES = 3, (1.0, 0.5, 0.0)
_TRUST = 3.0
"""By how much, as the logarithm of odds, the past is believed rather than not before anything speaks against it."""
SHARED = 2.56
"""Half-widths at 90% one-sided in a standard deviation, and twice that, since half of the error is common to all."""


def find_past_trials(space: SearchSpace, goal: Goal, artifacts: Path, recipes: Path) -> tuple[PastTrial, ...]:
    """Trials of searches of the same task in ``artifacts``, newest first, and the shipped recipes in a folder.

    Files that cannot be read are passed over.
    """
    found: list[PastTrial] = []
    ledgers = [path for path in artifacts.glob(f"searches/*/*/{LEDGER_FILE}") if not path.parent.is_symlink()]
    searches = 0
    for path in sorted(ledgers, key=lambda path: (path.parent.name, str(path)), reverse=True):
        own = _of_ledger(path, space, goal)[: _TRIALS - len(found)]
        searches += bool(own)
        found += own
        if searches == _SEARCHES:
            break
    for path in sorted(recipes.glob("*.yaml")):
        found += _of_recipe(path, space)
    return tuple(found)


def _of_ledger(path: Path, space: SearchSpace, goal: Goal) -> list[PastTrial]:
    try:
        header, entries = Ledger(path.parent).read(hint=False)
    except (CompressError, OSError):
        return []
    if header.recipe.get("task") != space.base.task:
        return []
    found = []
    for entry in entries:
        pairs = zip(header.knobs, entry.point, strict=True)
        chosen = {name: values[place] for (name, values), place in pairs if place}
        point = _point(space, _changed(header.recipe.get("stages", []), chosen))
        rooms = {
            limit_name(limit): constraint_margin(limit, entry.outcome, goal.confidence) for limit in goal.quality_limits
        }
        kept = {name: (room.value, room.value - room.low) for name, room in rooms.items() if room is not None}
        if point is not None and entry.outcome.error is None and kept:
            share, source = header.rungs[entry.rung], f"the search {path.parent.parent.name}"
            found.append(PastTrial(point=point, share=share, rooms=kept, source=source))
    return found


def _of_recipe(path: Path, space: SearchSpace) -> list[PastTrial]:
    try:
        values = read_document(path).values
    except CompressError:
        return []
    if not isinstance(values, Mapping) or values.get("task") != space.base.task:
        return []
    point = _point(space, [_stage_of(item) for item in values.get("stages") or []])
    if point is None or not any(point):
        return []
    return [PastTrial(point=point, share=1.0, rooms={}, source=f"the recipe {path.stem}")]


def _stage_of(item: Any) -> dict[str, Any]:
    """A stage as a recipe writes it, as its fields with its kind."""
    if isinstance(item, Mapping) and len(item) == 1:
        ((kind, fields),) = item.items()
        return {"kind": kind, **(fields if isinstance(fields, Mapping) else {})}
    return {"kind": item}


def _changed(stages: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An earlier search's stages with what one of its trials chose."""
    found = [deepcopy(dict(stage)) for stage in stages]
    kinds = [str(stage.get("kind")) for stage in stages]
    for name, value in chosen.items():
        tokens = name.split(".")
        if tokens[0] == "stages" and len(tokens) > 2:
            index = int(tokens[1])
            set_value(found[index], field_path(name, kinds[index]), value)
    gone = [name for name, value in chosen.items() if value == LEFT_OUT]
    return [stage for stage, label in zip(found, stage_labels(kinds), strict=True) if label not in gone]


def _point(space: SearchSpace, stages: Sequence[Mapping[str, Any]]) -> Point | None:
    """The point whose stages are most like these; None where half of the choices, or more, have nothing like them."""
    known: dict[str, list[Mapping[str, Any]]] = {}
    for stage in stages:
        known.setdefault(str(stage.get("kind")), []).append(stage)
    places: list[int | None] = []
    for parameter in space.parameters:
        kinds = [stage.kind for stage in space.base.stages]
        kind = kinds[parameter.stage_index]
        before = kinds[: parameter.stage_index].count(kind)
        own = known.get(kind, [])[before : before + 1]
        if parameter.is_optional_stage:
            places.append(0 if own else 1)
        else:
            places.append(_nearest(parameter, get_value(own[0], field_path(parameter.name, kind))) if own else None)
    if 2 * sum(place is not None for place in places) <= len(places):
        return None
    return space.canonicalize([place or 0 for place in places])


def _nearest(parameter: SearchParameter, value: Any) -> int | None:
    """The place of the value that is the same or, of numbers and of lists' lengths, the nearest."""
    plain = to_jsonable_python(value)
    if plain in parameter.values:
        return parameter.values.index(plain)
    size, sizes = _size(plain), [_size(each) for each in parameter.values]
    if size is None or None in sizes:
        return None
    return min(range(len(sizes)), key=lambda place: abs((sizes[place] or 0.0) - size))


def _size(value: Any) -> float | None:
    if isinstance(value, list | tuple):
        return float(len(value))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


class TransferPrior:
    """What is expected of quality by what is past: a Gaussian process for each limit, to be contradicted."""

    def __init__(self, past: Sequence[PastTrial], features: Callable[[Point, float], list[float]]) -> None:
        self._past, self._features = past, features
        self._made: dict[str, Surrogate | None] = {}

    def get(self, limit: str) -> Surrogate | None:
        """That of a limit; None where too little is past. A shipped recipe is supposed to just keep every limit."""
        if limit not in self._made:
            rows = [one for one in self._past if limit in one.rooms or not one.rooms]
            self._made[limit] = self._fitted(rows, limit) if len(rows) >= _FEWEST else None
        return self._made[limit]

    def _fitted(self, rows: Sequence[PastTrial], limit: str) -> Surrogate:
        rooms = [one.rooms.get(limit, (0.0, SHARED * SUPPOSED)) for one in rows]
        features = np.array([self._features(one.point, one.share) for one in rows])
        values, halves = (np.array(column) for column in zip(*rooms, strict=True))
        return Surrogate.fit(features, values, np.maximum(halves / SHARED, 1e-3))

    def chances(self, limit: str, features: Floats, bound: float) -> Floats | None:
        """The probability [m] of a room of at least ``bound``, before anything of this search says so."""
        known = self.get(limit)
        return (
            None if known is None else known.probability_at_least(features, np.full(len(features), bound), DISCREPANCY)
        )


def fit_with_prior(
    prior: Surrogate | None, features: Floats, values: Floats, deviations: Floats, lesser: Sequence[bool]
) -> tuple[Surrogate, float]:
    """What is left of ``values`` [n] once a share of the prior's mean is taken off, as a process, and that share.

    The share is that of 1, a half and nothing under which the values are likeliest, so that a prior that misleads is
    dropped as soon as values speak against it. ``lesser`` features [d] are taken to matter less (`Surrogate.of`).
    """
    best: tuple[float, Surrogate, float] | None = None
    for share in (0.0,) if prior is None else _SHARES:
        expected = 0.0 if prior is None or not share else share * prior.mean(features)
        found = Surrogate.fit(features, values - expected, deviations, DISCREPANCY, lesser)
        likelihood = found.likelihood + _TRUST * share
        if best is None or likelihood > best[0]:
            best = likelihood, found, share
    assert best is not None
    return best[1:]
