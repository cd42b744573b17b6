"""The end of a search: what it will take, what ships, and the session on the test rows that says what it is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compress.plugins.ray.jobs import Journey
from compress.plugins.search.costs import Costs
from compress.plugins.search.engine import Engine
from compress.plugins.search.final_evaluation import Final, Seed, further_seeds, judge, timing_seconds, trained_again
from compress.plugins.search.refit import Refit
from compress.plugins.search.space import Point, Space
from compress.plugins.search.trial import Trials
from compress.utils.errors import first_line

_SESSION_MODELS = 2.0
"""Models that the session is thought to judge, as long as it takes to judge and time one of a trial."""


@dataclass
class Ending:
    """Of one search."""

    space: Space
    costs: Costs
    engine: Engine
    trials: Trials
    refit: Refit

    @property
    def seeds(self) -> int:
        """How many further ones the winner is trained with; none where nothing is trained."""
        return self.space.search.seeds if len(self.engine.shares) > 1 else 0

    def ahead(self) -> list[Journey]:
        """What it needs whatever is found: the baselines of further seeds, and of the winner's refit."""
        base = self.space.base
        if base.baseline not in self.space.labels:
            return []
        seeds = [base.seed] * self.refit.wanted + [*further_seeds(base, self.seeds)]
        return [Journey(self.refit.recipe(self.space.origin, seed), until=base.baseline) for seed in seeds]

    def reserve(self) -> float:
        """Seconds that it will take: tests and times, the likely winner's refit and its further seeds.

        While there is no winner, trials that may find one come before seeds.
        """
        session, known = self._session_seconds(), self.engine.known
        ranked = known.ranked()
        again = self.refit.wanted + (self.seeds if ranked else 0)
        if not again:
            return session
        likely = next(iter(ranked or known.nearest()), self.space.origin)
        return session + min(again * self._again_seconds(likely), 0.5 * self.space.search.seconds)

    def _session_seconds(self) -> float:
        return timing_seconds(self.space.search) + _SESSION_MODELS * self.costs.beside_seconds

    def _again_seconds(self, point: Point) -> float:
        """Of training a recipe once more, about."""
        return (1 + self.refit.more_rows if self.refit.wanted else 1) * self.costs.all_seconds(point)

    def fitting(self, best: Point, refit: bool, left: float) -> int:
        """How many further seeds ``left`` seconds are enough for, beside the refit and the session."""
        each = max(self._again_seconds(best), 1e-9)
        trainings = int((left - self._session_seconds()) * self.trials.workers.width / each)
        return min(self.seeds, max(0, trainings - refit))

    def judged(self, note: Callable[[str], None], say: Callable[[str], None], left: float) -> Final | None:
        """What the test rows say of the winner; None where no recipe's figures keep every limit.

        Of its further seeds as many are trained as ``left`` seconds are enough for.
        """
        pick = next(iter(self.engine.known.ranked()), None)
        if pick is None:
            return None
        best, refit, seeds = *self._winner(pick), list[Seed]()
        again = ["from the rows that chose it too"] * refit
        count = self.fitting(best, refit, left)
        if count < self.seeds:
            note(f"there is time for {count or 'none'} of the winner's {self.seeds} further training seeds")
        if count:
            again.append(f"of {count} more training seed{'s'[: count > 1]}")
        if again:
            say(f"the winner again, {' and '.join(again)}")
            failed, seeds = trained_again(self.space, self.engine, best, self.trials, count, refit)
            if failed is not None:
                note(f"that failed, so it ships as it was chosen: {first_line(failed)}")
                # Further seeds were asked to learn from all rows too.
                best, refit, seeds = pick, False, []
        # Nothing may run here while times are taken.
        self.trials.workers.rest()
        say(f"the session at the end, on the test rows: {self.space.words(best)}")
        final = judge(self.space, self.engine, best, self.trials, refit)
        return final.model_copy(update={"seeds": tuple(seeds)})

    def _winner(self, pick: Point) -> tuple[Point, bool]:
        """What ships, and whether it learns from all rows: the pick, or what is next to it and not too large then."""
        known = self.engine.known
        trained = (point for point in known.ranked() if self.refit.wanted and self.space.trains(point))
        best = next((point for point in trained if self.refit.is_fit(point, known)), None)
        return (pick, False) if best is None else (best, True)
