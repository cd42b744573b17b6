"""Whether a recipe may be given up before it is trained in full."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from compress.recipe.recipe import Limit
from compress.search.goal import named
from compress.search.known import Known
from compress.search.outcome import difference
from compress.search.space import Point

_FEWEST_PAIRS = 3
_REMEMBERED, _LASTING = 12, 0.5
"""Recipes by which it is known how much of an early gap lasts, and what is taken before there are any."""


def hopeless(
    known: Known, point: Point, rung: int, shares: tuple[float, ...], family: Callable[[Point], object]
) -> str:
    """Why a recipe will not keep a limit, by how it stands to one of its family after as much training; else nothing.

    With the rungs that are looked at, each look has its part of the error that is allowed for (Bonferroni). What parts
    recipes early parts them less when all is learned, so that gaps count as far as those of others lasted.
    """
    own, goal = known.outcomes[point, rung], known.goal
    confidence = 1 - (1 - goal.confidence) / max(len(shares), 1)
    kin = [other for other in _ended(known, rung) if family(other) == family(point)]
    for limit in goal.quality:
        lasting = _lasting(known, limit, rung)
        for other in kin:
            gap = difference(limit, own, known.outcomes[other, rung], confidence)
            there = known.rooms[other, known.full][named(limit)]
            if gap is not None and there is not None and there.value + lasting * gap.high < 0:
                return (
                    f"{named(limit)}: after {shares[rung]:.0%} of training {-gap.value:.1%} behind a recipe of its "
                    f"family that ended {there.value:+.1%} from the limit"
                )
    return ""


def _ended(known: Known, rung: int) -> list[Point]:
    """Recipes that were looked at after that rung and trained in full."""
    return [point for point in known.finished if (point, rung) in known.rooms]


def _lasting(known: Known, limit: Limit, rung: int) -> float:
    """How much of a gap in quality after that rung is left when all is learned: a slope through 0, at most 1."""
    name, pairs = named(limit), []
    for one, other in itertools.combinations(_ended(known, rung)[-_REMEMBERED:], 2):
        rooms = [known.rooms[point, at][name] for at in (rung, known.full) for point in (one, other)]
        early = [room.value for room in rooms if room is not None]
        if len(early) == len(rooms):
            pairs.append((early[0] - early[1], early[2] - early[3]))
    across = sum(before * before for before, _ in pairs)
    if len(pairs) < _FEWEST_PAIRS or not across:
        return _LASTING
    return min(max(sum(before * after for before, after in pairs) / across, 0.0), 1.0)
