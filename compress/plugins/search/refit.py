"""The winner, trained once more at the end, from the rows that chose it too: they have done their work.

As `refit` of scikit-learn's searches. What judges, the test rows, is not touched by it. More rows may make a larger
vocabulary, so that recipes whose refit would be too large for a limit are not tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from compress.plugins.search.costs import SIZE
from compress.plugins.search.observations import Observations
from compress.plugins.search.size_estimator import SizeEstimator
from compress.plugins.search.space import Point, SearchSpace
from compress.plugins.search.trial import TrialRunner
from compress.recipe.recipe import Limit, Recipe
from compress.utils.errors import InputError

_WORTH = 1 / 20
"""Of the rows that training has, those that choose have to be so many, or they would change next to nothing."""


@dataclass
class Refit:
    """Of one search."""

    space: SearchSpace
    trials: TrialRunner
    foresight: SizeEstimator

    @cached_property
    def enabled(self) -> bool:
        """By what the recipe says, or where it says nothing by how many rows choose."""
        asked = self.space.search.refit
        if asked is not None or _why_not(self.space) is not None:
            return bool(asked)
        return self.more_rows >= _WORTH

    @cached_property
    def more_rows(self) -> float:
        """Those that choose, as a share of those that trials are trained on."""
        data = self.trials.roads.runner(self.space.base).data
        return len(data.split(self.space.search.select.split)) / len(data.split("train"))

    def recipe(self, point: Point, seed: int | None = None) -> Recipe:
        """With all rows, where they are wanted."""
        return self.space.recipe(point, seed=seed, refit=self.enabled)

    def fits_limits(self, point: Point, known: Observations) -> bool:
        """Whether what would ship keeps every limit on its size, as far as that can be foretold."""
        if not self.enabled or not self.foresight.is_ready or known.origin not in known.finished:
            return True
        return all(self._keeps(limit, point, known) for limit in known.goal.limits if limit.metric == SIZE)

    def _keeps(self, limit: Limit, point: Point, known: Observations) -> bool:
        own = self.foresight.size_bytes(point)
        if limit.at_most is None or own is None:
            return True
        most = limit.at_most * (1.0 if limit.of is None else known.finished[known.origin].baseline[SIZE])
        # Words grow slower than rows (Heaps 1978, section 7.5), and are a part of the bytes.
        if own * (1 + self.more_rows) <= most:
            return True
        size = self._of_all_rows.size_bytes(point)
        return size is None or size <= most

    @cached_property
    def _of_all_rows(self) -> SizeEstimator:
        return self.foresight.with_data_of(self.trials.roads.runner(self.recipe(self.space.origin)))


def check_refit(space: SearchSpace) -> None:
    """Raise `InputError` where the recipe wants what its rows don't allow."""
    if space.search.refit and (why := _why_not(space)) is not None:
        raise InputError(
            f"The rows that choose cannot be learned from at the end: {why}.",
            where="search.refit",
            expected="rows held out of train, the last of what is held out, and a stage that trains",
            hint="remove `refit`",
        )


def _why_not(space: SearchSpace) -> str | None:
    held, split = space.base.data.hold_out or (), space.search.select.split
    if split not in [each.split for each in held]:
        return "they are a split of their own"
    if held[-1].split != split:
        return f"{held[-1].split} is drawn from what they leave, and would be other rows without them"
    if held[-1].source != "train":
        return f"they are rows of {held[-1].source}, which nothing is trained on"
    return None if space.trains(space.origin) else "nothing is trained"
