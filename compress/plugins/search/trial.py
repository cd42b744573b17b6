"""One trial: a recipe goes down the road, and is judged by the rows that choose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.formats.target_profile import Profile
from compress.pipeline.formats import measurable, written
from compress.pipeline.image_generation_evals import judgements
from compress.pipeline.runner import StageRunner
from compress.pipeline.target_session import TargetSession
from compress.plugins.ray.jobs import Arrival, InProcess, Journey, Roads, Workers
from compress.plugins.search.goal import Goal, target_of
from compress.plugins.search.outcome import Outcome, StageCost, figures
from compress.plugins.search.proxy_metric import NEARNESS, divergence_rows
from compress.recipe.recipe import Benchmark, Recipe
from compress.results.measurement import Measurement
from compress.results.report import BASELINE, FINAL
from compress.utils.errors import CompressError, first_line
from compress.utils.progress import Progress, SilentProgress

_LAUNCHES, _SECONDS, _PRECISION = 3, 0.7, 0.02


@dataclass(frozen=True)
class Trial:
    """A recipe to try; ``timed`` too, where the goal has a time in it. ``seconds`` is about what it takes."""

    recipe: Recipe
    timed: bool = False
    seconds: float = 0.0


Guess = Callable[[Mapping[int, Outcome]], Iterable[Trial]]
"""What may be tried next, by what came of a round's trials so far, each by its place."""


@dataclass(frozen=True)
class Answers:
    """What a recipe's final model and its baseline weigh and answer on the rows of ``split``."""

    split: str

    def __call__(self, runner: StageRunner) -> tuple[str, list[Measurement]]:
        """The digest of the final model, and what was measured of both."""
        session = _session_of(runner, self.split, (BASELINE, FINAL))
        rows = [*session.sizes(), *session.accuracies([]), *judgements(session, []), *divergence_rows(session)]
        return session.digests[FINAL], rows


@dataclass(frozen=True)
class BaselineAnswers:
    """What `Answers` would find of the baseline alone, which stays in the cache."""

    split: str

    def __call__(self, runner: StageRunner) -> None:
        """Judge it."""
        profile = target_profile(runner.recipe)
        folder = written(runner, runner.recipe.baseline, profile.target.format, profile.options)
        TargetSession(runner, profile, {BASELINE: folder}, self.split).accuracies([])


@dataclass(frozen=True)
class Times:
    """How fast the final model is on the rows of ``split``; its baseline too, where times are ``compared``."""

    split: str
    compared: bool

    def __call__(self, runner: StageRunner) -> list[Measurement]:
        """What was measured."""
        labels = (BASELINE, FINAL) if self.compared else (FINAL,)
        return _session_of(runner, self.split, labels).timings(remeasure=False)[0]


@dataclass
class Trials:
    """Trials of recipes, all trained and judged on the same data, by whoever the workers are."""

    goal: Goal
    roads: Roads
    workers: Workers

    @classmethod
    def here(cls, goal: Goal, folder: Path, artifacts: Path, progress: Progress) -> Trials:
        """Those of this process, one after another."""
        roads = Roads(folder, artifacts, Quiet(progress))
        return cls(goal, roads, InProcess(roads))

    def travelled(self, recipe: Recipe) -> StageRunner:
        """A runner at whose end a recipe has come, measured there by its baseline and its final model alone."""
        runner = self.roads.road(_at_its_ends(recipe))
        runner.run_all()
        return runner

    def run(self, recipe: Recipe, timed: bool) -> Outcome:
        """Make and judge one."""
        return next(self.together([Trial(recipe, timed)]))

    def together(self, trials: Iterable[Trial], guess: Guess | None = None) -> Iterator[Outcome]:
        """Make and judge them; outcomes come in the order of the trials. ``guess`` says what workers may begin with.

        What a recipe fails by is its outcome; a disk that is full or cannot be written ends the search.
        """

        def next_journeys(arrived: Mapping[int, Arrival]) -> list[Journey]:
            assert guess is not None
            return list(map(self._journey, guess({place: self._outcome(one) for place, one in arrived.items()})))

        journeys = map(self._journey, trials)
        return map(self._outcome, self.workers.together(journeys, guess and next_journeys))

    def answers(self, recipes: Iterable[Recipe], split: str) -> Iterator[list[Measurement] | CompressError]:
        """What recipes come to on the rows of a split, or what they fail by."""
        journeys = (
            Journey(_at_its_ends(recipe), then=Answers(split), early=BaselineAnswers(split)) for recipe in recipes
        )
        for arrival in self.workers.together(journeys):
            yield arrival.found[1] if arrival.error is None else arrival.error

    def _journey(self, trial: Trial) -> Journey:
        recipe, search = trial.recipe, trial.recipe.search
        assert search is not None
        recipe = recipe.model_copy(update={"benchmark": _brief(recipe.benchmark)})
        timed = Times(search.select.split, self.goal.compares_times) if trial.timed and self.goal.timed else None
        split = search.select.split
        return Journey(_at_its_ends(recipe), Answers(split), timed, trial.seconds, early=BaselineAnswers(split))

    def _outcome(self, arrival: Arrival) -> Outcome:
        if arrival.error is not None:
            return Outcome(error=first_line(arrival.error), seconds=arrival.seconds)
        model, rows = arrival.found
        stages = tuple(
            StageCost(label=one.name, key=one.key, seconds=one.seconds, cached=one.cached) for one in arrival.stages
        )
        return Outcome.model_validate(
            {
                **figures([*rows, *(arrival.timed or ())], (*self.goal.wanted, *NEARNESS)),
                "model": model,
                "stages": stages,
                "seconds": arrival.seconds,
            }
        )


def target_profile(recipe: Recipe) -> Profile:
    """The target that trials are measured on."""
    assert recipe.search is not None
    name = target_of(recipe, recipe.search)
    return next(profile for profile in recipe.profiles() if profile.name == name)


def _session_of(runner: StageRunner, split: str, labels: Sequence[str]) -> TargetSession:
    """Models of a recipe that has been run, in the format of its target."""
    profile = target_profile(runner.recipe)
    artifacts = measurable(runner, profile.target.format, profile.options)
    return TargetSession(runner, profile, {label: artifacts[label] for label in labels}, split, precision=_PRECISION)


def _at_its_ends(recipe: Recipe) -> Recipe:
    """The recipe, measured by its baseline and its final model alone."""
    return recipe.model_copy(update={"benchmark": recipe.benchmark.model_copy(update={"every_stage": False})})


def _brief(benchmark: Benchmark) -> Benchmark:
    """Times good enough to choose by; the session at the end takes the recipe's own."""
    return benchmark.model_copy(
        update={
            "batched": False,
            "launches": min(benchmark.launches, _LAUNCHES),
            "seconds": min(benchmark.seconds, _SECONDS),
        }
    )


class Quiet(SilentProgress):
    """Bars of what is long; what stages say of themselves would drown what the search says."""

    def __init__(self, inner: Progress) -> None:
        self.track = inner.track  # type: ignore[method-assign]
