"""Refit: the winner is trained once more at the end, on the selection rows too.

This corresponds to `refit` of scikit-learn's searches. The test rows are not used. More rows may add words
to a trimmed vocabulary, so recipes whose refit would exceed a limit on size are not tried.
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
"""Least number of selection rows, as a share of the training rows, for which a refit is worth its time."""


@dataclass
class Refit:
    """Decisions about the refit of a search."""

    space: SearchSpace
    trials: TrialRunner
    size_estimator: SizeEstimator

    @cached_property
    def enabled(self) -> bool:
        """Return whether the winner is refitted: by the recipe, or else by the number of selection rows."""
        setting = self.space.search.refit
        if setting is not None or _why_not(self.space) is not None:
            return bool(setting)
        return self.more_rows >= _WORTH

    @cached_property
    def more_rows(self) -> float:
        """Number of selection rows as a share of the training rows."""
        data = self.trials.context.runner(self.space.base).inputs.data
        return len(data.split(self.space.search.select.split)) / len(data.split("train"))

    def recipe(self, point: Point, seed: int | None = None) -> Recipe:
        """Return the recipe at a point, with the selection rows in its training data if the refit is enabled."""
        return self.space.recipe(point, seed=seed, refit=self.enabled)

    def fits_limits(self, point: Point, observations: Observations) -> bool:
        """Return whether the refitted model is predicted to meet every limit on size."""
        if not self.enabled or not self.size_estimator.is_ready or observations.origin not in observations.finished:
            return True
        return all(
            self._keeps(limit, point, observations) for limit in observations.goal.limits if limit.metric == SIZE
        )

    def _keeps(self, limit: Limit, point: Point, observations: Observations) -> bool:
        size_bytes = self.size_estimator.size_bytes(point)
        if limit.at_most is None or size_bytes is None:
            return True
        bound = limit.at_most * (1.0 if limit.of is None else observations.finished[observations.origin].baseline[SIZE])
        # Words grow slower than rows (Heaps 1978, section 7.5), and are a part of the bytes.
        if size_bytes * (1 + self.more_rows) <= bound:
            return True
        refit_bytes = self._estimator_of_all_rows.size_bytes(point)
        return refit_bytes is None or refit_bytes <= bound

    @cached_property
    def _estimator_of_all_rows(self) -> SizeEstimator:
        return self.size_estimator.with_data_of(self.trials.context.runner(self.recipe(self.space.origin)))


def check_refit(space: SearchSpace) -> None:
    """Raise `InputError` where the recipe asks for a refit that its rows do not allow."""
    if space.search.refit and (why := _why_not(space)) is not None:
        raise InputError(
            f"The rows that choose cannot be learned from at the end: {why}.",
            where="search.refit",
            expected="rows held out of train, the last of what is held out, and a stage that trains",
            hint="remove `refit`",
        )


def _why_not(space: SearchSpace) -> str | None:
    hold_out, split = space.base.data.hold_out or (), space.search.select.split
    if split not in [split_config.split for split_config in hold_out]:
        return "they are a split of their own"
    if hold_out[-1].split != split:
        return f"{hold_out[-1].split} is drawn from what they leave, and would be other rows without them"
    if hold_out[-1].source != "train":
        return f"they are rows of {hold_out[-1].source}, which nothing is trained on"
    return None if space.trains(space.origin) else "nothing is trained"
