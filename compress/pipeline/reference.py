"""Comparison of files in other formats with the weights that they were written from."""

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
    """Return True if the session measured weights as stages leave them, in no runtime's format."""
    return FORMATS[session.target.format].written_by is None


def rows_against_reference(runner: StageRunner, sessions: Sequence[TargetSession]) -> list[Measurement]:
    """Return the agreement of each model on each other target with its own weights (`METRIC_against_TARGET`)."""
    reference = next(filter(is_reference, sessions), None)
    if reference is None:
        return []
    rows = list[Measurement]()
    for session in sessions:
        for label, predictions in session.predictions.items() if not is_reference(session) else ():
            reference_predictions = reference.predictions.get(_made_of(runner, label))
            if reference_predictions is None:
                continue
            agreement_rows = runner.inputs.task.compare(
                predictions.kept, reference_predictions.kept, label, session.target.name
            )
            names = [metric_against(row.metric, reference.target.name) for row in agreement_rows]
            rows += [row.model_copy(update={"metric": name}) for row, name in zip(agreement_rows, names, strict=True)]
    return rows


def reference_notes(session: TargetSession) -> list[str]:
    """Return a note on which weights `final` stands for, if the last output's format does not run on this target."""
    last_label = session.runner.recipe.labels()[-1]
    weights = weights_of(session.runner, last_label)
    if not is_reference(session) or weights == last_label:
        return []
    return [f"final is the weights of {weights}, which the output of {last_label} was made of"]


def _made_of(runner: StageRunner, label: str) -> str:
    """Return the label under which the weights behind ``label`` were measured."""
    if label in (BASELINE, FINAL):
        return label
    weights = weights_of(runner, label)
    return BASELINE if weights == weights_of(runner, runner.recipe.baseline) else weights
