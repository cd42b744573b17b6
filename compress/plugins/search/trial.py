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
from compress.plugins.search.goal import Goal, target_name
from compress.plugins.search.outcome import StageCost, TrialOutcome, figures
from compress.plugins.search.proxy_metric import PROXY_METRICS, measure_divergence
from compress.recipe.recipe import Benchmark, Recipe
from compress.results.measurement import Measurement
from compress.results.report import BASELINE, FINAL
from compress.utils.errors import CompressError, first_line
from compress.utils.progress import Progress, SilentProgress

_LAUNCHES, _SECONDS, _PRECISION = 3, 0.7, 0.02


@dataclass(frozen=True)
class RecipeTrial:
    """A recipe to try; ``timed`` too, where the goal has a time in it. ``seconds`` is about what it takes."""

    recipe: Recipe
    timed: bool = False
    seconds: float = 0.0


Speculation = Callable[[Mapping[int, TrialOutcome]], Iterable[RecipeTrial]]
"""What may be tried next, by what came of a round's trials so far, each by its place."""


@dataclass(frozen=True)
class EvaluateModels:
    """What a recipe's final model and its baseline weigh and answer on the rows of ``split``."""

    split: str

    def __call__(self, runner: StageRunner) -> tuple[str, list[Measurement]]:
        """The digest of the final model, and what was measured of both."""
        session = _session_of(runner, self.split, (BASELINE, FINAL))
        rows = [*session.sizes(), *session.accuracies([]), *judgements(session, []), *measure_divergence(session)]
        return session.digests[FINAL], rows


@dataclass(frozen=True)
class EvaluateBaseline:
    """What `EvaluateModels` would find of the baseline alone, which stays in the cache."""

    split: str

    def __call__(self, runner: StageRunner) -> None:
        """Judge it."""
        profile = target_profile(runner.recipe)
        folder = written(runner, runner.recipe.baseline, profile.target.format, profile.options)
        TargetSession(runner, profile, {BASELINE: folder}, self.split).accuracies([])


@dataclass(frozen=True)
class MeasureLatency:
    """How fast the final model is on the rows of ``split``; its baseline too, where times are ``compared``."""

    split: str
    compared: bool

    def __call__(self, runner: StageRunner) -> list[Measurement]:
        """What was measured."""
        labels = (BASELINE, FINAL) if self.compared else (FINAL,)
        return _session_of(runner, self.split, labels).timings(remeasure=False)[0]


@dataclass
class TrialRunner:
    """Trials of recipes, all trained and judged on the same data, by whoever the workers are."""

    goal: Goal
    roads: Roads
    workers: Workers

    @classmethod
    def in_process(cls, goal: Goal, folder: Path, artifacts: Path, progress: Progress) -> TrialRunner:
        """Those of this process, one after another."""
        roads = Roads(folder, artifacts, BarsOnly(progress))
        return cls(goal, roads, InProcess(roads))

    def run_recipe(self, recipe: Recipe) -> StageRunner:
        """A runner at whose end a recipe has come, measured there by its baseline and its final model alone."""
        runner = self.roads.runner(_at_its_ends(recipe))
        runner.run_all()
        return runner

    def run(self, recipe: Recipe, timed: bool) -> TrialOutcome:
        """Make and judge one."""
        return next(self.run_all([RecipeTrial(recipe, timed)]))

    def run_all(self, trials: Iterable[RecipeTrial], guess: Speculation | None = None) -> Iterator[TrialOutcome]:
        """Make and judge them; outcomes come in the order of the trials. ``guess`` says what workers may begin with.

        What a recipe fails by is its outcome; a disk that is full or cannot be written ends the search.
        """

        def next_journeys(arrived: Mapping[int, Arrival]) -> list[Journey]:
            assert guess is not None
            return list(map(self._journey, guess({place: self._outcome(one) for place, one in arrived.items()})))

        journeys = map(self._journey, trials)
        return map(self._outcome, self.workers.run_all(journeys, guess and next_journeys))

    def evaluate_all(self, recipes: Iterable[Recipe], split: str) -> Iterator[list[Measurement] | CompressError]:
        """What recipes come to on the rows of a split, or what they fail by."""
        journeys = (
            Journey(_at_its_ends(recipe), then=EvaluateModels(split), early=EvaluateBaseline(split))
            for recipe in recipes
        )
        for arrival in self.workers.run_all(journeys):
            yield arrival.found[1] if arrival.error is None else arrival.error

    def _journey(self, trial: RecipeTrial) -> Journey:
        recipe, search = trial.recipe, trial.recipe.search
        assert search is not None
        recipe = recipe.model_copy(update={"benchmark": _brief(recipe.benchmark)})
        timed = (
            MeasureLatency(search.select.split, self.goal.compares_times)
            if trial.timed and self.goal.needs_timing
            else None
        )
        split = search.select.split
        return Journey(_at_its_ends(recipe), EvaluateModels(split), timed, trial.seconds, early=EvaluateBaseline(split))

    def _outcome(self, arrival: Arrival) -> TrialOutcome:
        if arrival.error is not None:
            return TrialOutcome(error=first_line(arrival.error), seconds=arrival.seconds)
        model, rows = arrival.found
        stages = tuple(
            StageCost(label=one.name, key=one.key, seconds=one.seconds, cached=one.cached) for one in arrival.stages
        )
        return TrialOutcome.model_validate(
            {
                **figures([*rows, *(arrival.timed or ())], (*self.goal.quality_metrics, *PROXY_METRICS)),
                "model": model,
                "stages": stages,
                "seconds": arrival.seconds,
            }
        )


def target_profile(recipe: Recipe) -> Profile:
    """The target that trials are measured on."""
    assert recipe.search is not None
    name = target_name(recipe, recipe.search)
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


class BarsOnly(SilentProgress):
    """Bars of what is long; what stages say of themselves would drown what the search says."""

    def __init__(self, inner: Progress) -> None:
        self.track = inner.track  # type: ignore[method-assign]
