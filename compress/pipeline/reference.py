"""What files in other formats answer, against the weights that they were made of, where these were measured too."""

from __future__ import annotations

from collections.abc import Sequence

from compress.formats.registry import FORMATS
from compress.pipeline.formats import weights_of
from compress.pipeline.runner import StageRunner
from compress.pipeline.target_session import TargetSession
from compress.results.measurement import Measurement
from compress.results.metrics import metric_against
from compress.results.report import BASELINE, FINAL


def is_reference(session: TargetSession) -> bool:
    """Whether what was measured there are weights as stages leave them."""
    return FORMATS[session.target.format].written_by is None


def rows_against_reference(runner: StageRunner, sessions: Sequence[TargetSession]) -> list[Measurement]:
    """How near each model on each other target is to its own weights: the task's `METRIC_against_TARGET`."""
    reference = next(filter(is_reference, sessions), None)
    if reference is None:
        return []
    rows = list[Measurement]()
    for session in sessions:
        for label, found in session.found.items() if not is_reference(session) else ():
            whole = reference.found.get(_made_of(runner, label))
            if whole is None:
                continue
            near = runner.inputs.task.compare(found.kept, whole.kept, label, session.target.name)
            names = [metric_against(row.metric, reference.target.name) for row in near]
            rows += [row.model_copy(update={"metric": name}) for row, name in zip(near, names, strict=True)]
    return rows


def reference_notes(session: TargetSession) -> list[str]:
    """What `final` stands for, where the last output is in a format that only others run."""
    last = session.runner.recipe.labels()[-1]
    weights = weights_of(session.runner, last)
    if not is_reference(session) or weights == last:
        return []
    return [f"final is the weights of {weights}, which the output of {last} was made of"]


def _made_of(runner: StageRunner, label: str) -> str:
    """The label that the weights behind ``label`` were measured under."""
    if label in (BASELINE, FINAL):
        return label
    weights = weights_of(runner, label)
    return BASELINE if weights == weights_of(runner, runner.recipe.baseline) else weights
