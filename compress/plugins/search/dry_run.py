"""Checks of a search before anything runs, and a summary of its space."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from compress.formats.quiet_output import quiet_libraries
from compress.formats.runtime import why_unavailable
from compress.models.model import TorchModel
from compress.pipeline.keys import CachedStages
from compress.pipeline.planning import make_plan
from compress.pipeline.run_checks import check_run
from compress.plugins.ray.jobs import JobContext
from compress.plugins.search.final_evaluation import check_refit
from compress.plugins.search.outcome import Goal, target_profile
from compress.plugins.search.shape_inference import (
    ShapeInference,
    Stages,
    UnpredictableStageError,
    expected_failures,
    stages_key,
)
from compress.plugins.search.space import SearchSpace, value_text
from compress.recipe.document import Document
from compress.recipe.recipe import START
from compress.report.limits import limit_text
from compress.results.formatting import format_seconds
from compress.stages.protocols import model_checks
from compress.utils.errors import CompressError, InputError, first_line
from compress.utils.progress import SilentProgress
from compress.utils.pydantic_models import Frozen


@dataclass
class PreparedSearch:
    """Checked search of the recipe in ``document``, whose paths are relative to ``folder``. Nothing is written.

    Values that the model cannot have are excluded from the space, each with the error that it causes while all
    other fields are as in the recipe. Sources that would have to be downloaded are checked only if it
    ``fetches``.

    Raises:
        CompressError: For a space that cannot be searched, or a recipe that cannot run.
    """

    document: Document
    folder: Path
    artifacts: Path
    context: JobContext
    fetches: bool = True

    def __post_init__(self) -> None:
        quiet_libraries()
        self._passed_checks = set[tuple[bool, str]]()
        """Checks of the starting model that have passed: whether about widths, and their stages."""
        self.space = SearchSpace(self.document, self.folder)
        base, search = self.space.base, self.space.search
        self.goal = Goal.from_recipe(base)
        self.goal.check_resolution(search.select.rows)
        check_refit(self.space)
        target = target_profile(base).target
        if (reason := why_unavailable(target)) is not None:
            raise InputError(
                f"Trials cannot be measured on {target.name}: {reason}.",
                where="search.target",
                expected="a target that is available here",
            )
        plan = make_plan(base, self.folder, CachedStages(base, self.folder, self.artifacts), self.artifacts)
        self.first_seconds = sum(stage.seconds.value or 0.0 for stage in plan.stages)
        """Predicted time of the stages of the first trial, without its evaluation."""
        if self.fetches or all(source.status == "here" for source in plan.sources):
            runner = self.context.runner(base.model_copy(update={"baseline": START}))
            check_run(runner)
            self._inference = ShapeInference(runner, runner.inputs.start)
            if (error := self._failure(base.stages)) is not None:
                raise InputError(
                    f"The recipe cannot run, so there is nothing to search from: {error.what}",
                    where=error.where or f"stages {' -> '.join(self.space.labels)}",
                    expected=error.expected,
                    hint=error.hint,
                ) from error
            # Values that the model cannot have are found without training, by shape inference.
            self.space.exclude_failing_values(lambda point: self._failure(self.space.stages(point)))

    def summary(self, origin: str) -> SpaceSummary:
        """Return a summary of the space; ``origin`` states where its recipe comes from."""
        space, base = self.space, self.space.base
        return SpaceSummary(
            name=base.name,
            origin=origin,
            task=base.task,
            model=base.model,
            stages=space.labels,
            baseline=base.baseline,
            minimize=self.goal.minimize,
            limits=tuple(f"{limit.metric} {limit_text(limit)}" for limit in self.goal.limits),
            target=target_profile(base).name,
            rows=space.search.select.rows,
            budget=space.search.budget,
            choices=tuple(
                ParameterSummary(name=parameter.name, own=value, others=tuple(others))
                for parameter in space.parameters
                for value, *others in [map(value_text, parameter.values)]
            ),
            size=space.size,
            refused=space.rejected,
            first_seconds=self.first_seconds,
            budget_seconds=space.search.seconds,
        )

    def _failure(self, stages: Stages) -> CompressError | None:
        """Return the error of stages that are checked against the starting model and inferred without its weights."""
        import torch

        try:
            for check in model_checks(stages):
                if (key := (check.of_widths, stages_key(check.stages))) not in self._passed_checks:
                    check.run(self._inference.folder)
                    self._passed_checks.add(key)
            # Shapes are inferred up to the export. Graph stages are checked when they run.
            trained = tuple(takewhile(lambda stage: stage.input_type is stage.output_type is TorchModel, stages))
            if trained and not self.space.base.trust_remote_code:
                with torch.random.fork_rng(devices=[]):
                    self._inference.infer_model(trained)
        except UnpredictableStageError:
            return None
        except expected_failures() as error:
            return error if isinstance(error, CompressError) else InputError(first_line(error))
        return None


@contextmanager
def prepare_dry_run(document: Document, folder: Path, artifacts: Path) -> Iterator[PreparedSearch]:
    """Prepare a search for `--dry-run`: nothing is downloaded, and files go to a temporary folder only."""
    with tempfile.TemporaryDirectory(prefix="compress-search-") as scratch:
        context = JobContext(folder, Path(scratch), SilentProgress())
        yield PreparedSearch(document, folder, artifacts, context, fetches=False)


class ParameterSummary(Frozen):
    """Field or optional stage: its value in the recipe, and the other values."""

    name: str
    own: str
    others: tuple[str, ...]


class SpaceSummary(Frozen):
    """Search space before the search.

    ``origin`` states where the recipe comes from, ``refused`` which values are excluded.
    """

    name: str
    origin: str
    task: str
    model: str
    stages: tuple[str, ...]
    baseline: str
    minimize: tuple[str, ...]
    limits: tuple[str, ...]
    target: str
    rows: int
    budget: str
    choices: tuple[ParameterSummary, ...]
    size: int
    refused: dict[str, str] = {}
    first_seconds: float = 0.0
    """Predicted time of the stages of the first trial."""
    budget_seconds: float = 0.0

    def lines(self) -> Iterator[str]:
        """Yield the summary as lines for people."""
        yield f"{self.name}: starts from {self.origin}: {' -> '.join(self.stages)}, compared with {self.baseline}"
        within = ", ".join(self.limits) or "no limits"
        yield f"{' and '.join(self.minimize)} minimized on {self.target}, within {within}"
        yield f"chosen by {self.rows:,} rows held out of training, in {self.budget}"
        yield f"{self.size:,} recipes from {len(self.choices)} choices:"
        for parameter in self.choices:
            yield f"  {parameter.name}: {parameter.own}; or {', '.join(parameter.others)}"
        for why in dict.fromkeys(self.refused.values()):
            yield f"  left out: {', '.join(name for name, reason in self.refused.items() if reason == why)}: {why}"
        if self.first_seconds > self.budget_seconds:
            first = f"the first trial alone is predicted to take {format_seconds(self.first_seconds)}"
            yield f"{first}, longer than the budget of {self.budget}: without more time no other recipe is tried"
